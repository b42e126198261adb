"""What is particular to diffusers' CogVideoX: two sequences, positions that turn or are added, other processors."""

from __future__ import annotations

import io

import pytest
import torch

import opendit
from tests.comparing import build, exactly, run, twin, worst
from tests.tiny_models import TINY

ADDED, TURNED = (next(t for t in TINY if t.name == name) for name in ("cogvideox", "cogvideox-rotary"))
F64 = torch.float64


def explained(model) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def test_positions_matter():
    """Or the parity of models with rotary positions would say nothing."""
    fast = opendit.accelerate(build(TURNED, F64))
    (x,), more = TURNED.inputs(F64, torch.device("cpu"))
    turned = fast(x, **more).sample
    more["image_rotary_emb"] = tuple(table.flip(0) for table in more["image_rotary_emb"])
    assert (fast(x, **more).sample - turned).abs().max() > 1e-3


def test_the_texts_own_outputs():
    """Of a block alone: the model never reads the last block's."""
    model = build(ADDED, F64)
    fast = opendit.accelerate(twin(model))
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, 48), (2, 3, 48), (2, 20)
    leaves = [torch.randn(shape, dtype=F64, generator=generator, requires_grad=True) for shape in shapes]
    results = []
    for block in (model.transformer_blocks[1], fast.transformer_blocks[1]):
        x, e = block(*leaves)
        out = torch.cat([x, 3 * e], dim=1)
        weights = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        results.append([x, e, *torch.autograd.grad((out * weights).sum(), [*leaves, *block.parameters()])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_masks_and_other_arguments_are_left_to_upstream():
    model = build(ADDED, F64)
    (x,), more = ADDED.inputs(F64, torch.device("cpu"))
    mask = torch.zeros(2, 14, dtype=F64)
    mask[1, 3:] = -1e4
    fast = opendit.accelerate(twin(model))
    expected = model(x, attention_kwargs={"attention_mask": mask}, **more).sample
    assert not torch.allclose(expected, model(x, **more).sample)
    found = fast(x, attention_kwargs={"attention_mask": mask}, **more).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert "a mask or other arguments were given" in explained(fast)


def test_positions_given_twice_are_refused_as_upstream_does():
    model = build(TURNED, F64)
    fast = opendit.accelerate(twin(model))
    (x,), more = TURNED.inputs(F64, torch.device("cpu"))
    for m in (model, fast):
        with pytest.raises(TypeError, match="multiple values for keyword argument 'image_rotary_emb'"):
            m(x, attention_kwargs={"image_rotary_emb": more["image_rotary_emb"]}, **more)


@pytest.mark.parametrize("order", ["before", "after"])
def test_fused_projections(order):
    model = build(TURNED, F64)
    fast = twin(model)
    (x,), more = TURNED.inputs(F64, torch.device("cpu"))
    with exactly(TURNED), torch.no_grad():
        before = model(x, **more).sample
    if order == "after":
        opendit.accelerate(fast)
    for m in (model, fast):
        m.fuse_qkv_projections()
        m.transformer_blocks[0].attn1.to_qkv.weight.data.mul_(1.5)
    if order == "before":
        opendit.accelerate(fast)
    with exactly(TURNED), torch.no_grad():
        expected = model(x, **more).sample
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-9, atol=1e-9)
        assert "FusedCogVideoXAttnProcessor2_0" in explained(fast)
        fast.unfuse_qkv_projections()
        torch.testing.assert_close(fast(x, **more).sample, before, rtol=1e-9, atol=1e-9)


def test_a_hook_on_a_norm_is_called():
    model = build(ADDED, F64)
    fast = opendit.accelerate(twin(model))
    for m in (model, fast):
        m.transformer_blocks[0].norm2.norm.register_forward_hook(lambda module, args, out: 2 * out)
    error, name = worst(run(fast, ADDED), run(model, ADDED))
    assert error <= 1e-10, name
    assert "something was put on or in place of its norms" in explained(fast)


def test_blocks_are_checkpointed():
    model = build(TURNED, F64)
    fast = opendit.accelerate(twin(model), {"activation_checkpointing": "full"})
    error, name = worst(run(fast, TURNED), run(model, TURNED))
    assert error <= 1e-10, name
