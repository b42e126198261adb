"""The example DiT against the published architecture, and against diffusers' DiT with the same weights."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from examples.models.convert import from_diffusers, to_diffusers
from examples.models.dit import DIT_MODELS, DiT, TimestepEmbedder

TINY = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


def randomised(model: nn.Module) -> nn.Module:
    """A new DiT outputs zero whatever its input; with these weights every path matters."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.15)
    return model.eval()


def published_shapes(D: int, depth: int, P: int, C: int, L: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the published checkpoints, written down from the architecture."""
    out = P * P * 2 * C
    shapes = {
        "pos_embed": (1, L, D),
        "x_embedder.proj.weight": (D, C, P, P),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (classes + 1, D),
        "final_layer.linear.weight": (out, D),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    linears = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    for i in range(depth):
        for name, shape in {**linears, "adaLN_modulation.1": (6 * D, D)}.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def test_xl_2_has_the_published_keys_shapes_and_size():
    with torch.device("meta"):
        model = DiT(**DIT_MODELS["DiT-XL/2"], input_size=32)
    expected = published_shapes(D=1152, depth=28, P=2, C=4, L=256, classes=1000)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert sum(math.prod(shape) for shape in expected.values()) == 675_129_632
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("name", sorted(DIT_MODELS))
def test_every_named_model_can_be_built(name):
    with torch.device("meta"):
        model = DiT(**DIT_MODELS[name])
    assert f"/{model.patch_size}" in name
    assert model(torch.empty(2, 4, 32, 32, device="meta"), *torch.empty(2, 2, device="meta").long()).shape == (
        2,
        8,
        32,
        32,
    )


def test_starts_as_zero_and_its_blocks_as_identities():
    model = DiT(**TINY)
    x = torch.randn(2, 4, 8, 8)
    assert not model(x, torch.tensor([0, 999]), torch.tensor([1, 2])).any()
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 32)), tokens)


def test_position_embedding_is_that_of_diffusers():
    theirs = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, num_layers=1, sample_size=8)
    assert torch.equal(DiT(**TINY).pos_embed, theirs.pos_embed.pos_embed)


def test_timesteps_are_cos_then_sin_from_fast_to_slow():
    t = torch.tensor([0.0, 0.25, 999.0])
    waves = TimestepEmbedder.timestep_embedding(t, 6)
    w = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    expected = [[math.cos(s * f) for f in w] + [math.sin(s * f) for f in w] for s in t.tolist()]
    torch.testing.assert_close(waves, torch.tensor(expected), atol=1e-4, rtol=0)
    assert TimestepEmbedder.timestep_embedding(t, 7).shape == (3, 7)


def test_runs_in_bfloat16_close_to_float32():
    model = randomised(DiT(**TINY))
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 500, 999]), torch.tensor([0, 9, 10, 4])
    exact = model(x, t, y)
    half = model.bfloat16()(x.bfloat16(), t, y)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.03


def test_labels_drop_to_the_row_after_the_last_class():
    model = DiT(**TINY, class_dropout_prob=0.5).train()
    labels = torch.arange(10).repeat(200)
    torch.manual_seed(0)
    seen = model.y_embedder.token_drop(labels)
    dropped = seen != labels
    assert set(seen[dropped].tolist()) == {10}
    assert 0.45 < dropped.float().mean() < 0.55
    assert torch.equal(model.eval().y_embedder(labels, False), model.y_embedder.embedding_table(labels))
    assert DiT(**TINY, class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 10


@pytest.mark.parametrize(("argument", "guided"), [({}, 3), ({"guided_channels": None}, 4), ({"guided_channels": 1}, 1)])
def test_guidance_mixes_the_asked_channels_and_leaves_the_rest(argument, guided):
    model = randomised(DiT(**TINY))
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 900])
    y, null = torch.tensor([0, 1, 2]), torch.full((3,), 10)
    out = model.forward_with_cfg(torch.cat([x, x]), t.repeat(2), torch.cat([y, null]), 4.0, **argument)
    cond, uncond = model(x, t, y), model(x, t, null)
    mixed = uncond + 4.0 * (cond - uncond)
    expected = torch.cat([mixed[:, :guided], cond[:, guided:]], dim=1)
    torch.testing.assert_close(out[:3], expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out[3:, :guided], mixed[:, :guided], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out[3:, guided:], uncond[:, guided:], atol=2e-5, rtol=1e-5)


@pytest.fixture
def pair():
    """Our DiT and diffusers' with our weights, converted; the second norm's eps set to the published 1e-6."""
    ours = randomised(DiT(**TINY))
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    return ours, theirs.eval()


def inputs():
    torch.manual_seed(1)
    t = torch.tensor([0, 1, 77, 500, 998])
    return torch.randn(5, 4, 8, 8), t, torch.tensor([0, 3, 9, 10, 5])


def test_equals_diffusers_once_its_timestep_frequencies_are_the_published_ones(pair):
    """diffusers divides the exponent by 127, the published model by 128; only with 128 are the functions the same."""
    ours, theirs = pair
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = inputs()
    expected = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(ours(x, t, y), expected, atol=5e-6, rtol=1e-5)


def test_equals_diffusers_as_released_only_where_the_frequencies_do_not_matter(pair):
    """Measures what the shift costs: nothing at t = 0, where every wave is the same, and a few per cent later on."""
    ours, theirs = pair
    x, _, y = inputs()
    zero = torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(ours(x, zero, y), theirs(x, timestep=zero, class_labels=y).sample, atol=5e-6, rtol=1e-5)
    late = torch.full((5,), 500)
    exact, shifted = ours(x, late, y), theirs(x, timestep=late, class_labels=y).sample
    assert 1e-3 < (exact - shifted).norm() / exact.norm() < 1.0


def test_conversion_comes_back_unchanged_and_refuses_unshared_embedders(pair):
    ours, theirs = pair
    back = from_diffusers(theirs.state_dict(), ours.pos_embed)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    with pytest.raises(ValueError, match=r"transformer_blocks\.1.*differs from block 0"):
        from_diffusers(theirs.state_dict(), ours.pos_embed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "not a multiple of patch size"),
        ({"num_heads": 5}, "not a multiple of 5 heads"),
        ({"hidden_size": 30, "num_heads": 3}, "not a multiple of 4"),
    ],
)
def test_impossible_shapes_are_refused_in_words(change, message):
    with pytest.raises(ValueError, match=message):
        DiT(**TINY | change)
