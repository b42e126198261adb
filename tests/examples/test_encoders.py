"""Autoencoders and text encoders from folders that their libraries wrote, against those libraries called plainly."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan, AutoencoderTiny
from safetensors.torch import save_file

from examples.data.options import check_num_frames
from examples.encoders import load_text_encoder, load_vae
from examples.encoders.taef2 import Taef2
from examples.encoding import Encoder
from tests.examples.making import tiny_text_encoder, tiny_vae


def test_autoencoder_kl_scales_and_shifts(tmp_path):
    vae, plain = load_vae(tiny_vae(tmp_path)), AutoencoderKL.from_pretrained(tmp_path)
    assert (vae.channels, vae.factor, vae.is_video) == (4, 2, False)
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = plain.encode(x).latent_dist
        mean, std = vae.encode(x)
        torch.testing.assert_close(mean, (posterior.mean - 0.1) * 0.2, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(std, posterior.std * 0.2, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(vae.decode(mean), plain.decode(posterior.mean).sample, atol=1e-5, rtol=1e-4)
    assert std.min() > 0
    noise, batch = torch.randn_like(mean), {"mean": mean, "std": std}
    assert torch.equal(Encoder(None, None, "DiT", [], mean.device).x0(batch, lambda shape: noise), mean + std * noise)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(tmp_path, device):
    vae = load_vae(tiny_vae(tmp_path, attention=True), device)  # whose sums depend on the place in a batch, on CPUs
    x = (torch.rand(19, 3, 16, 16) * 2 - 1).to(device)
    mean, std = vae.encode(x)
    for part in (slice(0, 1), slice(3, 10), slice(2, 19)):
        assert all(torch.equal(a, b[part]) for a, b in zip(vae.encode(x[part]), (mean, std), strict=True))
    assert torch.equal(vae.decode(mean[5:6]), vae.decode(mean)[5:6])
    clips = x[:18].unflatten(0, (3, 6))  # an image VAE takes clips frame by frame
    assert torch.equal(vae.encode(clips)[0], mean[:18].unflatten(0, (3, 6)))
    assert vae.decode(mean[:18].unflatten(0, (3, 6))).shape == clips.shape


def test_latents_normalised_per_channel(tmp_path):
    folder = tiny_vae(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    x = torch.rand(2, 3, 16, 16)
    raw = AutoencoderKL.from_pretrained(folder).encode(x).latent_dist.mean
    mean, _ = load_vae(folder).encode(x)
    for c in range(4):
        expected = (raw[:, c] - (c + 1) / 10) * 0.5 / (c + 1)
        torch.testing.assert_close(mean[:, c], expected, atol=1e-6, rtol=1e-5)


def test_autoencoder_tiny_has_no_posterior(tmp_path):
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**small, **blocks, upsampling_scaling_factor=2).save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)  # a pipeline's folder
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    plain = AutoencoderTiny.from_pretrained(tmp_path / "vae")
    mean, std = vae.encode(x)
    torch.testing.assert_close(mean, plain.encode(x).latents, atol=1e-6, rtol=1e-5)
    assert not std.any()
    assert vae.decode(mean).shape == x.shape


def test_video_autoencoders_compress_time(tmp_path):
    x = torch.rand(2, 5, 3, 32, 32) * 2 - 1
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2}
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    cog = AutoencoderKLCogVideoX(**shape, **blocks, temporal_compression_ratio=2)
    wan = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    for model, name in ((cog, "cog"), (wan, "wan")):
        model.save_pretrained(tmp_path / name)
        vae = load_vae(tmp_path / name)
        assert (vae.is_video, vae.factor) == (True, 2)
        assert vae.frames_kept(5) == 5
        mean, std = vae.encode(x)
        assert mean.shape == (2, 3, vae.channels, 16, 16)
        assert vae.decode(mean).shape == x.shape
        with torch.no_grad():
            raw = model.eval().encode(x[:1].transpose(1, 2)).latent_dist
        if name == "cog":
            expected, spread = raw.mean * model.config.scaling_factor, raw.std * model.config.scaling_factor
        else:
            shift, scale = (torch.tensor(model.config[f"latents_{n}"]).view(1, -1, 1, 1, 1) for n in ("mean", "std"))
            expected, spread = (raw.mean - shift) / scale, raw.std / scale
        torch.testing.assert_close(mean[:1].transpose(1, 2), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(std[:1].transpose(1, 2), spread, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match=r"takes clips \[B, T, 3, H, W\]"):
            vae.encode(x[:, 0])
    check_num_frames(5, vae)
    with pytest.raises(ValueError, match=r"num_frames: got 4; .* gives back 1 of them"):
        check_num_frames(4, vae)  # Wan takes the first frame, then fours


def test_taef2_from_its_own_layout(tmp_path):
    torch.manual_seed(0)
    model = Taef2(channels=4)
    for half in ("encoder", "decoder"):
        weights = {name: tensor.half() for name, tensor in getattr(model, half).state_dict().items()}
        save_file(weights, tmp_path / f"taef2_{half}.safetensors")
    # Keys and shapes of the published file, written down from it.
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    assert len(encoder) == len(decoder) == 79
    assert encoder["11.pool.0.weight"].shape == (256, 64, 1, 1)
    assert encoder["13.pool.3.weight"].shape == (64, 256, 1, 1)
    assert decoder["5.pool.1.bias"].shape == (256,)
    assert {"10.weight", "14.bias", "1.conv.4.bias"} <= encoder.keys()
    assert {"7.weight", "12.weight", "17.weight", "18.conv.0.bias", "19.bias"} <= decoder.keys()
    config = {"name": "TAEF2 (tiny)", "latent_channels": 4, "latent_mean": [0.5, 0, 0, 0], "latent_std": [2, 1, 1, 4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    vae = load_vae(tmp_path)
    assert (vae.channels, vae.factor) == (4, 8)
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    mean, std = vae.encode(x)
    raw = vae.model.encode((x + 1) / 2)
    torch.testing.assert_close(mean[:, 0], (raw[:, 0] - 0.5) / 2)
    torch.testing.assert_close(mean[:, 3], raw[:, 3] / 4)
    torch.testing.assert_close(vae.decode(mean), vae.model.decode(raw) * 2 - 1, atol=1e-5, rtol=1e-4)
    assert not std.any()


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_text_encoders(tmp_path, kind):
    import transformers

    folder = tiny_text_encoder(tmp_path / "text", kind)
    encoder = load_text_encoder(folder, length=6)
    captions = ["a red cat", "a blue dog", "a red cat", "two birds a a a a a a a a"]
    tokens, mask, pooled = encoder.encode(captions)
    assert tokens.shape == (4, 6, 8)
    assert (encoder.width, encoder.pooled_width) == (8, 8)
    assert mask.tolist()[0] == [True] * 4 + [False] * 2
    assert mask[3].all()  # too long: cut
    assert torch.equal(tokens[0], tokens[2])

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    classes = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel, "bert": transformers.BertModel}
    plain = classes[kind].from_pretrained(folder).eval()
    inputs = tokenizer(["a blue dog"], padding="max_length", max_length=6, return_tensors="pt")
    with torch.no_grad():
        out = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(tokens[1], out.last_hidden_state[0])
    expected = out.pooler_output[0] if kind == "clip" else out.last_hidden_state[0, :4].mean(0)
    torch.testing.assert_close(pooled[1], expected)


def test_sentence_transformers_say_how_to_pool(tmp_path):
    folder = tiny_text_encoder(tmp_path / "text", "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    tokens, _, pooled = load_text_encoder(folder).encode(["a red cat"])
    torch.testing.assert_close(pooled, tokens[:, 0] / tokens[:, 0].norm(dim=-1, keepdim=True))


def test_half_precision_files_and_lengths(tmp_path):
    folder = tiny_text_encoder(tmp_path / "text", "bert")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert load_text_encoder(folder).length == 16  # as many as it has positions
    with pytest.raises(ValueError, match=r"text_length: got 99; .* takes up to 16 tokens"):
        load_text_encoder(folder, length=99)


def test_captions_are_encoded_once(tmp_path):
    encoder = load_text_encoder(tiny_text_encoder(tmp_path / "text", "t5"), length=6)
    asked = []
    plain = encoder.tokenizer

    def counting(captions, **options):
        asked.extend(caption for caption in captions if caption)
        return plain(captions, **options)

    encoder.tokenizer = counting
    first = encoder.encode(["a red cat", "a blue dog"])
    again = encoder.encode(["a blue dog", "two birds", "a red cat"])
    assert asked == ["a red cat", "a blue dog", "two birds"]
    assert all(torch.equal(a[[1, 0]], b[[0, 2]]) for a, b in zip(first, again, strict=True))
    encoder.encode([str(i) for i in range(9)], remember=5)
    assert list(encoder.remembered) == ["4", "5", "6", "7", "8"]


def test_mistakes_are_explained(tmp_path):
    for load, argument in ((load_vae, "vae"), (load_text_encoder, "text_encoder")):
        with pytest.raises(ValueError, match=f"{argument}: the folder .*nowhere does not exist"):
            load(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"{argument}: .*empty has no config.json"):
            load(tmp_path / "empty")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="is a UNet2DModel; allowed: diffusers' Autoencoder"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="names no model_type"):
        load_text_encoder(tmp_path)
