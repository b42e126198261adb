"""facebookresearch/DiT, SiT and fast-DiT: classes that live in users' own files, so structure decides.

    block:  x ← x + gate_a · attn(LN(x)·(1 + scale_a) + shift_a)
            x ← x + gate_m · mlp(LN(x)·(1 + scale_m) + shift_m)      shift, scale, gate [B, D] from c
    head:   linear(LN(x)·(1 + scale) + shift)

Shapes: x [B, L, D], c [B, D], q/k/v [B, L, H, K]. B batch, L tokens, D hidden, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opendit.attention import attend
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import Patched, hooked, untouched
from opendit.patch.mlp import plan_mlp
from opendit.patch.parts import AttentionParts, off, plain_linear
from opendit.patch.planner import Planner, has, parameters_of_forward, plain_layernorm
from opendit.patch.probe import Inputs, StandIn, own_attributes, reads_low_precision
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.spread import SpreadAttention

_BLOCK_PARTS = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
_HEAD_PARTS = {"norm_final", "linear", "adaLN_modulation"}
# What timm's Attention of any version stores on itself; anything else might change what it computes, now or later.
_ATTENTION_ATTRIBUTES = {"num_heads", "head_dim", "attn_dim", "scale", "fused_attn", "gate", "norm"}


class FusedBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    norm1: nn.LayerNorm
    attn: nn.Module
    norm2: nn.LayerNorm
    mlp: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = self._positional(args, kwargs)
        reason = _unusual(values, self.norm1, self.norm2)
        if values is None or reason is not None:
            return self._upstream(reason or "other arguments were given", *args, **kwargs)
        x, c = values
        return self._block(x, c, self.adaLN_modulation, self.norm1, self.attn, self.norm2, self.mlp)


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class DispatchedAttention(SpreadAttention):
    """timm's Attention, old and new, with its q, k, v [B, L, H, K] handed to `opendit.attention`."""

    uses = ("attention",)
    projections = ("qkv",)
    num_heads: int
    training: bool
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Dropout

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(a is not None and a is not False for a in (*args, *kwargs.values())):
            return self._upstream("a mask was given", x, *args, **kwargs)
        if self.training and self.attn_drop.p:
            return self._upstream("dropout active in attention", x)
        if hooked(self.attn_drop):
            return self._upstream("a hook on its attention weights", x)
        if self._opendit_sequence is not None:
            out = self._spread(x, self.num_heads)
        else:
            q, k, v = self._project(x)
            q, k = self._normalise(q, k)
            out = attend(q, k, v, backend=self._opendit_attention).flatten(2)
        return self.proj_drop(self.proj(out))

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def _normalise(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.q_norm(q), self.k_norm(k)) if hasattr(self, "q_norm") else (q, k)  # absent in old timm

    def _parts(self) -> AttentionParts | str:
        if not off(self.attn_drop, self.proj_drop):
            return "dropout active or a hook inside"
        if not all(off(getattr(self, name, None)) for name in ("q_norm", "k_norm")):
            return "it normalises q and k"
        if not plain_linear(self.qkv, self.proj):
            return "its linears are not torch's own, or something was put on them"
        return AttentionParts((self.qkv,), self.proj, self.num_heads, self._opendit_attention)


class FusedHead(FusedAdaLN):
    """The final layer with LayerNorm+modulate in one pass."""

    uses = ("layernorm_modulate",)
    norm_final: nn.LayerNorm
    linear: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = self._positional(args, kwargs)
        reason = _unusual(values, self.norm_final)
        if values is None or reason is not None:
            return self._upstream(reason or "other arguments were given", *args, **kwargs)
        x, c = values
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(self._modulated(x, self.norm_final, shift, scale))


class FusedHeadInFull(FusedHead):
    """The same for a linear that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


def _unusual(values: tuple[Any, ...] | None, *norms: nn.Module) -> str | None:
    """Why upstream's forward must run instead of the fused one, this time."""
    if not untouched(*norms):
        return "something was put on or in place of its norms"
    if values is not None and (values[1].dim() != 2 or values[1].shape[0] != values[0].shape[0]):
        return "the condition is not one row per sample"
    return None


class AnyDtypeTimesteps(Patched):
    """The timestep embedder; its fp32 sinusoid is cast to the MLP's dtype, so that bf16 weights work."""

    mlp: nn.Sequential
    frequency_embedding_size: int
    timestep_embedding: Callable[..., torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = self._positional(args, kwargs)
        if values is None:
            return self._upstream("other arguments were given", *args, **kwargs)
        (t,) = values
        sinusoid = self.timestep_embedding(t, self.frequency_embedding_size)
        first: Any = self.mlp[0]
        return self.mlp(sinusoid.to(first.weight.dtype))


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        _plan_block(planner, name, block)
        _plan_attention(planner, f"{name}.attn", block.attn)
        plan_mlp(planner, f"{name}.mlp", block.mlp)
    _plan_head(planner, model.final_layer)
    if (
        planner.edits
        and has(model, "t_embedder.mlp", "t_embedder.frequency_embedding_size", "t_embedder.timestep_embedding")
        and len(parameters_of_forward(model.t_embedder)) == 1
        and set(own_attributes(model.t_embedder)) == {"frequency_embedding_size"}
    ):
        planner.offer(
            "t_embedder",
            model.t_embedder,
            AnyDtypeTimesteps,
            "casts its sinusoid to the weights' dtype",
            lambda dtype: (torch.tensor([0.0, 3.5, 999.0]),),
            dtype=torch.float32,
        )


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    width = block.norm1.normalized_shape[0] if plain_layernorm(block.norm1) else 0
    if set(dict(block.named_children())) != _BLOCK_PARTS:
        planner.keep(name, f"its parts are not exactly {', '.join(sorted(_BLOCK_PARTS))}")
    elif not width or not plain_layernorm(block.norm2, width):
        planner.keep(name, "its norms are not torch's LayerNorm over one same dimension")
    elif len(parameters_of_forward(block)) != 2:
        planner.keep(name, f"its forward takes ({', '.join(parameters_of_forward(block))}), not tokens and condition")
    elif own_attributes(block):
        planner.keep(name, f"its forward may read what it stores: {', '.join(own_attributes(block))}")
    else:
        low = all(planner.once(reads_low_precision, sublayer, width) for sublayer in (block.attn, block.mlp))
        planner.offer(
            name,
            block,
            FusedBlock if low else FusedBlockInFull,
            "LayerNorm+modulate, gate+residual+LayerNorm+modulate, gate+residual: one pass each",
            [_tokens_and_condition(3, width), _tokens_and_condition(70, width)],
            bypassed=(block.norm1, block.norm2),
            stand_ins={"attn": StandIn(width), "mlp": StandIn(width)},
        )


def _tokens_and_condition(length: int, width: int) -> Inputs:
    return lambda dtype: (torch.randn(2, length, width, dtype=dtype), torch.randn(2, width, dtype=dtype))


def _plan_attention(planner: Planner, name: str, attn: Any) -> None:
    dropout = getattr(getattr(attn, "attn_drop", None), "p", None)
    unknown = set(own_attributes(attn)) - _ATTENTION_ATTRIBUTES
    if not has(attn, "num_heads", "qkv.weight", "proj", "attn_drop", "proj_drop"):
        planner.keep(name, "it is not built like timm's Attention (num_heads, qkv, attn_drop, proj, proj_drop)")
    elif dropout is None or dropout > 0:
        planner.keep(name, f"dropout active in attention (p={dropout})")
    elif getattr(attn, "gate", None) is not None:
        planner.keep(name, "it gates its output")
    elif not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        planner.keep(name, "it normalises its output")
    elif unknown:
        planner.keep(name, f"its forward may read what it stores: {', '.join(sorted(unknown))}")
    else:
        width = attn.qkv.weight.shape[1]
        planner.offer(
            name,
            attn,
            DispatchedAttention,
            "q, k, v go to the chosen attention backend",
            [
                lambda dtype: (torch.randn(2, 5, width, dtype=dtype),),
                lambda dtype: (torch.randn(1, 133, width, dtype=dtype),),
            ],
            bypassed=(attn.attn_drop,),
        )


def _plan_head(planner: Planner, head: Any) -> None:
    parts = set(dict(head.named_children()))
    if parts != _HEAD_PARTS or not plain_layernorm(head.norm_final) or len(parameters_of_forward(head)) != 2:
        planner.keep("final_layer", f"it is not {', '.join(sorted(_HEAD_PARTS))} with torch's LayerNorm on (x, c)")
        return
    if own_attributes(head):
        planner.keep("final_layer", f"its forward may read what it stores: {', '.join(own_attributes(head))}")
        return
    width = head.norm_final.normalized_shape[0]
    planner.offer(
        "final_layer",
        head,
        FusedHead if planner.once(reads_low_precision, head.linear, width) else FusedHeadInFull,
        "LayerNorm+modulate: one pass",
        [_tokens_and_condition(3, width), _tokens_and_condition(70, width)],
        bypassed=(head.norm_final,),
    )


def _tokens(model: Any) -> int | None:
    positions = getattr(model, "pos_embed", None)
    return positions.shape[-2] if isinstance(positions, torch.Tensor) and positions.dim() > 1 else None


FAMILY = Family(
    name="dit",
    describes="facebookresearch/DiT, SiT, fast-DiT; recognised by structure",
    traits=(
        Trait(
            "it has x_embedder, t_embedder, blocks and final_layer",
            lambda m: has(m, "x_embedder", "t_embedder", "blocks", "final_layer"),
        ),
        Trait(
            "blocks is a ModuleList that is not empty",
            lambda m: isinstance(m.blocks, nn.ModuleList) and len(m.blocks) > 0,
        ),
        Trait(
            "every block has norm1, attn, norm2, mlp and adaLN_modulation",
            lambda m: all(has(b, *_BLOCK_PARTS) for b in m.blocks),
        ),
        Trait(
            "final_layer has norm_final, linear and adaLN_modulation",
            lambda m: has(m.final_layer, *_HEAD_PARTS),
        ),
        Trait("it has no temp_embed (that would be Latte)", lambda m: not hasattr(m, "temp_embed")),
    ),
    plan=plan,
    blocks="blocks",
    spread=Spread(gather="final_layer", attention="attn", mlp="mlp", tokens=_tokens),
)
