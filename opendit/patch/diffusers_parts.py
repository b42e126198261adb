"""The modules that diffusers' transformers are made of, matched by their classes.

    Attention:    softmax(q·kᵀ/√K + mask)·v, then to_out; q from x, k and v from x or from another sequence
    FeedForward:  linear(GELU(proj(x)))

Shapes: x [B, L, D], q/k/v [B, L, H, K], mask [B, Lk] or [B, 1, Lk], added. B batch, L tokens, D hidden, H heads, K head
dim, Lk tokens of the other sequence.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from opendit.attention import attend
from opendit.kernels.gelu import APPROXIMATIONS, gelu
from opendit.patch.core import autocast_dtype, hooked
from opendit.patch.mlp import tokens
from opendit.patch.parts import AttentionParts, MlpParts, Sublayer, off, plain_linear
from opendit.patch.planner import Planner
from opendit.patch.probe import Inputs
from opendit.patch.spread import OnPart, SpreadAttention

BLOCK = "diffusers.models.attention.BasicTransformerBlock"
ATTENTION = "diffusers.models.attention_processor.Attention"
PROCESSOR = "diffusers.models.attention_processor.AttnProcessor2_0"
FEED_FORWARD = "diffusers.models.attention.FeedForward"
GELU = "diffusers.models.activations.GELU"


def path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_class(model: object, name: str) -> bool:
    """Whether `model` is of the class with that import path, or of one made from it."""
    return any(path(c) == name for c in type(model).__mro__)


def told_how(processor: object) -> bool:
    """Whether diffusers is to compute an attention with a backend or a parallel layout that someone chose.

    A processor without a backend of its own takes diffusers' active one, which holds for every model: that of
    `attention_backend(...)`, of the last `set_attention_backend`, or of DIFFUSERS_ATTN_BACKEND.
    """
    if any(getattr(processor, name, None) is not None for name in ("_attention_backend", "_parallel_config")):
        return True
    if not hasattr(processor, "_attention_backend"):  # it calls torch itself
        return False
    from diffusers.models import attention_dispatch

    active: Any = attention_dispatch._AttentionBackendRegistry._active_backend
    return bool(active != attention_dispatch.AttentionBackendName.NATIVE)


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
        if path(type(self.processor)) != PROCESSOR:
            reason = f"its processor is now {type(self.processor).__name__}"
        elif attention_mask is not None or encoder_hidden_states is not None or kwargs:
            reason = "a mask or other arguments were given"
        elif hidden_states.dim() != 3:
            reason = "its input is not [B, L, D]"
        else:
            if self._in_parts_of_a_sequence():
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
        if path(type(self.processor)) != PROCESSOR:
            return f"its processor is now {type(self.processor).__name__}"
        if len(projections) != 4 or not plain_linear(*projections):
            return "its linears are not torch's own, or something was put on them"
        if not off(self.to_out[1]) or self.rescale_output_factor != 1.0:
            return "dropout or a factor on its output"
        return AttentionParts(projections[:3], projections[3], self.heads, self._opendit_attention)


class CrossAttention(OnPart):
    """The same with k and v from another sequence [B, Lk, C], which may be masked."""

    uses = ("attention",)
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
        if path(type(self.processor)) != PROCESSOR:
            reason = f"its processor is now {type(self.processor).__name__}"
        elif kwargs:
            reason = "other arguments were given"
        elif encoder_hidden_states is None or hidden_states.dim() != 3 or encoder_hidden_states.dim() != 3:
            reason = "it was not given tokens [B, L, D] and another sequence [B, Lk, C]"
        elif len(hidden_states) != len(encoder_hidden_states):
            reason = "its two sequences are not of one batch"
        else:
            mask = self._mask(attention_mask, encoder_hidden_states)
            if not isinstance(mask, str):
                q = self.to_q(hidden_states).unflatten(-1, (self.heads, -1))
                k = self.to_k(encoder_hidden_states).unflatten(-1, (self.heads, -1))
                v = self.to_v(encoder_hidden_states).unflatten(-1, (self.heads, -1))
                if mask is None or mask.dtype in (torch.bool, q.dtype) or autocast_dtype(q) is not None:
                    out = attend(q, k, v, mask=mask, backend=self._opendit_attention).flatten(2)
                    return self.to_out[1](self.to_out[0](out)) / self.rescale_output_factor
                mask = f"its mask is {mask.dtype} beside {q.dtype}"
            reason = mask
        return self._upstream(reason, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def _mask(self, mask: torch.Tensor | None, others: torch.Tensor) -> torch.Tensor | str | None:
        """What upstream's `prepare_attention_mask` makes of it, without a copy for every head: [B, 1 or H, Lq, Lk]."""
        if mask is None:
            return None
        B, Lk = others.shape[:2]
        if mask.dim() not in (2, 3) or mask.shape[-1] != Lk or len(mask) not in (B, B * self.heads):
            return f"its mask is {list(mask.shape)}"
        return mask.reshape(B, len(mask) // B, -1, Lk)


class FusedFeedForward(Sublayer):
    """diffusers' FeedForward (GELU with its projection, dropout, linear, often dropout), the GELU in one pass."""

    uses = ("gelu",)
    net: nn.ModuleList

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._plain() or hidden_states.dim() != 3:
            reason = "other arguments, dropout, a hook or another activation"
            return self._upstream(reason, hidden_states, *args, **kwargs)
        first: Any = self.net[0]
        h = gelu(first.proj(hidden_states), approximate=first.approximate, backend=self._kernel("gelu"))
        return self.net[2](h)

    def _plain(self) -> bool:
        """Whether nothing stands between its two linears but the GELU."""
        first: Any = self.net[0]
        plain = path(type(first)) == GELU and not hooked(first) and len(self.net) in (3, 4)
        return plain and off(self.net[1], *self.net[3:])

    def _parts(self) -> MlpParts | str:
        first, last = cast(Any, self.net[0]), self.net[2] if len(self.net) > 2 else None
        if not self._plain():
            return "dropout, a hook or another activation"
        if not isinstance(last, nn.Linear) or not plain_linear(first.proj, last):
            return "its linears are not torch's own, or something was put on them"
        return MlpParts(first.proj, last, first.approximate == "tanh")


def plan_attention(planner: Planner, name: str, attn: Any) -> None:
    """Offers `DispatchedAttention` for tokens that attend to each other, or says why not."""
    if _default_attention(planner, name, attn):
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


def plan_cross_attention(planner: Planner, name: str, attn: Any) -> None:
    """Offers `CrossAttention` for tokens that attend to another sequence, or says why not."""
    if not _default_attention(planner, name, attn):
        return
    width, other = attn.to_q.weight.shape[1], attn.to_k.weight.shape[1]

    def inputs(rows: int, length: int, others: int, masked: bool) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            tokens = torch.randn(rows, length, width, dtype=dtype), torch.randn(rows, others, other, dtype=dtype)
            return (*tokens, torch.randn(rows, 1, others, dtype=dtype)) if masked else tokens

        return make

    planner.offer(
        name,
        attn,
        CrossAttention,
        "q of the tokens and k, v of the other sequence, with its mask, go to the chosen attention backend",
        [inputs(2, 5, 3, True), inputs(2, 3, 70, True), inputs(1, 133, 4, False)],
    )


def comes_as(planner: Planner, name: str, attn: Any, cls: str, processor: str) -> bool:
    """Whether an attention is of this class and computed by this processor; otherwise notes why it is left."""
    if path(type(attn)) != cls:
        planner.keep(name, f"it is a {path(type(attn))}, not {cls}")
        return False
    if path(type(attn.processor)) != processor:
        planner.keep(name, f"its processor is {type(attn.processor).__name__}")
        return False
    return True


def _default_attention(planner: Planner, name: str, attn: Any) -> bool:
    """Whether it is diffusers' Attention as it comes by default; otherwise notes why it is left."""
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    present = [extra for extra in extras if getattr(attn, extra, None) is not None]
    if not comes_as(planner, name, attn, ATTENTION, PROCESSOR):
        return False
    if present or attn.residual_connection:
        planner.keep(name, f"it has {', '.join(present) or 'a residual connection'}")
        return False
    return True


def plan_feed_forward(planner: Planner, name: str, ff: Any) -> None:
    if path(type(ff)) != FEED_FORWARD:
        planner.keep(name, f"it is a {path(type(ff))}, not {FEED_FORWARD}")
    elif path(type(ff.net[0])) != GELU:
        planner.keep(name, f"it is a {FEED_FORWARD} beginning with {path(type(ff.net[0]))}, not a GELU's")
    elif ff.net[0].approximate not in APPROXIMATIONS or len(ff.net) not in (3, 4):
        planner.keep(name, "it is not projection, GELU, dropout and linear, with or without another dropout")
    else:
        width = ff.net[0].proj.weight.shape[1]
        planner.offer(name, ff, FusedFeedForward, "GELU: one pass", tokens(width), bypassed=(ff.net[0],))
