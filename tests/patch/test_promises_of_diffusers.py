"""What holds alike for diffusers' models of image or video beside text: what it is told, processors, checkpointing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import opendit
from tests.comparing import Results, build, run, twin, worst
from tests.tiny_models import TINY, Tiny

WAN, HUNYUAN, SD35, FLUX = (
    next(t for t in TINY if t.name == name) for name in ("wan", "hunyuan-video", "sd3.5", "flux")
)
F64 = torch.float64
# Attention in a block of each kind.
ATTENTION = {
    "wan": ("blocks.0.attn1", "blocks.0.attn2"),
    "hunyuan-video": ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    "sd3.5": ("transformer_blocks.0.attn", "transformer_blocks.0.attn2"),
    "flux": ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
}


def of(*tinies: Tiny) -> Any:
    return pytest.mark.parametrize("tiny", tinies, ids=lambda tiny: tiny.name)


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def alike(actual: Results, expected: Results) -> None:
    error, name = worst(actual, expected)
    assert error <= 1e-10, name


@of(WAN, HUNYUAN)
def test_what_diffusers_is_told_about_attention_is_honoured(tiny: Tiny):
    model = build(tiny, F64)
    expected = run(model, tiny)
    fast = opendit.accelerate(twin(model))
    fast.set_attention_backend("native")
    alike(run(fast, tiny), expected)
    assert "diffusers was told an attention backend" in explained(fast)


@of(WAN, HUNYUAN, FLUX)
def test_a_backend_that_is_active_in_diffusers_is_honoured(tiny: Tiny):
    from diffusers import attention_backend

    model = build(tiny, F64)
    fast = opendit.accelerate(twin(model))
    expected = run(model, tiny)
    alike(run(fast, tiny), expected)
    assert "diffusers was told" not in explained(fast)
    with attention_backend("_native_math"):
        alike(run(fast, tiny), expected)
    assert "diffusers was told an attention backend" in explained(fast)


class Doubling:
    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args, **kwargs):
        out = self.processor(*args, **kwargs)
        return tuple(2 * y for y in out) if isinstance(out, tuple) else 2 * out


@of(SD35, FLUX)
def test_set_attn_processor(tiny: Tiny):
    model = build(tiny, F64)
    fast, before = opendit.accelerate(twin(model)), twin(model)
    healthy = run(model, tiny)
    doubling = Doubling(next(iter(model.attn_processors.values())))
    model.set_attn_processor(doubling)
    expected = run(model, tiny)
    assert worst(expected, healthy)[0] > 1e-3
    before.set_attn_processor(doubling)
    alike(run(opendit.accelerate(before), tiny), expected)
    assert "its processor is Doubling" in explained(before)
    fast.set_attn_processor(doubling)
    alike(run(fast, tiny), expected)
    assert "its processor is now Doubling" in explained(fast)


@of(WAN, HUNYUAN, SD35, FLUX)
def test_blocks_in_parts_are_checkpointed(tiny: Tiny):
    model = build(tiny, F64)
    fast = opendit.accelerate(twin(model), {"activation_checkpointing": "full"})
    alike(run(fast, tiny), run(model, tiny))
    calls = []
    for name in ATTENTION[tiny.name]:
        fast.get_submodule(name).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run(fast, tiny)
    assert len(calls) == 4, "the blocks' forwards were not computed again"
