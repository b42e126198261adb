"""What is particular to diffusers' HunyuanVideo: blocks of two kinds, a text with its mask, a first frame replaced."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import opendit
from tests.comparing import build, run, twin, worst
from tests.tiny_models import TINY, _hunyuan_video, _hunyuan_video_inputs, randomise

HUNYUAN = next(t for t in TINY if t.name == "hunyuan-video")
F64 = torch.float64


def explained(model) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def test_the_mask_matters():
    """Or the parity of a masked text would say nothing: upstream's blocks attend past it, and ours to it."""
    fast = opendit.accelerate(build(HUNYUAN, F64))
    (x,), more = HUNYUAN.inputs(F64, torch.device("cpu"))
    masked = fast(x, **more).sample
    more["encoder_attention_mask"] = torch.ones_like(more["encoder_attention_mask"])
    changed = (fast(x, **more).sample - masked).abs().amax((1, 2, 3, 4))
    assert changed[0] == 0
    assert changed[1] > 1e-3


def test_a_first_frame_that_is_replaced_keeps_its_blocks():
    model = randomise(_hunyuan_video(image_condition_type="token_replace", guidance_embeds=False)).double()
    tiny = type(HUNYUAN)(**{**vars(HUNYUAN), "inputs": _hunyuan_video_inputs(guided=False)})
    fast = opendit.accelerate(twin(model))
    error, name = worst(run(fast, tiny), run(model, tiny))
    assert error <= 1e-10, name
    said = explained(fast)
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        assert f"{blocks}.{{0-1}} (2): the first frame's tokens have a modulation of their own" in said
        assert f"  {blocks}.{{0-1}}.attn (2): q, k, v of video and text together" in said


def test_a_first_frame_that_is_replaced_cannot_be_spread():
    from opendit.patch.planner import Planner
    from opendit.patch.registry import resolve
    from opendit.patch.spreading import plan_spread

    model = _hunyuan_video(image_condition_type="token_replace")
    family, planner = resolve(model), Planner()
    family.plan(model, planner)
    with pytest.raises(
        ValueError, match=r"sp_size: .*transformer_blocks\.0.*the first frame's tokens have a modulation"
    ):
        plan_spread(planner, model, family)


def test_hooks_inside_blocks_are_called():
    model = build(HUNYUAN, F64)
    fast = opendit.accelerate(twin(model))
    for m in (model, fast):
        m.transformer_blocks[0].norm2_context.register_forward_hook(lambda module, args, out: 2 * out)
        m.single_transformer_blocks[1].act_mlp.register_forward_hook(lambda module, args, out: 2 * out)
    error, name = worst(run(fast, HUNYUAN), run(model, HUNYUAN))
    assert error <= 1e-10, name
    assert explained(fast).count("something was put on or in place of its norms or its activation") == 2


class Modulated(nn.Module):
    """A norm of one's own, without the parts of diffusers'."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 5 * 48)

    def forward(self, x, emb):
        shift, *others = self.linear(emb).chunk(5, dim=1)
        return x.tanh() + shift[:, None], *others


def test_norms_of_ones_own_put_in_later_are_honoured():
    model = build(HUNYUAN, F64)
    fast = opendit.accelerate(twin(model))
    model.transformer_blocks[0].norm1_context = randomise(Modulated()).double()
    fast.transformer_blocks[0].norm1_context = twin(model.transformer_blocks[0].norm1_context)
    error, name = worst(run(fast, HUNYUAN), run(model, HUNYUAN))
    assert error <= 1e-10, name
    assert "something was put on or in place of its norms" in explained(fast)
