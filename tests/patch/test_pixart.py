"""What is particular to diffusers' PixArt: text and its mask, sizes, any shape of image."""

from __future__ import annotations

import io

import pytest
import torch

import opendit
from tests.comparing import build, run, twin, worst
from tests.tiny_models import TINY, _pixart, _pixart_inputs, randomise

PIXART = next(t for t in TINY if t.name == "pixart")
F64 = torch.float64


def explained(model) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


@pytest.fixture(scope="module")
def attention():
    """A cross-attention alone, plain and accelerated."""
    model = randomise(_pixart()).double()
    return model.transformer_blocks[1].attn2, opendit.accelerate(twin(model)).transformer_blocks[1].attn2


MASKS = {
    "none": lambda: None,
    "bias [B, 1, Lk]": lambda: torch.randn(2, 1, 4, dtype=F64),
    "bias [B, Lk]": lambda: torch.randn(2, 4, dtype=F64),
    "bias [B, Lq, Lk]": lambda: torch.randn(2, 5, 4, dtype=F64),
    "bias [B·H, 1, Lk]": lambda: torch.randn(6, 1, 4, dtype=F64),
    "keep [B, Lk]": lambda: torch.tensor([[True, True, False, False], [True, False, True, True]]),
    "shorter than the text": lambda: torch.randn(2, 1, 2, dtype=F64),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(attention, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, dtype=F64, generator=generator, requires_grad=True)
    text = torch.randn(2, 4, 48, dtype=F64, generator=generator, requires_grad=True)
    torch.manual_seed(1)
    mask = MASKS[kind]()
    leaves = [x, text, *([mask.requires_grad_()] if mask is not None and mask.is_floating_point() else [])]
    results = []
    for module in attention:
        try:
            out = module(x, encoder_hidden_states=text, attention_mask=mask)
        except RuntimeError as error:  # upstream pads a short mask by the text's length, and cannot use it then
            results.append(type(error))
            continue
        weights = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
        results.append([out, *torch.autograd.grad((out * weights).sum(), [*leaves, *module.parameters()])])
    plain, fast = results
    if isinstance(plain, type):
        assert fast is plain
        return
    for e, a in zip(plain, fast, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_a_mask_changes_the_result():
    """Or the parity of masked models would say nothing."""
    model = build(PIXART, F64)
    (x,), more = PIXART.inputs(F64, torch.device("cpu"))
    masked = model(x, **more).sample
    more.pop("encoder_attention_mask")
    assert (model(x, **more).sample - masked).abs().max() > 1e-3


def test_a_mask_of_image_tokens_is_left_to_upstream():
    model = build(PIXART, F64)
    (x,), more = PIXART.inputs(F64, torch.device("cpu"))
    more["attention_mask"] = torch.arange(9)[None] < torch.tensor([[9], [4], [2]])
    expected = model(x, **more).sample
    fast = opendit.accelerate(twin(model))
    torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-10, atol=1e-10)
    assert "a mask or other arguments were given" in explained(fast)


def test_without_text_it_attends_to_itself():
    model = randomise(_pixart(caption_channels=None)).double()
    (x,), more = _pixart_inputs(48, masked=False)(F64, torch.device("cpu"))
    more["encoder_hidden_states"] = None
    expected = model(x, **more).sample
    fast = opendit.accelerate(twin(model))
    torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-10, atol=1e-10)
    assert "it was not given tokens [B, L, D] and another sequence" in explained(fast)


def test_arguments_for_attention_and_chunks_are_left_to_upstream():
    model = build(PIXART, F64)
    (x,), more = PIXART.inputs(F64, torch.device("cpu"))
    expected = model(x, **more).sample
    fast = opendit.accelerate(twin(model))
    found = fast(x, cross_attention_kwargs={"ip_adapter_masks": None}, **more).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    fast.transformer_blocks[0].set_chunk_feed_forward(3, 1)
    torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-10, atol=1e-10)
    said = explained(fast)
    assert "arguments for its attention were given" in said
    assert "the feed-forward is chunked" in said


def test_whole_blocks_are_not_promised():
    with pytest.raises(
        ValueError, match=r"fusion: got 'block'; allowed here: 'auto', 'adaln'.*its modulation is a table"
    ):
        opendit.accelerate(build(PIXART), {"fusion": "block"})
    said = explained(opendit.accelerate(build(PIXART), "train"))
    assert "in parts, not one function: its modulation is a table" in said
    assert "no CUDA graphs and no selective checkpointing" in said


@pytest.mark.parametrize("keep", ["full", True])
def test_blocks_in_parts_are_checkpointed(keep):
    model = build(PIXART, F64)
    fast = opendit.accelerate(twin(model), {"activation_checkpointing": keep})
    error, name = worst(run(fast, PIXART), run(model, PIXART))
    assert error <= 1e-10, name
    calls = []
    fast.transformer_blocks[0].attn2.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run(fast, PIXART)
    assert len(calls) == 2, "the block's forward was not computed again"


@pytest.mark.parametrize("norm", ["ada_norm_zero", "layer_norm"])
def test_blocks_of_another_kind_are_left_alone(norm):
    from diffusers.models.attention import BasicTransformerBlock

    model = _pixart()
    other = BasicTransformerBlock(48, 3, 16, cross_attention_dim=48, norm_type=norm, num_embeds_ada_norm=5)
    model.transformer_blocks[1] = other
    fast = opendit.accelerate(model)
    assert type(fast.transformer_blocks[1]) is BasicTransformerBlock
    assert "it is not a plain ada_norm_single block" in explained(fast)


def test_sizes_are_conditions():
    tiny = next(t for t in TINY if t.name == "pixart-sizes")
    model = build(tiny, F64)
    fast = opendit.accelerate(twin(model))
    error, name = worst(run(fast, tiny), run(model, tiny))
    assert error <= 1e-10, name
    assert fast.adaln_single.emb.resolution_embedder.linear_1.weight.grad.abs().max() > 0


def test_attention_that_nobody_knows_cannot_be_spread():
    """With sp_size > 1 a cross-attention left to upstream might mix tokens: refused when planning."""
    from diffusers.models.attention_processor import AttnProcessor

    from opendit.patch.planner import Planner
    from opendit.patch.registry import resolve
    from opendit.patch.spreading import plan_spread

    model = _pixart()
    model.transformer_blocks[1].attn2.set_processor(AttnProcessor())
    family, planner = resolve(model), Planner()
    family.plan(model, planner)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn2.*its processor is AttnProcessor"):
        plan_spread(planner, model, family)
