"""What is particular to diffusers' Wan: timesteps for each token, an image beside the text, fp32 on a bf16 stream."""

from __future__ import annotations

import io

import pytest
import torch

import opendit
from opendit.fastseq import Sequence
from opendit.patch.core import Choices, patched_class
from opendit.patch.families import diffusers_wan
from tests.comparing import build, exactly, relative_errors, run, twin, worst
from tests.tiny_models import TINY, _wan, _wan_inputs, randomise

WAN, IMAGE = (next(t for t in TINY if t.name == name) for name in ("wan", "wan-image"))
F64 = torch.float64


def explained(model) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def with_each_its_own_time(dtype, device):
    """Nine tokens a video, a timestep for each: Wan 2.2 TI2V."""
    (x,), more = _wan_inputs()(dtype, device)
    more["timestep"] = torch.arange(18, device=device).view(2, 9) * 50
    return (x,), more


def test_timesteps_for_each_token_are_left_to_upstream():
    model = randomise(_wan()).double()
    tiny = type(WAN)(**{**vars(WAN), "inputs": with_each_its_own_time})
    fast = opendit.accelerate(twin(model))
    error, name = worst(run(fast, tiny), run(model, tiny))
    assert error <= 1e-10, name
    said = explained(fast)
    assert "blocks.{0-1} (2): upstream's own forward was used: each token has a timestep of its own" in said
    assert said.count("upstream's own forward was used") == 1  # attention and feed-forward stay fused


def test_they_are_refused_where_tokens_are_spread():
    block = _wan().blocks[0]
    block.__class__ = patched_class(
        type(block), diffusers_wan.FusedBlock, Choices((), "reference", sequence=Sequence("ulysses", 2))
    )
    x, text, temb = torch.randn(2, 9, 36), torch.randn(2, 5, 36), torch.randn(2, 9, 6, 36)
    with pytest.raises(ValueError, match=r"sp_size: timesteps for each token \(Wan 2.2 TI2V\).*leave sp_size at 1"):
        block(x, text, temb, None)


def test_an_image_beside_the_text():
    model = build(IMAGE, F64)
    fast = opendit.accelerate(twin(model))
    expected = run(model, IMAGE)
    error, name = worst(run(fast, IMAGE), expected)
    assert error <= 1e-10, name
    (x,), more = IMAGE.inputs(F64, torch.device("cpu"))
    more["encoder_hidden_states_image"] = more["encoder_hidden_states_image"].flip(-1)
    with exactly(IMAGE):
        assert not torch.allclose(fast(x, **more).sample, expected["output"], rtol=1e-4)


@pytest.mark.parametrize("text", [3, 300])
def test_less_text_than_upstream_counts_on(text):
    """It takes what is more than 512 tokens for the image's, whatever there is."""
    model = randomise(_wan(image_dim=14, added_kv_proj_dim=36)).double()
    tiny = type(IMAGE)(**{**vars(IMAGE), "inputs": _wan_inputs(text=text, image=400)})
    fast = opendit.accelerate(twin(model))
    with exactly(tiny), torch.no_grad():
        (x,), more = tiny.inputs(F64, torch.device("cpu"))
        expected, found = (m(x, **more).sample for m in (model, fast))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_weights_as_its_pipelines_load_them():
    """bf16, but norms, table and time embedding in fp32: gates are fp32 on a bf16 stream."""
    theirs, ours = [], []
    for seed in range(3):
        model = randomise(_wan(), seed)
        truth = run(twin(model).double(), WAN)
        for parameter_name, parameter in model.named_parameters():
            if not any(kept in parameter_name for kept in model._keep_in_fp32_modules):
                parameter.data = parameter.data.bfloat16()
        (x,), more = WAN.inputs(torch.bfloat16, torch.device("cpu"))
        assert model.patch_embedding.weight.dtype == torch.bfloat16
        assert model.blocks[0].scale_shift_table.dtype == torch.float32
        for totals, candidate in ((theirs, model), (ours, opendit.accelerate(twin(model)))):
            seen = []
            handle = candidate.blocks[1].register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.dtype))
            lowest = {**vars(WAN), "inputs": lambda *_, x=x, more=more: ((x.clone(),), more)}
            errors = relative_errors(run(candidate, type(WAN)(**lowest)), truth)
            handle.remove()
            assert seen == [torch.bfloat16]
            totals.append((sum(e * e for e in errors.values()) / len(errors)) ** 0.5)
    assert sorted(ours)[1] <= 1.2 * sorted(theirs)[1]


def test_fused_projections_are_upstreams():
    model = build(WAN, F64)
    fast = opendit.accelerate(twin(model))
    with exactly(WAN), torch.no_grad():
        (x,), more = WAN.inputs(F64, torch.device("cpu"))
        before = model(x, **more).sample
        for m in (model, fast):
            m.fuse_qkv_projections()
            m.blocks[0].attn1.to_qkv.weight.mul_(1.5)
        expected = model(x, **more).sample
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-9, atol=1e-9)
        assert "its projections were fused" in explained(fast)
        fast.unfuse_qkv_projections()
        torch.testing.assert_close(fast(x, **more).sample, before, rtol=1e-9, atol=1e-9)


def test_a_hook_on_a_norm_is_called():
    model = build(WAN, F64)
    fast = opendit.accelerate(twin(model))
    for m in (model, fast):
        m.blocks[0].norm3.register_forward_hook(lambda module, args, out: 2 * out)
    error, name = worst(run(fast, WAN), run(model, WAN))
    assert error <= 1e-10, name
    assert "something was put on or in place of its norms" in explained(fast)


def test_blocks_are_not_whole():
    with pytest.raises(ValueError, match=r"fusion: got 'block'; allowed here: 'auto', 'adaln'"):
        opendit.accelerate(build(WAN), {"fusion": "block"})


def test_verify_certifies_it():
    """Though the model rounds to fp32 in fp64."""
    (x,), more = WAN.inputs(torch.float32, torch.device("cpu"))
    batch = {"hidden_states": x, **more}
    assert opendit.verify(build(WAN), batch, quiet=True)
