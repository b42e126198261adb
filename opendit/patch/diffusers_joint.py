"""Blocks of two streams, as diffusers' SD3 and Flux have them (MM-DiT): image and text, modulated each for itself.

    image, text:  h ← LN(x)·(1 + scale_a) + shift_a                                      (of each)
                  y_image, y_text ← attention among the tokens of both
    image, text:  x ← x + gate_a · y;   x ← x + gate_m · ff(LN(x)·(1 + scale_m) + shift_m)    (of each)

    (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = linear(SiLU(c)), a linear for each stream
    attention: q, k, v [B, L, H, K] by projections of each stream's own, normalised each, concatenated, cut apart again

Shapes: image x [B, L, D], text x [B, Lt, D], c [B, D], shift, scale, gate [B, D]. B batch, L and Lt tokens, D hidden, H
heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from opendit.attention import attend
from opendit.kernels.gate_residual import gate_residual
from opendit.kernels.gate_residual_layernorm_modulate import gate_residual_layernorm_modulate
from opendit.patch.adaln import FusedAdaLN
from opendit.patch.core import hooked, untouched
from opendit.patch.diffusers_parts import path
from opendit.patch.planner import Planner, plain_layernorm
from opendit.patch.spread import SpreadAttention

ZERO = "diffusers.models.normalization.AdaLayerNormZero"
CONTINUOUS = "diffusers.models.normalization.AdaLayerNormContinuous"

Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v [B, L, H, K]


class Modulation(NamedTuple):
    """What a condition makes of a stream: six of [B, D]."""

    shift_a: Tensor
    scale_a: Tensor
    gate_a: Tensor
    shift_m: Tensor
    scale_m: Tensor
    gate_m: Tensor


class TwoStreams(FusedAdaLN):
    """Base of block mixins: a stream's two halves, with the norms of `AdaLayerNormZero`."""

    ways = ("parts",)

    def _begun(self, x: Tensor, norm: Any, c: Tensor) -> tuple[Tensor, Modulation]:
        """What attention is given of a stream, and the stream's modulation."""
        modulation = Modulation(*norm.linear(norm.silu(c)).chunk(6, dim=1))
        return self._modulated(x, norm.norm, modulation.shift_a, modulation.scale_a), modulation

    def _ended(
        self, x: Tensor, y: Tensor, modulation: Modulation, norm: nn.LayerNorm, ff: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The stream after its attention's output `y` and its feed-forward."""
        x, h = gate_residual_layernorm_modulate(
            x,
            y,
            modulation.gate_a,
            modulation.shift_m,
            modulation.scale_m,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            out_dtype=self._sublayer_dtype(x),
            backend=self._kernel("gate_residual_layernorm_modulate"),
        )
        return gate_residual(x, ff(h), modulation.gate_m, backend=self._kernel("gate_residual"))


def changed(norms: Sequence[tuple[Any, str]], *plain: Any) -> bool:
    """Whether something was put on, or in place of, adaptive norms (each with its class's path) or plain ones."""
    return any(path(type(n)) != kind or hooked(n) or hooked(n.silu) or not untouched(n.norm) for n, kind in norms) or (
        not untouched(*plain)
    )


def unusual(image: Tensor, text: Tensor, c: Tensor) -> bool:
    """Whether these are not two streams [B, L, D] and a condition [B, D]."""
    return image.dim() != 3 or text.dim() != 3 or c.dim() != 2 or not len(image) == len(text) == len(c)


class FusedContinuous(FusedAdaLN):
    """`AdaLayerNormContinuous`, LN(x)·(1 + scale) + shift: one pass. Its output is of upstream's dtype."""

    uses = ("layernorm_modulate",)
    casts_for_linear = False
    silu: nn.Module
    linear: nn.Module
    norm: nn.LayerNorm

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        c = conditioning_embedding
        if not untouched(self.norm):
            return self._upstream("something was put on or in place of its norm", x, c)
        if x.dim() != 3 or c.dim() != 2 or len(x) != len(c):
            return self._upstream("the condition is not one row per sample", x, c)
        scale, shift = self.linear(self.silu(c).to(x.dtype)).chunk(2, dim=1)
        return self._modulated(x, self.norm, shift, scale)


class JointAttention(SpreadAttention):
    """Base of attention among image and text tokens: projections of each, one attention, projections of each."""

    uses = ("attention",)
    projections = ("to_q", "to_k", "to_v")
    per_head = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    # Where text stands in the sequence that attention sees: rounding is upstream's then.
    text_first: ClassVar[bool]
    heads: int

    def _projected(self, x: Tensor, names: tuple[str, str, str], norms: tuple[str, str]) -> Heads:
        """q, k, v of one stream by the modules of these names, q and k normalised."""
        q, k, v = (getattr(self, name)(x).unflatten(-1, self._head_shape()) for name in names)
        norm_q, norm_k = (getattr(self, name, None) for name in norms)
        return (norm_q(q) if norm_q is not None else q), (norm_k(k) if norm_k is not None else k), v

    def _head_shape(self) -> tuple[int, int]:
        return self.heads, -1

    def _image(self, x: Tensor) -> Heads:
        return self._projected(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))

    def _text(self, x: Tensor) -> Heads:
        return self._projected(x, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))

    def _in_order(self, image: Any, text: Any) -> tuple[Any, Any]:
        return (text, image) if self.text_first else (image, text)

    def _joined(self, image: Heads, text: Heads) -> Heads:
        q, k, v = (torch.cat(pair, 1) for pair in zip(*self._in_order(image, text), strict=True))
        return q, k, v

    def _among(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """[B, L, H, K] → [B, L, H·K], in q's dtype, which norms may have widened under autocast.

        `lengths`: of image and text as they stand in L.
        """
        if self._in_parts_of_a_sequence():
            out = self._spread_jointly(q, k, v, lengths)
        else:
            out = attend(q, k, v, backend=self._opendit_attention).flatten(2)
        return out.to(q.dtype)

    def _apart(self, out: Tensor, image: int) -> tuple[Tensor, Tensor]:
        """What belongs to image (`image` tokens) and to text."""
        sizes = self._in_order(image, out.shape[1] - image)
        image_out, text_out = self._in_order(*out.split(sizes, 1))  # type: ignore[no-untyped-call]
        return image_out, text_out

    def _parts(self) -> str:
        return "image and text have projections of their own"


class JointStandIn(nn.Module):
    """Takes a joint attention's place: each stream's output depends on both, and on positions where there are any."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.added = nn.Parameter(torch.empty(width, width))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        x = hidden_states @ self.weight
        if image_rotary_emb is not None:
            x = x + sum(rows.sum() for rows in image_rotary_emb)
        if encoder_hidden_states is None:
            return torch.tanh(x)
        text = encoder_hidden_states @ self.added
        return torch.tanh(x + text.mean(1, keepdim=True)), torch.tanh(text - x.mean(1, keepdim=True))


def plan_continuous(planner: Planner, name: str, norm: Any) -> None:
    """Offers `FusedContinuous` for an `AdaLayerNormContinuous`, or says why not."""
    if path(type(norm)) != CONTINUOUS:
        planner.keep(name, f"it is a {path(type(norm))}, not {CONTINUOUS}")
        return
    if not plain_layernorm(norm.norm):
        planner.keep(name, f"it is a {CONTINUOUS} of {path(type(norm.norm))}, not of torch's LayerNorm")
        return
    width, condition = norm.norm.normalized_shape[0], norm.linear.weight.shape[1]
    planner.offer(
        name,
        norm,
        FusedContinuous,
        "LayerNorm+modulate: one pass",
        lambda dtype: (torch.randn(2, 3, width, dtype=dtype), torch.randn(2, condition, dtype=dtype)),
        bypassed=(norm.norm,),
    )
