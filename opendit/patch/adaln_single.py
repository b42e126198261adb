"""diffusers' `BasicTransformerBlock` with `ada_norm_single`, as PixArt and diffusers' Latte are made of it.

One embedding e [B, 6·D] of the timestep serves all blocks; each adds a table of its own to it:

    (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = scale_shift_table + e
    x ← x + gate_a · attn1(norm1(x)·(1 + scale_a) + shift_a)
    x ← x + attn2(x, text, mask)                                  where the block has attn2: no norm, no gate
    x ← x + gate_m · ff(norm2(x)·(1 + scale_m) + shift_m)

Shapes: x [B, L, D], text [B, Lk, C], shift, scale, gate [B, D]. B batch, L tokens, D hidden, Lk tokens of text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import untouched
from opendit.patch.diffusers_parts import BLOCK, path, plan_attention, plan_cross_attention, plan_feed_forward
from opendit.patch.planner import Planner, plain_layernorm
from opendit.patch.probe import Inputs, StandIn, reads_low_precision


class FusedSingleBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    ways = ("parts",)
    scale_shift_table: torch.Tensor
    norm1: nn.LayerNorm
    attn1: nn.Module
    norm2: nn.LayerNorm
    attn2: nn.Module | None
    ff: nn.Module
    _chunk_size: int | None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        x = hidden_states
        reason = None
        if cross_attention_kwargs:
            reason = "arguments for its attention were given"
        elif self._chunk_size is not None:
            reason = "the feed-forward is chunked"
        elif not untouched(self.norm1, self.norm2):
            reason = "something was put on or in place of its norms"
        elif x.dim() != 3 or timestep is None or timestep.numel() != 6 * len(x) * x.shape[-1]:
            reason = "the condition is not six vectors per sample"
        if reason is not None or timestep is None:
            return self._upstream(
                reason or "",
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        modulation = (self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).flatten(1)

        def attn(h: torch.Tensor) -> torch.Tensor:
            return self.attn1(h, attention_mask=attention_mask)

        def cross(h: torch.Tensor) -> torch.Tensor:
            assert self.attn2 is not None
            return self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)

        return self._stream_in_parts(
            x, modulation, self.norm1, attn, self.norm2, self.ff, None if self.attn2 is None else cross
        )


class FusedSingleBlockInFull(FusedSingleBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class CrossStandIn(nn.Module):
    """x, text, mask → tanh(x·W + mean of text·V weighted by exp(mask)): takes a cross-attention's place."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.context = nn.Parameter(torch.empty(context, width))

    def forward(
        self, x: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        text = encoder_hidden_states
        if attention_mask is not None:
            text = text * attention_mask.mT.exp()
        return torch.tanh(x @ self.weight + (text @ self.context).mean(1, keepdim=True))


def plan_single_block(planner: Planner, name: str, block: Any) -> None:
    """Plans the block and what is in it, or says why not."""
    if path(type(block)) != BLOCK:
        planner.keep(name, f"it is a {path(type(block))}, not {BLOCK}")
        return
    _plan_block(planner, name, block)
    plan_attention(planner, f"{name}.attn1", block.attn1)
    if block.attn2 is not None:
        plan_cross_attention(planner, f"{name}.attn2", block.attn2)
    plan_feed_forward(planner, f"{name}.ff", block.ff)


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    if block.norm_type != "ada_norm_single" or block.pos_embed is not None or block.only_cross_attention:
        planner.keep(
            name, "it is not a plain ada_norm_single block (another norm, own positions or cross-attention only)"
        )
    elif hasattr(block, "fuser"):
        planner.keep(name, "it attends to grounding tokens too")
    elif not plain_layernorm(block.norm1) or not plain_layernorm(block.norm2):
        planner.keep(name, "its norms are not torch's LayerNorm over the last dimension")
    else:
        width = block.norm1.normalized_shape[0]
        stand_ins: dict[str, nn.Module] = {"attn1": StandIn(width), "ff": StandIn(width)}
        context = None
        if block.attn2 is not None:
            context = block.attn2.to_k.weight.shape[1]
            stand_ins["attn2"] = CrossStandIn(width, context)
        low = all(planner.once(reads_low_precision, sublayer, width) for sublayer in (block.attn1, block.ff))
        fused = planner.offer(
            name,
            block,
            FusedSingleBlock if low else FusedSingleBlockInFull,
            "LayerNorm+modulate, gate+residual, residual+LayerNorm+modulate, gate+residual: one pass each"
            if context
            else "LayerNorm+modulate, gate+residual+LayerNorm+modulate, gate+residual: one pass each",
            [_inputs(3, width, context), _inputs(70, width, context)],
            bypassed=(block.norm1, block.norm2),
            stand_ins=stand_ins,
        )
        if fused:
            planner.keep(name, "in parts, not one function: its modulation is a table and what all blocks share")


def _inputs(length: int, width: int, context: int | None) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        text = mask = None
        if context is not None:
            text, mask = torch.randn(2, 4, context, dtype=dtype), torch.randn(2, 1, 4, dtype=dtype)
        x, condition = torch.randn(2, length, width, dtype=dtype), torch.randn(2, 6 * width, dtype=dtype)
        return x, None, text, mask, condition, None, None

    return make
