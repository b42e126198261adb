"""diffusers' `WanTransformer3DModel`, Wan 2.1 and 2.2, matched by its class.

    (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = scale_shift_table + e       in fp32; e serves all blocks
    x ← x + gate_a · attn1(LN(x)·(1 + scale_a) + shift_a)
    x ← x + attn2(norm2(x), text)                                                      norm2 with weights, or none
    x ← x + gate_m · ffn(LN(x)·(1 + scale_m) + shift_m)

    attn1:  q, k = rotated(RMSNorm(x·W)), normalised over all heads together;  softmax(q·kᵀ/√K)·v
    attn2:  q of the tokens, k and v of the text; where the model takes an image, plus the same q over its tokens

Shapes: x [B, L, D], text [B, Lk, D], e [B, 6, D] or, where every token has a timestep of its own (Wan 2.2 TI2V),
[B, L, 6, D]. B batch, L tokens, D hidden, K head dim. Norms, modulation and gates are computed in fp32 and rounded to
x's dtype. Given fp64 the model itself rounds to fp32 there; fused blocks do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opendit.attention import attend
from opendit.doubles import at_least_float
from opendit.kernels.gate_residual import gate_residual
from opendit.kernels.gate_residual_layernorm_modulate import gate_residual_layernorm_modulate
from opendit.kernels.layernorm_modulate import layernorm_modulate
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import hooked
from opendit.patch.diffusers_parts import comes_as, is_class, path, plan_feed_forward, told_how
from opendit.patch.planner import Planner, has
from opendit.patch.probe import Inputs, StandIn
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.rotated import of_part, rotated
from opendit.patch.spread import OnPart, SpreadAttention, refuse

_HERE = "diffusers.models.transformers.transformer_wan"
_MODEL, _BLOCK, _ATTENTION = (
    f"{_HERE}.{name}" for name in ("WanTransformer3DModel", "WanTransformerBlock", "WanAttention")
)
_PROCESSOR = f"{_HERE}.WanAttnProcessor"
_NORM = "diffusers.models.normalization.FP32LayerNorm"
_TEXT = 512  # tokens of text behind the image's, as upstream has it


class FusedBlock(FusedAdaLN):
    """The block with LayerNorm+modulate, gate+residual+LayerNorm and residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    ways = ("parts",)
    scale_shift_table: Tensor
    norm1: nn.LayerNorm
    attn1: nn.Module
    norm2: nn.LayerNorm | nn.Identity
    attn2: nn.Module
    norm3: nn.LayerNorm
    ffn: nn.Module

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        x = hidden_states
        reason = None
        if x.dim() != 3 or temb.shape != (len(x), 6, x.shape[-1]):
            each = temb.dim() == 4
            reason = "each token has a timestep of its own" if each else "the condition is not six vectors per sample"
        elif not all(_plain_norm(norm) for norm in (self.norm1, self.norm2, self.norm3)):
            reason = "something was put on or in place of its norms"
        if reason is not None:
            if temb.dim() == 4 and self._opendit_sequence is not None:
                refuse("timesteps for each token (Wan 2.2 TI2V) are not spread along with the tokens")
            return self._upstream(reason, hidden_states, encoder_hidden_states, temb, rotary_emb)
        modulation = (self.scale_shift_table + at_least_float(temb)).flatten(1)
        return self._stream_in_parts(x, modulation, encoder_hidden_states, rotary_emb)

    def _in_parts(self, x: Tensor, modulation: Tensor, text: Tensor, rotary: Any) -> Tensor:  # type: ignore[override]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        dtype = x.dtype
        h = layernorm_modulate(
            x, shift_a, scale_a, eps=self.norm1.eps, out_dtype=dtype, backend=self._kernel("layernorm_modulate")
        )
        y = self.attn1(h, None, None, rotary)
        if isinstance(self.norm2, nn.LayerNorm):
            none = torch.zeros_like(gate_a)
            x, h = self._normed(x, y, gate_a, none, none, self.norm2)
        else:
            x = h = self._summed(x, y, gate_a)
        y = self.attn2(h, text, None, None)
        # Added with a gate of one, it shares the pass of the norm.
        x, h = self._normed(x, y, y.new_ones(gate_m.shape), shift_m, scale_m, self.norm3)
        return self._summed(x, self.ffn(h), gate_m)

    def _normed(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """(x + gate·y, its norm, modulated), both in x's dtype."""
        return gate_residual_layernorm_modulate(
            x,
            y,
            gate,
            shift,
            scale,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            out_dtype=x.dtype,
            residual_dtype=x.dtype,
            backend=self._kernel("gate_residual_layernorm_modulate"),
        )

    def _summed(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return gate_residual(x, y, gate, residual_dtype=x.dtype, backend=self._kernel("gate_residual"))


class _Attention:
    """What the two kinds have in common: WanAttention's parts."""

    heads: int
    processor: Any
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    to_out: nn.ModuleList

    def _odd(self, hidden_states: Tensor, mask: Tensor | None, others: dict[str, Any]) -> str | None:
        """Why upstream's own forward must be run, if it must."""
        if path(type(self.processor)) != _PROCESSOR:
            return f"its processor is now {type(self.processor).__name__}"
        if told_how(self.processor):
            return "diffusers was told an attention backend or a parallel layout for it"
        if getattr(self, "fused_projections", False):
            return "its projections were fused (fuse_qkv_projections)"
        if mask is not None or others:
            return "a mask or other arguments were given"
        if hidden_states.dim() != 3:
            return "its input is not [B, L, D]"
        return None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]

    def _out(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out[1](self.to_out[0](x.flatten(2)))
        return out


class RotatedAttention(_Attention, SpreadAttention):
    """WanAttention of the tokens among each other, q, k, v [B, L, H, K] dispatched."""

    uses = ("attention",)
    projections = ("to_q", "to_k", "to_v")
    per_head = ()
    all_heads = "q and k are normalised over all heads together"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        reason = self._odd(hidden_states, attention_mask, kwargs)
        if reason is None and encoder_hidden_states is not None:
            reason = "another sequence was given"
        if reason is not None:
            return self._upstream(reason, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
        spread = self._in_parts_of_a_sequence()
        if rotary_emb is not None and spread:
            local, sp = hidden_states.shape[1], self._opendit_sequence.size
            rotary_emb = of_part(rotary_emb[0], 1, local, sp), of_part(rotary_emb[1], 1, local, sp)

        def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k = (self._rotated(norm(linear(x)), rotary_emb) for norm, linear in self._norms())
            return q, k, self._heads(self.to_v(x))

        if spread:
            return self._out(self._spread(hidden_states, self.heads, project))
        return self._out(attend(*project(hidden_states), backend=self._opendit_attention))

    def _norms(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.norm_q, self.to_q), (self.norm_k, self.to_k)

    def _rotated(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        x = self._heads(x)
        if tables is None:
            return x
        cos, sin = tables[0][..., 0::2], tables[1][..., 1::2]
        return rotated(x, (cos, cos), (sin, sin))


class TextAttention(_Attention, OnPart):
    """WanAttention of the tokens over the text, and over an image's tokens before it where the model has those."""

    uses = ("attention",)
    add_k_proj: nn.Module | None
    add_v_proj: nn.Module | None
    norm_added_k: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        text = encoder_hidden_states
        reason = self._odd(hidden_states, attention_mask, kwargs)
        if reason is None and (text is None or text.dim() != 3 or rotary_emb is not None):
            reason = "it was not given tokens [B, L, D] and another sequence [B, Lk, C], without positions"
        if reason is not None or text is None:
            return self._upstream(
                reason or "", hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
            )
        image = None
        if self.add_k_proj is not None:
            before = text.shape[1] - _TEXT  # counted from the end where there are fewer, as upstream does
            image, text = text[:, :before], text[:, before:]
        q = self._heads(self.norm_q(self.to_q(hidden_states)))
        k, v = self._heads(self.norm_k(self.to_k(text))), self._heads(self.to_v(text))
        out = attend(q, k, v, backend=self._opendit_attention)
        if image is not None:
            assert self.add_k_proj is not None
            assert self.add_v_proj is not None
            k, v = self._heads(self.norm_added_k(self.add_k_proj(image))), self._heads(self.add_v_proj(image))
            out = out + attend(q, k, v, backend=self._opendit_attention)
        return self._out(out)


def _plain_norm(norm: nn.Module) -> bool:
    """Whether it is diffusers' LayerNorm in fp32, or nothing, with nothing put on it."""
    return (type(norm) is nn.Identity or path(type(norm)) == _NORM) and not hooked(norm)


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        if path(type(block)) != _BLOCK:
            planner.keep(name, f"it is a {path(type(block))}, not {_BLOCK}")
            continue
        _plan_block(planner, name, block)
        _plan_attention(planner, f"{name}.attn1", block.attn1, RotatedAttention)
        _plan_attention(planner, f"{name}.attn2", block.attn2, TextAttention)
        plan_feed_forward(planner, f"{name}.ffn", block.ffn)
    planner.keep("norm_out", "its modulation is written in the model's own forward")


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    norms = (block.norm1, block.norm2, block.norm3)
    width = block.scale_shift_table.shape[-1]
    if not all(path(type(norm)) == _NORM or (norm is block.norm2 and type(norm) is nn.Identity) for norm in norms):
        planner.keep(name, "its norms are not diffusers' FP32LayerNorm")
        return

    def inputs(length: int) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            x, text = torch.randn(2, length, width, dtype=dtype), torch.randn(2, 4, width, dtype=dtype)
            return x, text, torch.randn(2, 6, width, dtype=dtype), None

        return make

    what = "LayerNorm+modulate, gate+residual+LayerNorm, residual+LayerNorm+modulate, gate+residual: one pass each"
    stand_ins = {"attn1": _StandIn(width), "attn2": _TextStandIn(width), "ffn": StandIn(width)}
    fused = planner.offer(
        name,
        block,
        FusedBlock,
        what if path(type(block.norm2)) == _NORM else what.replace("+LayerNorm,", ",", 1),
        [inputs(3), inputs(70)],
        bypassed=norms,
        stand_ins=stand_ins,
        keep_doubles=True,
    )
    if fused:
        planner.keep(name, "in parts, not one function: its modulation is a table and what all blocks share")


class _StandIn(StandIn):
    def forward(self, x: Tensor, *others: object) -> Tensor:  # type: ignore[override]
        assert all(other is None for other in others)
        return super().forward(x)


class _TextStandIn(_StandIn):
    def forward(self, x: Tensor, text: Tensor, *others: object) -> Tensor:  # type: ignore[override]
        return super().forward(x + text.tanh().mean(1, keepdim=True), *others)


def _plan_attention(planner: Planner, name: str, attn: Any, mixin: type[OnPart]) -> None:
    if not comes_as(planner, name, attn, _ATTENTION, _PROCESSOR):
        return
    width, other = attn.to_q.in_features, attn.to_k.in_features
    K = attn.to_q.out_features // attn.heads
    image = attn.add_k_proj is not None

    def alone(length: int) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            tables = tuple(torch.randn(1, length, 1, K, dtype=dtype) for _ in range(2))
            return torch.randn(2, length, width, dtype=dtype), None, None, tables

        return make

    def with_text(length: int, others: int) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            return torch.randn(2, length, width, dtype=dtype), torch.randn(2, others, other, dtype=dtype)

        return make

    if mixin is RotatedAttention:
        what, inputs = (
            "q and k, normalised and rotated, and v go to the chosen attention backend",
            [alone(5), alone(133)],
        )
    else:
        what = "q of the tokens and k, v of the text go to the chosen attention backend"
        what += ", and those of the image" if image else ""
        inputs = [with_text(5, _TEXT + 3)] if image else [with_text(5, 3), with_text(3, 70), with_text(133, 4)]
    if planner.offer(name, attn, mixin, what, inputs):
        steps = "norms and rotation" if mixin is RotatedAttention else "norms"
        planner.keep(name, f"its {steps} run as torch's operations; under torch.compile they are fused")


FAMILY = Family(
    name="diffusers_wan",
    describes="diffusers' WanTransformer3DModel, Wan 2.1 and 2.2; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has blocks", lambda m: has(m, "blocks")),
    ),
    plan=plan,
    blocks="blocks",
    spread=Spread(gather="proj_out", attention="attn1", mlp="ffn", cross=("attn2",)),
)
