"""What is particular to diffusers' Flux: positions, guidance, blocks of one stream, ControlNets, adapters, backends."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import opendit
from opendit.patch import planner
from opendit.patch.families import diffusers_flux
from tests.comparing import build, run, twin, worst
from tests.tiny_models import TINY, _flux, _flux_inputs, randomise

FLUX = next(t for t in TINY if t.name == "flux")
F64, CPU = torch.float64, torch.device("cpu")


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def results(model: nn.Module, changes: dict | None = None, **options) -> list[torch.Tensor | None]:
    """Output and gradients of all that goes in, of a call with `options` more."""
    (x,), more = FLUX.inputs(F64, CPU)
    more.update(changes or {})
    leaves = [x, more["encoder_hidden_states"], more["pooled_projections"], *model.parameters()]
    for leaf in leaves[:3]:
        leaf.requires_grad_()
    out = model(x, **more, **options).sample
    weights = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    return [out, *torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)]


def alike(actual: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


CHANGES = {
    "positions": {"img_ids": torch.zeros(9, 3, dtype=F64)},
    "positions of the text": {"txt_ids": torch.arange(15, dtype=F64).view(5, 3)},
    "guidance": {"guidance": torch.tensor([2.0, 2.0, 2.0], dtype=F64)},
    "timestep": {"timestep": torch.tensor([0.5, 0.1, 0.9], dtype=F64)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_given_matters(what):
    model = build(FLUX, F64)
    fast = opendit.accelerate(twin(model))
    expected = results(model, CHANGES[what])
    assert (expected[0] - results(model)[0]).abs().max() > 1e-3
    alike(results(fast, CHANGES[what]), expected)


@pytest.mark.parametrize(("text", "height", "width"), [(1, 1, 1), (9, 2, 1), (1, 8, 2)])
def test_lengths(text, height, width):
    model = build(FLUX, F64)
    fast = opendit.accelerate(twin(model))
    (x,), more = _flux_inputs(height, width)(F64, CPU)
    more["encoder_hidden_states"] = torch.randn(3, text, 10, dtype=F64)
    more["txt_ids"] = torch.zeros(text, 3, dtype=F64)
    torch.testing.assert_close(fast(x, **more).sample, model(x, **more).sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("repeat", [False, True])
def test_controlnets_outputs_are_added_between_blocks(repeat):
    model = build(FLUX, F64)
    fast = opendit.accelerate(twin(model))
    added = {
        "controlnet_block_samples": [torch.randn(3, 9, 48, dtype=F64)],
        "controlnet_single_block_samples": [torch.randn(3, 9, 48, dtype=F64)],
        "controlnet_blocks_repeat": repeat,
    }
    expected = results(model, **added)
    assert (expected[0] - results(model)[0]).abs().max() > 1e-3
    alike(results(fast, **added), expected)
    assert "upstream's own forward was used" not in explained(fast)


def test_ip_adapters():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = _flux()
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(48, 20, scale=0.7))
    randomise(model).double()
    given = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(3, 4, 20, dtype=F64)]}}
    expected = results(model, **given)
    fast = opendit.accelerate(twin(model))
    alike(results(fast, **given), expected)
    assert "its processor is FluxIPAdapterAttnProcessor" in explained(fast)
    assert not isinstance(fast.transformer_blocks[0].attn, diffusers_flux.DispatchedJointAttention)
    assert isinstance(fast.transformer_blocks[0], diffusers_flux.FusedBlock)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn.processor.to_v_ip[0].weight.mul_(2)
    assert (results(model, **given)[0] - expected[0]).abs().max() > 1e-3


def test_arguments_for_attention_are_left_to_upstream():
    model = build(FLUX, F64)
    fast = opendit.accelerate(twin(model))
    alike(results(fast, joint_attention_kwargs={"any": 1}), results(model))
    assert "a mask or other arguments were given" in explained(fast)


@pytest.mark.parametrize("order", ["before", "after"])
def test_fuse_qkv_projections(order):
    model = build(FLUX, F64)
    fast = twin(model)
    if order == "after":
        opendit.accelerate(fast)
    with torch.no_grad():
        (x,), more = FLUX.inputs(F64, CPU)
        plain = model(x, **more).sample
        for candidate in (model, fast):
            candidate.fuse_qkv_projections()
            for name in ("transformer_blocks", "single_transformer_blocks"):
                getattr(candidate, name)[0].attn.to_qkv.weight.mul_(1.5)  # so that it matters who is read
        if order == "before":
            opendit.accelerate(fast)
        expected = model(x, **more).sample
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-10, atol=1e-10)
        assert "its projections are fused" in explained(fast)
        fast.unfuse_qkv_projections()
        torch.testing.assert_close(fast(x, **more).sample, plain, rtol=1e-10, atol=1e-10)


def test_a_backend_chosen_in_diffusers_before_is_honoured():
    from diffusers import attention_backend

    before = build(FLUX, F64)
    with attention_backend("native"):  # the call below changes it for every model, and this changes it back
        before.set_attention_backend("_native_math")
        said = explained(opendit.accelerate(before))
    assert "transformer_blocks.0.attn: diffusers was told an attention backend" in said


def test_norms_and_activations_replaced_or_hooked_later_are_honoured():
    model = build(FLUX, F64)
    fast = opendit.accelerate(twin(model))
    for m in (model, fast):
        m.transformer_blocks[0].norm1_context.register_forward_hook(lambda *args: tuple(1.5 * o for o in args[2]))
        m.single_transformer_blocks[0].act_mlp = nn.ReLU()
    alike(results(fast), results(model))
    for m in (model, fast):
        m.single_transformer_blocks[0].norm.silu = nn.GELU()
        m.single_transformer_blocks[0].norm.norm = nn.LayerNorm(48, eps=0.1).double()
    alike(results(fast), results(model))
    said = explained(fast)
    assert "something was put on or in place of its norms" in said
    assert "something was put on or in place of its activation" in said


def test_large_values_stay_finite_in_half_precision():
    model = randomise(_flux()).half()
    with torch.no_grad():
        model.context_embedder.bias.fill_(65000.0)
        model.single_transformer_blocks[0].proj_out.bias.fill_(3e4)
    streams = []
    for m in (model, opendit.accelerate(twin(model))):
        m.single_transformer_blocks[0].register_forward_hook(lambda *args: streams.append(args[2][0]))
        (x,), more = FLUX.inputs(torch.float16, CPU)
        with torch.no_grad():
            m(x, **more)
    for text in streams:
        assert text.abs().max() == 65504
    e, a = streams
    # Where upstream's product of gate and output is beyond fp16, its sum is the largest number; ours may be less.
    told = e.abs() < 65504
    assert told.sum() > 100
    torch.testing.assert_close(a[told], e[told], rtol=2e-2, atol=64)


MUTANTS = {
    "turned the other way": lambda x, cos, sin: right(x, cos, -sin),
    "halves instead of pairs": lambda x, cos, sin: x * cos[None, :, None] + x.roll(x.shape[-1] // 2, -1),
    "positions from the end": lambda x, cos, sin: right(x, cos.flip(0), sin.flip(0)),
}
right = diffusers_flux.rotated


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_rotation_are_seen(mutant, monkeypatch):
    """By the probe, which leaves attention alone; and without it, by the comparison."""
    model = build(FLUX, F64)
    monkeypatch.setattr(diffusers_flux, "rotated", MUTANTS[mutant])
    left = opendit.accelerate(twin(model))
    assert not any(isinstance(m, diffusers_flux.DispatchedJointAttention) for m in left.modules())
    monkeypatch.setattr(planner, "disagreement", lambda *args, **options: None)
    assert worst(run(opendit.accelerate(twin(model)), FLUX), run(model, FLUX))[0] > 1e-3
