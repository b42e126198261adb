"""hustvl/LightningDiT and what is built like it: classes that live in users' own files, so structure decides.

    block:  x ← x + gate_a · attn(norm1(x)·(1 + scale_a) + shift_a, rope)
            x ← x + gate_m · mlp(norm2(x)·(1 + scale_m) + shift_m)
    attn:   q, k ← rope(q_norm(q)), rope(k_norm(k));  softmax(q·kᵀ/√K)·v, then the output projection
    mlp:    w3(SiLU(a)·b), (a, b) = w12(x); or timm's
    head:   linear(norm_final(x)·(1 + scale) + shift)

Shapes: x [B, L, D], q/k/v [B, L, H, K], shift, scale, gate [B, D] from c [B, D]. B batch, L tokens, D hidden, H heads,
K head dim. What may differ from model to model, or from block to block:

    use_rmsnorm   the norms, q's and k's too, are root mean square norms with weights instead of LayerNorms
    use_qknorm    q and k are normalised head by head
    use_rope      they are turned by a table [L, K] that stands in the model, `feat_rope`, which every block is given
    use_swiglu    the MLP is a gated one
    wo_shift      nothing is shifted in blocks: the modulation is scale, gate, scale, gate [B, 4·D]

Upstream puts blocks, MLPs and the head under torch.compile. What is fused here stands in place of those forwards.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendit.attention import attend
from opendit.kernels.qk_norm_rope import qk_norm_rope
from opendit.patch.adaln import BLOCK_KERNELS, RMS_BLOCK_KERNELS, FusedAdaLN
from opendit.patch.adaln_zero import BLOCK_PARTS, TRAITS, plan_head, plan_timesteps, unusual
from opendit.patch.core import hooked, untouched
from opendit.patch.families.dit import DispatchedAttention, plan_attention, tokens
from opendit.patch.mlp import plan_mlp
from opendit.patch.parts import off
from opendit.patch.planner import Planner, has, parameters_of_forward, plain_layernorm
from opendit.patch.probe import Inputs, own_attributes, reads_low_precision
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.rms_norm import NormStandIn, is_rms_norm, must_be_called, plan_rms_norms
from opendit.patch.rotary import Rotation, Table, plan_rotary, rotation


class RotaryAttention(DispatchedAttention):
    """timm's Attention that is given a rotation of q and k, or None."""

    uses: ClassVar[tuple[str, ...]] = ("attention", "qk_norm_rope")

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        reason = self._unusual()
        turns = rotation(rope)
        length, head_dim = self._length(x), self.qkv.weight.shape[0] // (3 * self.num_heads)
        if rope is not None and turns is None:
            reason = "it was given a rotation that was not looked at, or one with a hook"
        elif turns is not None and turns.freqs_cos.shape != (length, head_dim):
            reason = f"a table {list(turns.freqs_cos.shape)} for {length} tokens with heads of {head_dim}"
        if reason is not None:
            return self._upstream(reason, x, rope=rope)
        if self._in_parts_of_a_sequence():
            out = self._spread(x, self.num_heads, normalise=partial(self._normalise_and_turn, turns))
        else:
            q, k, v = self._project(x)
            q, k = self._normalise_and_turn(turns, q, k, 0)
            out = attend(q.to(v.dtype), k.to(v.dtype), v, backend=self._opendit_attention).flatten(2)
        return self.proj_drop(self.proj(out))

    def _normalise_and_turn(self, turns: Rotation | None, q: Tensor, k: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """q, k [B, L, H, K] of the tokens from `first` on, normalised, then turned."""
        norm = self._norm(q)
        affine: dict[str, Any] = {}
        eps = 1e-6
        if norm == "other":
            q, k, norm = self.q_norm(q), self.k_norm(k), None
        elif norm is not None:
            of_q: Any = self.q_norm
            of_k: Any = self.k_norm
            eps, affine = of_q.eps, {"q_weight": of_q.weight, "k_weight": of_k.weight}
            if norm == "layer":
                affine |= {"q_bias": of_q.bias, "k_bias": of_k.bias}
        if norm is None and turns is None:
            return q, k
        cos, sin = turns.rows(first, q.shape[1]) if turns is not None else (None, None)
        return qk_norm_rope(
            *(q, k),
            **affine,
            cos=cos,
            sin=sin,
            norm=norm,
            eps=eps,
            interleaved=turns is None or turns.interleaved,
            backend=self._kernel("qk_norm_rope"),
        )

    def _norm(self, q: Tensor) -> str | None:
        """What the norms of q and k are: "layer", "rms", None, or "other", which must be called."""
        norms = (self.q_norm, self.k_norm)
        if all(off(norm) for norm in norms):
            return None
        if untouched(*norms):
            alike = norms[0].eps == norms[1].eps and norms[0].normalized_shape == norms[1].normalized_shape
            return "layer" if alike and norms[0].normalized_shape == q.shape[3:] else "other"
        called = any(must_be_called(norm, q.dtype) for norm in norms)
        if all(is_rms_norm(norm) for norm in norms) and norms[0].eps == norms[1].eps and not called:
            return "rms"
        return "other"


class PlainAttention(RotaryAttention):
    """The same where q and k are neither normalised nor turned."""

    uses = ("attention",)


class LightningBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    ways: ClassVar[tuple[str, ...]] = ("parts",)
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, x: Tensor, c: Tensor, feat_rope: Any = None) -> Tensor:
        reason = unusual((x, c), self.norm1, self.norm2)
        if reason is not None:
            return self._upstream(reason, x, c, feat_rope)
        if "whole" in self.ways and feat_rope is None and not self._without_shift():
            return self._block(x, c, self.adaLN_modulation, self.norm1, self.attn, self.norm2, self.mlp)  # type: ignore[arg-type]
        attn = partial(self.attn, rope=feat_rope)
        return self._stream_in_parts(x, self.adaLN_modulation(c), self.norm1, attn, self.norm2, self.mlp)

    def _without_shift(self) -> bool:
        return bool(getattr(self, "wo_shift", False))

    def _cut(self, modulation: Tensor) -> tuple[Tensor, ...]:
        if not self._without_shift():
            return super()._cut(modulation)
        scale_a, gate_a, scale_m, gate_m = modulation.chunk(4, dim=1)
        none = torch.zeros_like(scale_a)
        return none, scale_a, gate_a, none, scale_m, gate_m


class LightningBlockInFull(LightningBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class PlainBlock(LightningBlock):
    """The same without rotation, norms of q and k, or a gated MLP: DiT's block, which can be one function."""

    ways = ("parts", "whole")


class RMSBlock(LightningBlock):
    """The block with root mean square norms."""

    uses = RMS_BLOCK_KERNELS


class RMSBlockInFull(RMSBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class AttentionStandIn(nn.Module):
    """x, rope → tanh(x·W), or rope of that: takes attention's place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        y = torch.tanh(x @ self.weight)
        return y if rope is None else rope(y)


class MlpStandIn(AttentionStandIn):
    """x → tanh(x·W): takes the MLP's place."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def plan(model: Any, planner: Planner) -> None:
    turns = plan_rotary(planner, "feat_rope", model.feat_rope) if model.feat_rope is not None else None
    unknown = model.feat_rope is not None and turns is None
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        _plan_block(planner, name, block, rotated=model.feat_rope is not None)
        if unknown:
            planner.keep(f"{name}.attn", "it is given a rotation that is not known, see feat_rope")
        else:
            _plan_attention(planner, f"{name}.attn", block.attn, turns)
        plan_mlp(planner, f"{name}.mlp", block.mlp)
    plan_head(planner, model.final_layer)
    plan_timesteps(planner, model.t_embedder)


def _plan_attention(planner: Planner, name: str, attn: Any, turns: type[Rotation] | None) -> None:
    if parameters_of_forward(attn) != ("x", "rope") or not has(attn, "num_heads", "qkv.weight", "q_norm", "k_norm"):
        planner.keep(name, "it is not built like LightningDiT's (num_heads, qkv, q_norm, k_norm; on x and rope)")
        return
    width, head_dim = attn.qkv.weight.shape[1], attn.qkv.weight.shape[0] // (3 * attn.num_heads)
    more: tuple[Inputs, ...] = ()
    if turns is not None:
        more = (lambda dtype: (torch.randn(2, 6, width, dtype=dtype), Table(6, head_dim, turns, dtype)),)
    norms = {f"{name}.{which}": getattr(attn, which) for which in ("q_norm", "k_norm")}
    done = _of_q_and_k(norms.values(), turns)
    if done and head_dim % 2:
        planner.keep(name, f"its heads are {head_dim} wide, an odd number")
        return
    others = [norm for norm in norms.values() if type(norm) is not nn.Identity and not plain_layernorm(norm)]
    rms = plan_rms_norms(planner, norms, head_dim, "attention") if len(others) == 2 else None
    planned = plan_attention(
        planner,
        name,
        attn,
        RotaryAttention if done else PlainAttention,
        what=f"{done}q, k, v go to the chosen attention backend",
        more=more,
        bypassed=tuple(norm for norm in norms.values() if plain_layernorm(norm) and not hooked(norm)),
        stand_ins={} if rms is None else {n: NormStandIn(getattr(attn, n), head_dim) for n in ("q_norm", "k_norm")},
    )
    if planned and rms is not None:
        rms()


def _of_q_and_k(norms: Any, turns: type[Rotation] | None) -> str:
    done = ["norms"] * any(type(norm) is not nn.Identity for norm in norms) + ["rotation"] * (turns is not None)
    return f"{' and '.join(done)} of q and k: one pass; " if done else ""


def _plan_block(planner: Planner, name: str, block: Any, *, rotated: bool) -> None:
    if set(dict(block.named_children())) != BLOCK_PARTS:
        planner.keep(name, f"its parts are not exactly {', '.join(sorted(BLOCK_PARTS))}")
        return
    if parameters_of_forward(block) != ("x", "c", "feat_rope"):
        planner.keep(name, f"its forward takes ({', '.join(parameters_of_forward(block))}), not (x, c, feat_rope)")
        return
    if not set(own_attributes(block)) <= {"wo_shift"}:
        others = sorted(set(own_attributes(block)) - {"wo_shift"})
        planner.keep(name, f"its forward may read what it stores: {', '.join(others)}")
        return
    width = _width(block)
    layer = all(plain_layernorm(norm, width) for norm in (block.norm1, block.norm2))
    norms = {f"{name}.{which}": getattr(block, which) for which in ("norm1", "norm2")}
    rms = None if layer or not width else plan_rms_norms(planner, norms, width, "its block")
    if not layer and rms is None:
        planner.keep(name, "its norms are neither both torch's LayerNorm nor both root mean square norms, of one width")
        return
    why = _in_parts_because(block, layer, rotated)
    low = all(planner.once(reads_low_precision, sublayer, width) for sublayer in (block.attn, block.mlp))
    if layer:
        mixin = LightningBlockInFull if not low else LightningBlock if why else PlainBlock
    else:
        mixin = RMSBlock if low else RMSBlockInFull
    norm = "LayerNorm" if layer else "RMSNorm"
    stand_ins: dict[str, nn.Module] = {"attn": AttentionStandIn(width), "mlp": MlpStandIn(width)}
    if rms is not None:
        stand_ins |= {which: NormStandIn(getattr(block, which), width) for which in ("norm1", "norm2")}
    fused = planner.offer(
        name,
        block,
        mixin,
        f"{norm}+modulate, gate+residual+{norm}+modulate, gate+residual: one pass each",
        [_arguments(3, width, None), _arguments(70, width, None), _arguments(3, width, torch.sin)],
        bypassed=(block.norm1, block.norm2),
        stand_ins=stand_ins,
    )
    if fused and rms is not None:
        rms()
    if fused and why:
        planner.keep(name, f"in parts, not one function: {why}")


def _in_parts_because(block: Any, layer: bool, rotated: bool) -> str:
    """What keeps the block from being one function, or nothing."""
    normalised = any(type(getattr(block.attn, name, None)) is not nn.Identity for name in ("q_norm", "k_norm"))
    reasons = {
        "its norms are root mean square norms": not layer,
        "q and k are normalised": normalised,
        "q and k are turned": rotated,
        "its MLP is gated": has(block.mlp, "w12"),
        "it has no shifts": bool(getattr(block, "wo_shift", False)),
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def _width(block: Any) -> int:
    """D, or 0 where the first norm does not tell."""
    weight = getattr(block.norm1, "weight", None)
    shape: Any = getattr(block.norm1, "normalized_shape", () if weight is None else weight.shape)
    return int(shape[0]) if len(shape) == 1 else 0


def _arguments(length: int, width: int, rope: Any) -> Inputs:
    return lambda dtype: (torch.randn(2, length, width, dtype=dtype), torch.randn(2, width, dtype=dtype), rope)


FAMILY = Family(
    name="lightningdit",
    describes="hustvl/LightningDiT; recognised by structure",
    traits=(
        # First, so that what is nearly one is told what it lacks, not that it is no DiT.
        Trait("it has feat_rope (a module, or None)", lambda m: hasattr(m, "feat_rope")),
        *TRAITS,
        Trait("it has no temp_embed (that would be Latte)", lambda m: not hasattr(m, "temp_embed")),
    ),
    plan=plan,
    blocks="blocks",
    spread=Spread(gather="final_layer", attention="attn", mlp="mlp", tokens=tokens),
)
