"""What is particular to diffusers' Latte: frames, pairs of blocks in two lists, a mask with a row per frame."""

from __future__ import annotations

import io

import pytest
import torch

import opendit
from opendit.patch.planner import Planner
from opendit.patch.registry import resolve
from opendit.patch.spreading import plan_spread
from tests.comparing import build, twin
from tests.tiny_models import TINY, _diffusers_latte, _diffusers_latte_inputs, randomise

LATTE = next(t for t in TINY if t.name == "diffusers-latte")
F64, CPU = torch.float64, torch.device("cpu")


def test_one_frame():
    """Whose temporal attention sees a single token: its q and k have no gradient but rounding."""
    model = randomise(_diffusers_latte(video_length=1)).double()
    fast = opendit.accelerate(twin(model))
    results = []
    for candidate in (model, fast):
        (x,), more = _diffusers_latte_inputs(1)(F64, CPU)
        out = candidate(x.requires_grad_(), **more).sample
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in candidate.parameters())])
    largest = max(e.abs().max() for e in results[0])
    for e, a in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13 * largest.item())


def test_without_temporal_attention():
    model = build(LATTE, F64)
    (x,), more = LATTE.inputs(F64, CPU)
    expected = model(x, enable_temporal_attentions=False, **more).sample
    assert (model(x, **more).sample - expected).abs().max() > 1e-3
    fast = opendit.accelerate(twin(model))
    torch.testing.assert_close(
        fast(x, enable_temporal_attentions=False, **more).sample, expected, rtol=1e-10, atol=1e-10
    )


def test_a_mask_with_a_row_per_sample_fails_as_it_does_upstream():
    model = build(LATTE, F64)
    (x,), more = LATTE.inputs(F64, CPU)
    more["encoder_attention_mask"] = more["encoder_attention_mask"][::3]
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model(x, **more)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        opendit.accelerate(twin(model))(x, **more)


def test_the_other_norms_of_its_config_are_left_alone():
    model = _diffusers_latte(norm_type="layer_norm", norm_elementwise_affine=True)
    said = io.StringIO()
    opendit.explain(opendit.accelerate(model), file=said)
    assert "transformer_blocks.{0-1} (2): it is not a plain ada_norm_single block" in said.getvalue()


def test_it_is_not_spread():
    model = _diffusers_latte()
    with pytest.raises(NotImplementedError, match="diffusers_latte"):
        plan_spread(Planner(), model, resolve(model))
