"""PixArt, VDiT and Latte against slow computations and the published layouts; every model under opendit."""

import math

import pytest
import torch
import torch.nn.functional as F

import opendit
from examples.models.checkpoint import load_checkpoint
from examples.models.dit import SIZES, DiT
from examples.models.latte import LATTE_MODELS, Latte
from examples.models.pixart import PIXART_MODELS, PixArt
from examples.models.registry import ARCHITECTURES, MODELS, architecture_of, build
from examples.models.vdit import VDiT
from tests.tiny_models import UserLatte, randomise

TINY = {"hidden_size": 48, "depth": 2, "num_heads": 4, "input_size": 6, "patch_size": 2, "in_channels": 3}
TEXT = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(5))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
LABELS = torch.tensor([0, 4, 2])
CASES = {
    "dit": ("DiT", {"num_classes": 5}, {"y": LABELS}),
    "dit-text": ("DiT", {"text_dim": 7}, {"y": TEXT[:, 0]}),
    "pixart": ("PixArt", {"text_dim": 7}, {"y": TEXT, "mask": MASK}),
    "vdit": ("VDiT", {"num_frames": 4, "frame_patch": 2, "num_classes": 5}, {"y": LABELS}),
    "vdit-text": ("VDiT", {"num_frames": 3, "text_dim": 7}, {"y": TEXT[:, 0]}),
    "latte": ("Latte", {"num_frames": 3, "num_classes": 5}, {"y": LABELS}),
    "latte-text": ("Latte", {"num_frames": 3, "extras": 78, "text_dim": 7}, {"text_embedding": TEXT[:, 0]}),
    "latte-time": ("Latte", {"num_frames": 3, "extras": 1}, {}),
}


def case(name):
    architecture, more, cond = CASES[name]
    model = randomise(build({"architecture": architecture, "model": {**TINY, **more}}))
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    return model.eval(), x, torch.tensor([0.0, 17.5, 999.0]), cond


@pytest.mark.parametrize("name", CASES)
def test_opendit_knows_it_and_computes_the_same(name):
    """Outputs and all gradients, in float64, several samples with a condition each."""
    model, x, t, cond = case(name)
    model, x = model.double(), x.double().requires_grad_()
    cond = {k: v.double() if v.is_floating_point() else v for k, v in cond.items()}
    weights = torch.randn(model(x, t, **cond).shape, dtype=torch.float64)

    def results():
        out = model(x, t, **cond)
        return [
            out.detach(),
            *torch.autograd.grad((out * weights).sum(), [x, *[p for p in model.parameters() if p.requires_grad]]),
        ]

    plain = results()
    opendit.accelerate(model)
    plan = opendit.explain(model)
    assert plan.family == {"PixArt": "pixart-original", "Latte": "latte"}.get(type(model).__name__, "dit")
    assert {f"blocks.{i}.attn" for i in range(2)} <= {edit.fqn for edit in plan.edits}
    for ours, theirs in zip(results(), plain, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for kind in MODELS.values() for n in kind if "-Digits" in n or "-XL" in n])
def test_every_named_model_can_be_built(name):
    arguments = {**MODELS["image"], **MODELS["video"]}[name]
    with torch.device("meta"):
        model = ARCHITECTURES[architecture_of(name)](**arguments)
    assert name.endswith(str(model.patch_size))


@pytest.mark.parametrize("name", [name for name in CASES if name != "latte-time"])
def test_the_null_condition_is_what_training_drops_to(name):
    """With every condition dropped, a model in training is the model given its null."""
    architecture, more, cond = CASES[name]
    model = randomise(build({"architecture": architecture, "model": {**TINY, **more, "class_dropout_prob": 0.999999}}))
    _, x, t, _ = case(name)
    dropped = model.train()(x, t, **cond)
    model.eval()
    null = model.null_condition(cond)
    torch.testing.assert_close(dropped, model(x, t, **null))
    assert not torch.allclose(dropped, model(x, t, **cond))


def test_latte_is_the_published_function():
    """Beside the written-down copy of upstream's in tiny_models: same keys, same outputs, for classes and texts."""
    for extras, cond in ((1, {}), (2, {"y": LABELS}), (78, {"text_embedding": TEXT[:, :3]})):
        theirs = randomise(UserLatte(size=6, channels=4, frames=3, classes=5, extras=extras, text=21, frequencies=256))
        ours = Latte(**{**TINY, "in_channels": 4}, num_frames=3, num_classes=5, extras=extras, text_dim=21)
        ours.load_state_dict(theirs.state_dict())
        x, t = torch.randn(3, 3, 4, 6, 6), torch.tensor([0, 500, 999])
        torch.testing.assert_close(ours.eval()(x, t, **cond), theirs.eval()(x, t, **cond), rtol=1e-4, atol=1e-5)


def test_latte_xl_2_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = Latte(**LATTE_MODELS["Latte-XL/2"], num_classes=101)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["temp_embed"] == (1, 16, 1152)
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (102, 1152)
    with torch.device("meta"):
        dit = DiT(num_classes=101)
    assert shapes.keys() - {"temp_embed"} == dit.state_dict().keys()
    with torch.device("meta"):
        texts = Latte(**LATTE_MODELS["Latte-XL/2"], extras=78).state_dict()
    assert tuple(texts["text_embedding_projection.1.weight"].shape) == (1152, 77 * 768)


def published_pixart(D, depth, P, C, L, E, S):
    """Keys and shapes of PixArt-XL-2-256x256.pth's state_dict, written down from the architecture."""
    shapes = {
        "pos_embed": (1, L, D),
        "x_embedder.proj.weight": (D, C, P, P), "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
        "t_block.1.weight": (6 * D, D), "t_block.1.bias": (6 * D,),
        "y_embedder.y_embedding": (S, E),
        "y_embedder.y_proj.fc1.weight": (D, E), "y_embedder.y_proj.fc1.bias": (D,),
        "y_embedder.y_proj.fc2.weight": (D, D), "y_embedder.y_proj.fc2.bias": (D,),
        "final_layer.linear.weight": (P * P * 2 * C, D), "final_layer.linear.bias": (P * P * 2 * C,),
        "final_layer.scale_shift_table": (2, D),
    }  # fmt: skip
    linears = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "cross_attn.q_linear": (D, D),
               "cross_attn.kv_linear": (2 * D, D), "cross_attn.proj": (D, D), "mlp.fc1": (4 * D, D),
               "mlp.fc2": (D, 4 * D)}  # fmt: skip
    for i in range(depth):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, D)
        for name, shape in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def test_pixart_xl_2_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = PixArt(**PIXART_MODELS["PixArt-XL/2"])
    expected = published_pixart(D=1152, depth=28, P=2, C=4, L=256, E=4096, S=120)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert 0.60e9 < sum(math.prod(shape) for shape in expected.values()) < 0.62e9


def test_pixart_is_diffusers_with_the_same_weights():
    """An independent PixArt. Its position embedding, timesteps' frequencies and mask are brought to the authors'."""
    from diffusers import PixArtTransformer2DModel

    ours, x, t, cond = case("pixart")
    theirs = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=3, out_channels=6, num_layers=2, norm_num_groups=1,
        cross_attention_dim=48, sample_size=6, caption_channels=7, interpolation_scale=1,
    ).eval()  # fmt: skip
    state, given = {}, ours.state_dict()
    outer = {
        "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    }  # fmt: skip
    inner = {"attn.proj": "attn1.to_out.0", "cross_attn.q_linear": "attn2.to_q", "cross_attn.proj": "attn2.to_out.0",
             "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}  # fmt: skip
    for p in ("weight", "bias"):
        state |= {f"{theirs_}.{p}": given[f"{ours_}.{p}"] for ours_, theirs_ in outer.items()}
        for i in range(2):
            a, b = f"blocks.{i}", f"transformer_blocks.{i}"
            state |= {f"{b}.{theirs_}.{p}": given[f"{a}.{ours_}.{p}"] for ours_, theirs_ in inner.items()}
            for n, part in zip("qkv", given[f"{a}.attn.qkv.{p}"].chunk(3), strict=True):
                state[f"{b}.attn1.to_{n}.{p}"] = part
            for n, part in zip("kv", given[f"{a}.cross_attn.kv_linear.{p}"].chunk(2), strict=True):
                state[f"{b}.attn2.to_{n}.{p}"] = part
            state[f"{b}.scale_shift_table"] = given[f"{a}.scale_shift_table"]
    state["scale_shift_table"] = given["final_layer.scale_shift_table"]
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    theirs.pos_embed.pos_embed = ours.pos_embed
    with torch.no_grad():
        expected = theirs(
            x, encoder_hidden_states=cond["y"], encoder_attention_mask=cond["mask"], timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
        torch.testing.assert_close(ours(x, t, **cond), expected, rtol=1e-4, atol=2e-5)


def test_pixart_does_not_see_what_its_mask_hides():
    model, x, t, cond = case("pixart")
    changed = torch.where(cond["mask"][..., None], cond["y"], 1e3)
    torch.testing.assert_close(model(x, t, **{**cond, "y": changed}), model(x, t, **cond))
    with pytest.raises(ValueError, match="up to 120 tokens, got 121"):
        model(x, t, torch.zeros(3, 121, 7), torch.ones(3, 121).bool())


def test_vdit_with_one_frame_is_a_dit():
    model = randomise(VDiT(**TINY, num_frames=1, num_classes=5)).eval()
    image = DiT(**TINY, num_classes=5).eval()
    state = model.state_dict()
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    image.load_state_dict(state)
    x, t = torch.randn(3, 3, 6, 6), torch.tensor([1, 50, 900])
    torch.testing.assert_close(model(x[:, None], t, LABELS)[:, 0], image(x, t, LABELS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frame_patch", [1, 2])
def test_vdit_puts_every_patch_where_it_came_from(frame_patch):
    """With the embedding and the head each other's inverse and no blocks, a video comes back as it was."""
    model = VDiT(**{**TINY, "hidden_size": 24, "num_heads": 2, "depth": 1}, num_frames=4, frame_patch=frame_patch,
                 num_classes=5, learn_sigma=False).eval()  # fmt: skip
    video = torch.randn(2, 4, 3, 6, 6)
    patches = F.unfold(video.flatten(0, 1), 2, stride=2)  # channels, then the patch's pixels
    tokens = (
        patches.view(2, 4 // frame_patch, frame_patch, 3, 2, 2, 9).permute(0, 1, 6, 2, 4, 5, 3).flatten(3).flatten(1, 2)
    )
    assert torch.equal(model.unpatchify(tokens), video)


def test_vdit_positions_tell_every_frame_and_patch_apart():
    positions = VDiT(**TINY, num_frames=4, num_classes=5).pos_embed[0]
    distances = torch.cdist(positions, positions) + 9 * torch.eye(len(positions))
    assert len(positions) == 4 * 9
    assert distances.min() > 0.1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Latte(**{**TINY, "depth": 3}), "depth 3 is odd"),
        (lambda: Latte(**TINY, extras=3), "extras 3"),
        (lambda: VDiT(**TINY, num_frames=3, frame_patch=2), "3 frames are not a multiple of the 2"),
        (lambda: VDiT(**{**TINY, "patch_size": 4}), "image size 6 is not a multiple"),
        (lambda: VDiT(**TINY)(torch.zeros(1, 3, 3, 6, 6), torch.zeros(1), torch.zeros(1)), r"takes videos of \(16, 3"),
    ],
)
def test_impossible_shapes_are_refused_in_words(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["pixart", "latte", "latte-text", "latte-time"])
def test_published_files_load_as_they_are(tmp_path, name):
    """With the widths of a published size, so that the head count is known from the file; two blocks deep."""
    architecture, more, cond = CASES[name]
    arguments = {**TINY, **more, **SIZES["S"], "depth": 2, "in_channels": 4}
    torch.manual_seed(0)
    state = randomise(build({"architecture": architecture, "model": arguments})).state_dict()
    wrapped = {"state_dict": state} if architecture == "PixArt" else {"model": {}, "ema": state}
    torch.save(wrapped, tmp_path / "published.pt")
    model, config = load_checkpoint(tmp_path / "published.pt", kind="image" if architecture == "PixArt" else "video")
    assert (config["architecture"], config["objective"], config["pixels"]) == (architecture, "gaussian", False)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert model(torch.randn(3, *model.sample_shape), torch.tensor([0, 5, 999]), **cond).isfinite().all()
