"""What is particular to diffusers' SD3: two streams, of which the text ends early, ControlNets, layers left out."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import opendit
from tests.comparing import build, run, twin
from tests.tiny_models import TINY, Tiny, _sd3, _sd3_inputs, randomise

SD3, SD35 = (next(t for t in TINY if t.name == name) for name in ("sd3", "sd3.5"))
F64, CPU = torch.float64, torch.device("cpu")


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def results(model: nn.Module, tiny: Tiny = SD35, **options) -> list[torch.Tensor | None]:
    """Output and gradients of all that goes in, of a call with `options` more."""
    (x,), more = tiny.inputs(F64, CPU)
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


def test_kinds_of_blocks_in_one_model():
    """A second attention in the first, none in the second, the text ends in the third."""
    model = randomise(_sd3(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0,))).double()
    fast = opendit.accelerate(twin(model), {"kernels": "reference"})
    alike(results(fast, SD3), results(model, SD3))
    plan = opendit.explain(fast, file=io.StringIO())
    assert {f"transformer_blocks.{i}" for i in range(3)} <= {edit.fqn for edit in plan.edits}
    left = {kept.why for kept in plan.kept if kept.fqn.startswith("transformer_blocks")}
    assert left == {"in parts, not one function: image and text meet in its attention"}


@pytest.mark.parametrize(("text", "height", "width"), [(1, 2, 2), (1, 8, 2), (9, 2, 4)])
def test_lengths(text, height, width):
    model = build(SD35, F64)
    fast = opendit.accelerate(twin(model))
    (x,), more = _sd3_inputs(height, width)(F64, CPU)
    more["encoder_hidden_states"] = torch.randn(3, text, 10, dtype=F64)
    torch.testing.assert_close(fast(x, **more).sample, model(x, **more).sample, rtol=1e-10, atol=1e-10)


def test_controlnets_outputs_are_added_between_blocks():
    model = build(SD35, F64)
    fast = opendit.accelerate(twin(model))
    added = [torch.randn(3, 10, 48, dtype=F64)]
    expected = results(model, block_controlnet_hidden_states=added)
    assert (expected[0] - results(model)[0]).abs().max() > 1e-3
    alike(results(fast, block_controlnet_hidden_states=added), expected)
    assert "upstream's own forward was used" not in explained(fast)


def test_layers_are_left_out():
    model = build(SD35, F64)
    fast = opendit.accelerate(twin(model))
    expected = results(model, skip_layers=[0])
    assert (expected[0] - results(model)[0]).abs().max() > 1e-3
    alike(results(fast, skip_layers=[0]), expected)


def test_arguments_for_attention_and_chunks_are_left_to_upstream():
    model = build(SD35, F64)
    fast = opendit.accelerate(twin(model))
    alike(results(fast, joint_attention_kwargs={"any": 1}), results(model))
    fast.enable_forward_chunking(5, 1)
    alike(results(fast), results(model))
    said = explained(fast)
    assert "a mask or other arguments were given" in said
    assert "the feed-forward is chunked" in said


def test_the_scale_of_adapters_is_no_argument_for_attention():
    model = build(SD35, F64)
    fast = opendit.accelerate(twin(model))
    alike(results(fast, joint_attention_kwargs={"scale": 0.5}), results(model))
    assert "upstream's own forward was used" not in explained(fast)


def test_ip_adapters():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model = _sd3(qk_norm="rms_norm")
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(48, 20, 16, timesteps_emb_dim=12))
    randomise(model).double()
    given = {"ip_hidden_states": torch.randn(3, 4, 20, dtype=F64), "temb": torch.randn(3, 12, dtype=F64)}
    fast = opendit.accelerate(twin(model))
    alike(results(fast, SD3, joint_attention_kwargs=given), results(model, SD3, joint_attention_kwargs=given))
    assert "its processor is SD3IPAdapterJointAttnProcessor2_0" in explained(fast)
    later = opendit.accelerate(_sd3(qk_norm="rms_norm").double())
    for ours, theirs in zip(later.transformer_blocks, model.transformer_blocks, strict=True):
        ours.attn.set_processor(theirs.attn.processor)
    later.load_state_dict(model.state_dict())
    alike(results(later, SD3, joint_attention_kwargs=given), results(model, SD3, joint_attention_kwargs=given))


def test_fuse_qkv_projections():
    """Of SD3: with a second attention diffusers' own processor of fused projections fails."""
    model = build(SD3, F64)
    fast = opendit.accelerate(twin(model))
    with torch.no_grad():
        (x,), more = SD3.inputs(F64, CPU)
        plain = model(x, **more).sample
        for candidate in (model, fast):
            candidate.fuse_qkv_projections()
            candidate.transformer_blocks[0].attn.to_added_qkv.weight.mul_(1.5)  # so that it matters who is read
        expected = model(x, **more).sample
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-10, atol=1e-10)
        assert "its processor is now FusedJointAttnProcessor2_0" in explained(fast)
        fast.unfuse_qkv_projections()
        torch.testing.assert_close(fast(x, **more).sample, plain, rtol=1e-10, atol=1e-10)


def test_norms_replaced_or_hooked_later_are_honoured():
    model = build(SD35, F64)
    fast = opendit.accelerate(twin(model))
    for m in (model, fast):
        m.transformer_blocks[0].norm1.norm = nn.LayerNorm(48, eps=0.1, elementwise_affine=False).double()
        m.transformer_blocks[1].norm1.register_forward_hook(lambda *args: tuple(1.5 * o for o in args[2]))
        m.norm_out.norm = nn.Identity()
    alike(results(fast), results(model))
    assert "something was put on or in place of its norms" in explained(fast)


def test_both_streams_are_kept_in_bf16_where_that_is_asked_for():
    fast = opendit.accelerate(build(SD35), {"residual": "bf16"})
    seen = []
    fast.transformer_blocks[0].register_forward_hook(lambda module, args, out: seen.extend(o.dtype for o in out))
    run(fast, SD35, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16] * 2
