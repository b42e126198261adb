"""What is particular to models in the shape of Vchitect/Latte."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opendit
from opendit.patch import adaln
from opendit.patch import block as block_file
from opendit.patch.registry import resolve
from tests.comparing import build, relative_errors, run, twin, worst
from tests.patch.plain_kernels import use_plain_kernels
from tests.patch.test_families import total, types
from tests.tiny_models import (
    TINY,
    LatteAttention,
    UserDiT,
    UserLatte,
    UserLatteIMG,
    _latte_img_inputs,
    _latte_inputs,
    modulate,
    randomise,
)

BY_NAME = {t.name: t for t in TINY if t.family == "latte"}
LATTE, IMAGES = BY_NAME["latte"], BY_NAME["latte-img"]
FLASH = replace(LATTE, name="latte-flash", build=lambda: UserLatte(attention_mode="flash"))
F64, CPU = torch.float64, torch.device("cpu")
each_latte = pytest.mark.parametrize("tiny", BY_NAME.values(), ids=BY_NAME.keys())


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


# -- which model is whose ----------------------------------------------------------------------------------------------


def test_latte_and_dit_are_told_apart():
    assert resolve(UserLatte()).name == resolve(UserLatteIMG()).name == "latte"
    assert resolve(UserDiT()).name == "dit"


def without(attribute: str) -> nn.Module:
    model = UserLatte()
    delattr(model, attribute)
    return model


def odd_number_of_blocks() -> nn.Module:
    model = UserLatte()
    model.blocks.append(model.blocks[0])
    return model


def flat_positions() -> nn.Module:
    model = UserLatte()
    model.temp_embed = nn.Parameter(torch.zeros(3, 48))
    return model


@pytest.mark.parametrize(
    ("near_miss", "missing"),
    [
        (lambda: without("pos_embed"), r"temp_embed \[1, F, D\]"),
        (lambda: without("final_layer"), "final_layer"),
        (flat_positions, r"temp_embed \[1, F, D\]"),
        (odd_number_of_blocks, "come in pairs"),
    ],
    ids=["no positions", "no head", "flat positions", "odd blocks"],
)
def test_what_only_resembles_is_of_no_family(near_miss, missing: str):
    with pytest.raises(ValueError, match=missing):
        opendit.accelerate(near_miss())


def test_without_temp_embed_its_blocks_are_dits():
    assert resolve(without("temp_embed")).name == "dit"


# -- the model's forward stays its own ---------------------------------------------------------------------------------


class ConditionPerFrameSwapped(UserLatte):
    """Rows (f n) instead of (n f): each sample gets others' conditions."""

    def repeat(self, c, times):
        return c.repeat(times, 1)


class PositionsAtTheEnd(UserLatte):
    """Temporal positions before the last pair's temporal block instead of the first's."""

    def positioned(self, x, i):
        return x + self.temp_embed if i == len(self.blocks) - 2 else x


class PositionsEverywhere(UserLatte):
    def positioned(self, x, i):
        return x + self.temp_embed


class Untransposed(UserLatte):
    """Temporal blocks are given frames again."""

    def block(self, i, x, c):
        if i % 2 == 0:
            return super().block(i, x, c)
        side = len(x), x.shape[1]
        return super().block(i, x.reshape(len(c), -1, x.shape[2]).flip(0), c).flip(0).reshape(*side, -1)


@pytest.mark.parametrize("mutant", [ConditionPerFrameSwapped, PositionsAtTheEnd, PositionsEverywhere, Untransposed])
def test_the_comparison_sees_a_wrong_forward_and_no_edit_changes_one(mutant: type[UserLatte]):
    right, wrong = build(LATTE, F64), build(replace(LATTE, build=lambda: mutant(depth=4)), F64)
    expected = run(wrong, LATTE)
    assert relative_errors(expected, run(right, LATTE))["output"] > 1e-3
    error, name = worst(run(opendit.accelerate(wrong), LATTE), expected)
    assert error <= 1e-10, name


@each_latte
def test_written_out(tiny):
    """The tiny models against loops over samples, frames and tokens, with the accelerated blocks."""
    model = opendit.accelerate(build(tiny, F64).eval())
    (x, t, *y), more = tiny.inputs(F64, CPU)
    images = more.get("use_image_num", 0)
    found = model(x, t, *y, **more)
    plain = opendit.restore(twin(model))
    B, frames, T = len(x), x.shape[1], plain.pos_embed.shape[1]
    extra = torch.zeros(B, plain.pos_embed.shape[2], dtype=F64)
    if y:
        extra = plain.y_embedder(y[0], False)
    elif more:
        extra = plain.text_embedding_projection(more["text_embedding"].flatten(1))
    for b in range(B):
        c = plain.t_embedder(t[b : b + 1])
        of_frame = [c + extra[b : b + 1]] * (frames - images)
        if images:
            of_frame += [c + plain.y_embedder(label[None], False) for label in more["y_image"][b]]
        h = torch.stack([plain.x_embedder(x[b, f : f + 1])[0] + plain.pos_embed[0] for f in range(frames)])
        for i in range(0, len(plain.blocks), 2):
            h = torch.cat([plain.blocks[i](h[f : f + 1], of_frame[f]) for f in range(frames)])
            video = h[: frames - images] + (plain.temp_embed[0][:, None] if i == 0 else 0)
            video = torch.cat([plain.blocks[i + 1](video[:, n][None], c + extra[b : b + 1]) for n in range(T)])
            h = torch.cat([video.transpose(0, 1), h[frames - images :]])
        for f in range(frames):
            head = c if tiny.name == "latte-text" else of_frame[f]
            patches = plain.final_layer(h[f : f + 1], head)[0]
            image = F.fold(
                patches.unflatten(-1, (2, 2, -1)).permute(3, 1, 2, 0).flatten(0, 2)[None], (4, 4), 2, stride=2
            )
            torch.testing.assert_close(found[b, f], image[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("extras", [1, 2, 78])
def test_forward_with_cfg(extras: int):
    model = randomise(UserLatte(extras=extras)).eval()
    args, more = _latte_inputs(extras)(torch.float32, CPU)
    expected = model.forward_with_cfg(*args, cfg_scale=3.0, **more)
    opendit.accelerate(model)
    torch.testing.assert_close(model.forward_with_cfg(*args, cfg_scale=3.0, **more), expected)


def test_without_images_latte_img_is_a_video_model():
    inputs = replace(IMAGES, inputs=_latte_inputs(2))
    model = build(IMAGES, F64)
    for train in (True, False):
        error, name = worst(run(opendit.accelerate(twin(model)), inputs, train=train), run(model, inputs, train=train))
        assert error <= 1e-10, name


def test_images_of_one_sample_have_conditions_of_their_own():
    """Nothing may take the rows of a sample for equal: another label for one image changes that image's row."""
    model = opendit.accelerate(build(IMAGES).eval())
    (x, t, y), more = _latte_img_inputs(torch.float32, CPU)
    before = model(x, t, y, **more)
    more["y_image"][0][1] = 4
    changed = (model(x, t, y, **more) - before).abs().amax((2, 3, 4))
    assert changed[0, 4] > 1e-3
    assert changed.sum() == changed[0, 4]


# -- half precision ----------------------------------------------------------------------------------------------------


def test_use_fp16():
    model = randomise(UserLatte()).eval()
    (x, t, y), _ = _latte_inputs(2)(torch.float32, CPU)
    truth = twin(model)(x, t, y).double()
    half = twin(model).half()
    fast = opendit.accelerate(twin(half))
    theirs, ours = (m(x, t, y, use_fp16=True) for m in (half, fast))
    assert ours.dtype == torch.float16
    assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm()
    assert "t_embedder: upstream's own forward was used" in explained(fast)


def test_bfloat16_weights_run_where_upstreams_break():
    model = randomise(UserLatte()).bfloat16()
    args, _ = _latte_inputs(2)(torch.bfloat16, CPU)
    with pytest.raises(RuntimeError, match="dtype"):
        model(*args)
    assert opendit.accelerate(model)(*args).dtype == torch.bfloat16


# -- attention ---------------------------------------------------------------------------------------------------------


def test_flash_is_left_alone():
    model = build(FLASH, F64)
    fast = opendit.accelerate(twin(model))
    assert all(type(block.attn) is LatteAttention for block in fast.blocks)
    assert "blocks.{0-1}.attn (2): its forward computes something else than the fused one" in explained(fast)
    assert "heads and tokens are mixed" in explained(fast)
    error, name = worst(run(fast, FLASH), run(model, FLASH))
    assert error <= 1e-10, name
    assert types(opendit.restore(fast)) == types(model)


def test_flash_with_interpreted_kernels(interpreter):
    model = build(FLASH)
    fast = opendit.accelerate(twin(model), {"kernels": "triton", "fusion": "block"})
    error, name = worst(run(fast, FLASH), run(model, FLASH))
    assert error <= 1e-5, name
    assert "fused in parts, not as a whole: attention: it was left to upstream" in explained(fast)


def test_flash_under_autocast():
    model = build(FLASH)
    truth = run(twin(model).double(), FLASH)
    theirs = relative_errors(run(model, FLASH, autocast=torch.bfloat16), truth)
    ours = relative_errors(run(opendit.accelerate(twin(model)), FLASH, autocast=torch.bfloat16), truth)
    assert total(ours) <= 1.2 * total(theirs)


class Mended(LatteAttention):
    """A copy in which every mode is the attention that it says."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class AmongHeads(LatteAttention):
    """LatteIMG's 'xformers': q, k, v [B, H, L, K] given where [B, L, H, K] is meant."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        return self.proj_drop(self.proj(out.reshape(x.shape)))


class Unscaled(LatteAttention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("kind", "mode", "same"),
    [
        (Mended, "flash", True),
        (Mended, "xformers", True),
        (AmongHeads, "xformers", False),
        (AmongHeads, "math", False),
        (Unscaled, "math", False),
        (Mended, "sage", False),
        (Mended, None, False),
        (Mended, ["math"], False),
    ],
)
def test_not_the_modes_name_decides(kind: type[LatteAttention], mode, same: bool):
    model = build(IMAGES, F64)
    for block in model.blocks:
        block.attn.__class__, block.attn.attention_mode = kind, mode
    fast = opendit.accelerate(twin(model))
    assert (type(fast.blocks[0].attn) is not kind) == same
    assert same or "blocks.{0-1}.attn (2): its" in explained(fast)
    error, name = worst(run(fast, IMAGES), run(model, IMAGES))
    assert error <= 1e-10, name


@pytest.mark.parametrize("fusion", ["adaln", "block"])
def test_mode_changed_later_is_honoured(fusion: str, interpreter, monkeypatch: pytest.MonkeyPatch):
    use_plain_kernels(monkeypatch, block_file)
    calls = []
    whole = adaln.adaln_block
    monkeypatch.setattr(adaln, "adaln_block", lambda *args: calls.append(args) or whole(*args))
    model = build(LATTE)
    cfg = {"kernels": "triton", "fusion": fusion, "attention": "sdpa-flash"}
    fast = opendit.accelerate(twin(model), cfg)
    for m in (model, fast):
        m.blocks[1].attn.attention_mode = "flash"
    error, name = worst(run(fast, LATTE), run(model, LATTE))
    assert error <= 1e-5, name
    assert "blocks.1.attn: upstream's own forward was used: its attention_mode is now 'flash'" in explained(fast)
    assert len(calls) == (3 if fusion == "block" else 0)


def test_dropout_in_attention_is_left_to_upstream():
    model = build(LATTE, F64)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.3
    fast = opendit.accelerate(twin(model))
    assert "dropout active in attention (p=0.3)" in explained(fast)
    assert worst(run(fast, LATTE), run(model, LATTE))[0] <= 1e-10


def test_a_block_that_only_resembles_is_left_alone():
    model = build(LATTE, F64)

    class Swapped(type(model.blocks[1])):
        def forward(self, x, c):
            scale_a, shift_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
            x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
            return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    model.blocks[1].__class__ = Swapped
    fast = opendit.accelerate(twin(model))
    assert type(fast.blocks[1]) is Swapped
    assert type(fast.blocks[3]) is not type(model.blocks[3])
    assert worst(run(fast, LATTE), run(model, LATTE))[0] <= 1e-10
