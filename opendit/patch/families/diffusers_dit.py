"""diffusers' `DiTTransformer2DModel`, matched by its class.

Its blocks are `BasicTransformerBlock`s with `ada_norm_zero`: each owns timestep and label embeddings, so each
draws its own label drop in training, and norm3 (before the feed-forward) has its own eps and affine:

    x ← x + gate_a · attn1(LN(x)·(1 + scale_a) + shift_a)
    x ← x + gate_m · ff(norm3(x)·(1 + scale_m) + shift_m)      shift, scale, gate [B, D] from norm1.emb

Shapes: x [B, L, D], q/k/v [B, L, H, K]. B batch, L tokens, D hidden, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from opendit.attention import attend
from opendit.kernels.gelu import APPROXIMATIONS, gelu
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import hooked, untouched
from opendit.patch.mlp import tokens
from opendit.patch.parts import AttentionParts, MlpParts, Sublayer, off, plain_linear
from opendit.patch.planner import Planner, has, plain_layernorm
from opendit.patch.probe import StandIn, reads_low_precision
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.spread import SpreadAttention

_MODEL = "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel"
_BLOCK = "diffusers.models.attention.BasicTransformerBlock"
_ATTENTION = "diffusers.models.attention_processor.Attention"
_PROCESSOR = "diffusers.models.attention_processor.AttnProcessor2_0"
_FEED_FORWARD = "diffusers.models.attention.FeedForward"
_GELU = "diffusers.models.activations.GELU"


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class FusedBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
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
        c = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        ada = (self.norm1.silu, self.norm1.linear)
        return self._block(x, c, ada, self.norm1.norm, self.attn1, self.norm3, self.ff)


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class DispatchedAttention(SpreadAttention):
    """diffusers' Attention as its default processor computes it, with q, k, v [B, L, H, K] dispatched."""

    uses = ("attention",)
    projections = ("to_q", "to_k", "to_v")
    heads: int
    processor: object
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    rescale_output_factor: float

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if _path(type(self.processor)) != _PROCESSOR:
            reason = f"its processor is now {type(self.processor).__name__}"
        elif attention_mask is not None or encoder_hidden_states is not None or kwargs:
            reason = "a mask or other arguments were given"
        elif hidden_states.dim() != 3:
            reason = "its input is not [B, L, D]"
        else:
            if self._opendit_sequence is not None:
                out = self._spread(hidden_states, self.heads)
            else:
                out = attend(*self._project(hidden_states), backend=self._opendit_attention).flatten(2)
            return self.to_out[1](self.to_out[0](out)) / self.rescale_output_factor
        return self._upstream(reason, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (projection(x).unflatten(-1, (self.heads, -1)) for projection in (self.to_q, self.to_k, self.to_v))
        return q, k, v

    def _parts(self) -> AttentionParts | str:
        projections = tuple(m for m in (self.to_q, self.to_k, self.to_v, self.to_out[0]) if isinstance(m, nn.Linear))
        if _path(type(self.processor)) != _PROCESSOR:
            return f"its processor is now {type(self.processor).__name__}"
        if len(projections) != 4 or not plain_linear(*projections):
            return "its linears are not torch's own, or something was put on them"
        if not off(self.to_out[1]) or self.rescale_output_factor != 1.0:
            return "dropout or a factor on its output"
        return AttentionParts(projections[:3], projections[3], self.heads, self._opendit_attention)


class FusedFeedForward(Sublayer):
    """diffusers' FeedForward (net: GELU with its projection, dropout, linear), the GELU in one pass each way."""

    uses = ("gelu",)
    net: nn.ModuleList

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not off(*self.net[1:-1]) or hooked(self.net[0]) or hidden_states.dim() != 3:
            return self._upstream("other arguments, dropout or a hook inside", hidden_states, *args, **kwargs)
        first: Any = self.net[0]
        h = gelu(first.proj(hidden_states), approximate=first.approximate, backend=self._kernel("gelu"))
        return self.net[-1](h)

    def _parts(self) -> MlpParts | str:
        first, last = cast(Any, self.net[0]), self.net[-1]
        if not off(*self.net[1:-1]) or hooked(first):
            return "dropout active or a hook inside"
        if not isinstance(last, nn.Linear) or not plain_linear(first.proj, last):
            return "its linears are not torch's own, or something was put on them"
        return MlpParts(first.proj, last, first.approximate == "tanh")


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}"
        _plan_block(planner, name, block)
        _plan_attention(planner, f"{name}.attn1", block.attn1)
        _plan_feed_forward(planner, f"{name}.ff", block.ff)
    planner.keep("norm_out", "its modulation is written in the model's own forward")


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    if _path(type(block)) != _BLOCK:
        planner.keep(name, f"it is a {_path(type(block))}, not {_BLOCK}")
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


def _plan_attention(planner: Planner, name: str, attn: Any) -> None:
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    present = [extra for extra in extras if getattr(attn, extra, None) is not None]
    if _path(type(attn)) != _ATTENTION:
        planner.keep(name, f"it is a {_path(type(attn))}, not {_ATTENTION}")
    elif _path(type(attn.processor)) != _PROCESSOR:
        planner.keep(name, f"its processor is {type(attn.processor).__name__}")
    elif present or attn.residual_connection:
        planner.keep(name, f"it has {', '.join(present) or 'a residual connection'}")
    else:
        width = attn.to_q.weight.shape[1]
        planner.offer(
            name,
            attn,
            DispatchedAttention,
            "q, k, v go to the chosen attention backend",
            [
                lambda dtype: (torch.randn(2, 5, width, dtype=dtype),),
                lambda dtype: (torch.randn(1, 133, width, dtype=dtype),),
            ],
        )


def _plan_feed_forward(planner: Planner, name: str, ff: Any) -> None:
    if _path(type(ff)) != _FEED_FORWARD or _path(type(ff.net[0])) != _GELU:
        planner.keep(name, f"it is a {_path(type(ff))} beginning with {_path(type(ff.net[0]))}, not a GELU's")
    elif ff.net[0].approximate not in APPROXIMATIONS or len(ff.net) != 3:
        planner.keep(name, "it is not projection, GELU, dropout and linear")
    else:
        width = ff.net[0].proj.weight.shape[1]
        planner.offer(name, ff, FusedFeedForward, "GELU: one pass", tokens(width), bypassed=(ff.net[0],))


def _tokens(model: Any) -> int | None:
    return (model.config.sample_size // model.config.patch_size) ** 2


FAMILY = Family(
    name="diffusers_dit",
    describes="diffusers' DiTTransformer2DModel; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: any(_path(c) == _MODEL for c in type(m).__mro__)),
        Trait("it has transformer_blocks", lambda m: has(m, "transformer_blocks")),
    ),
    plan=plan,
    blocks="transformer_blocks",
    spread=Spread(gather="proj_out_2", attention="attn1", mlp="ff", tokens=_tokens),
    called_apart=("transformer_blocks.0.norm1.emb",),  # the head takes the first block's
)
