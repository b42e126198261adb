"""diffusers' `DiTTransformer2DModel`, matched by its class.

Its blocks are `BasicTransformerBlock`s with `ada_norm_zero`: each owns timestep and label embeddings, so each
draws its own label drop in training, and norm3 (before the feed-forward) has its own eps and affine:

    x ← x + gate_a · attn1(LN(x)·(1 + scale_a) + shift_a)
    x ← x + gate_m · ff(norm3(x)·(1 + scale_m) + shift_m)      shift, scale, gate [B, D] from norm1.emb

Shapes: x [B, L, D], q/k/v [B, L, H, K]. B batch, L tokens, D hidden, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import hooked, untouched
from opendit.patch.diffusers_parts import BLOCK, is_class, path, plan_attention, plan_feed_forward
from opendit.patch.planner import Planner, has, plain_layernorm
from opendit.patch.probe import StandIn, reads_low_precision
from opendit.patch.registry import Family, Spread, Trait

_MODEL = "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel"


class FusedBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    ways = ("parts", "whole")
    is_site = True
    norm1: Any
    attn1: nn.Module
    norm3: nn.LayerNorm
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
        others = (attention_mask, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        reason = None
        if any(o is not None for o in others) or cross_attention_kwargs:
            reason = "a mask or another conditioning was given"
        elif self._chunk_size is not None:
            reason = "the feed-forward is chunked"
        elif hooked(self.norm1) or not untouched(self.norm1.norm, self.norm3):
            reason = "something was put on or in place of its norms"
        elif timestep is None or class_labels is None or len(class_labels) != len(hidden_states):
            reason = "the condition is not one row per sample"
        if reason is not None:
            return self._upstream(
                reason,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        x = hidden_states

        def c() -> torch.Tensor:
            return self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)

        ada = (self.norm1.silu, self.norm1.linear)
        return self._block(x, c, ada, self.norm1.norm, self.attn1, self.norm3, self.ff)


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}"
        _plan_block(planner, name, block)
        plan_attention(planner, f"{name}.attn1", block.attn1)
        plan_feed_forward(planner, f"{name}.ff", block.ff)
    planner.keep("norm_out", "its modulation is written in the model's own forward")


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    if path(type(block)) != BLOCK:
        planner.keep(name, f"it is a {path(type(block))}, not {BLOCK}")
    elif block.norm_type != "ada_norm_zero" or block.attn2 is not None or block.pos_embed is not None:
        planner.keep(name, "it is not a plain ada_norm_zero block (cross-attention or own positions)")
    elif not plain_layernorm(block.norm1.norm) or not plain_layernorm(block.norm3):
        planner.keep(name, "its norms are not torch's LayerNorm over the last dimension")
    else:
        width = block.norm1.norm.normalized_shape[0]
        low = all(planner.once(reads_low_precision, sublayer, width) for sublayer in (block.attn1, block.ff))
        classes = block.norm1.emb.class_embedder.num_classes
        planner.offer(
            name,
            block,
            FusedBlock if low else FusedBlockInFull,
            "LayerNorm+modulate, gate+residual+LayerNorm+modulate, gate+residual: one pass each",
            lambda dtype: (
                torch.randn(2, 3, width, dtype=dtype),
                None,
                None,
                None,
                torch.tensor([3, 700]),
                None,
                torch.tensor([0, classes - 1]),
            ),
            bypassed=(block.norm1, block.norm1.norm, block.norm3),
            stand_ins={"attn1": StandIn(width), "ff": StandIn(width)},
        )


def _tokens(model: Any) -> int | None:
    return (model.config.sample_size // model.config.patch_size) ** 2


FAMILY = Family(
    name="diffusers_dit",
    describes="diffusers' DiTTransformer2DModel; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has transformer_blocks", lambda m: has(m, "transformer_blocks")),
    ),
    plan=plan,
    blocks="transformer_blocks",
    spread=Spread(gather="proj_out_2", attention="attn1", mlp="ff", tokens=_tokens),
    called_apart=("transformer_blocks.0.norm1.emb",),  # the head takes the first block's
)
