"""The modules of a Transformer with adaLN-Zero as users' own files have them: DiT's, and those of models made from it.

    block:  x ← x + gate_a · attn(LN(x)·(1 + scale_a) + shift_a)
            x ← x + gate_m · mlp(LN(x)·(1 + scale_m) + shift_m)      shift, scale, gate [B, D] from c
    head:   linear(LN(x)·(1 + scale) + shift)

Shapes: x [B, L, D], c [B, D]. B batch, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import Patched, untouched
from opendit.patch.mlp import plan_mlp
from opendit.patch.planner import Planner, has, parameters_of_forward, plain_layernorm
from opendit.patch.probe import Inputs, StandIn, own_attributes, reads_low_precision
from opendit.patch.registry import Trait
from opendit.patch.rms_norm import NormStandIn, is_rms_norm, plan_rms_norms
from opendit.patch.steps import steps_of

BLOCK_PARTS = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
HEAD_PARTS = {"norm_final", "linear", "adaLN_modulation"}

TRAITS = (
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
        lambda m: all(has(b, *BLOCK_PARTS) for b in m.blocks),
    ),
    Trait(
        "final_layer has norm_final, linear and adaLN_modulation",
        lambda m: has(m.final_layer, *HEAD_PARTS),
    ),
)


class FusedBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    ways = ("parts", "whole")
    is_site = True
    norm1: nn.LayerNorm
    attn: nn.Module
    norm2: nn.LayerNorm
    mlp: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = self._positional(args, kwargs)
        reason = unusual(values, self.norm1, self.norm2)
        if values is None or reason is not None:
            return self._upstream(reason or "other arguments were given", *args, **kwargs)
        x, c = values
        return self._block(x, c, self.adaLN_modulation, self.norm1, self.attn, self.norm2, self.mlp)


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class FusedHead(FusedAdaLN):
    """The final layer with LayerNorm+modulate in one pass."""

    uses = ("layernorm_modulate",)
    is_site = True
    norm_final: nn.LayerNorm
    linear: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = self._positional(args, kwargs)
        reason = unusual(values, self.norm_final)
        if values is None or reason is not None:
            return self._upstream(reason or "other arguments were given", *args, **kwargs)
        x, c = values
        shift, scale = self._looked_up(c, self.adaLN_modulation).chunk(2, dim=1)
        return self.linear(self._modulated(x, self.norm_final, shift, scale))


class FusedHeadInFull(FusedHead):
    """The same for a linear that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class FusedRMSHead(FusedHead):
    """The final layer with RMSNorm+modulate in one pass."""

    uses = ("rmsnorm_modulate",)


class FusedRMSHeadInFull(FusedRMSHead):
    """The same for a linear that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


def unusual(values: tuple[Any, ...] | None, *norms: nn.Module) -> str | None:
    """Why upstream's forward must run instead of the fused one, this time; values: (tokens, condition, …)."""
    if not all(untouched(norm) or is_rms_norm(norm) for norm in norms):
        return "something was put on or in place of its norms"
    if values is not None and (values[1].dim() != 2 or values[1].shape[0] != values[0].shape[0]):
        return "the condition is not one row per sample"
    return None


class AnyDtypeTimesteps(Patched):
    """The timestep embedder; its fp32 sinusoid is cast to the MLP's dtype, so that bf16 weights work."""

    is_site = True
    mlp: nn.Sequential
    frequency_embedding_size: int
    timestep_embedding: Callable[..., torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = self._positional(args, kwargs)
        if values is None or any(value is not False for value in values[1:]):
            return self._upstream("other arguments were given", *args, **kwargs)
        steps = steps_of(self)
        if steps is None:
            return self._embedded(values[0])
        return steps.value(cast(nn.Module, self), values[0], self._embedded, self.mlp)

    def _embedded(self, t: torch.Tensor) -> torch.Tensor:
        sinusoid = self.timestep_embedding(t, self.frequency_embedding_size)
        first: Any = self.mlp[0]
        return self.mlp(sinusoid.to(first.weight.dtype))


def plan_modules(model: Any, planner: Planner, plan_attention: Callable[[Planner, str, Any], object]) -> None:
    """Plans every block, the head and the timestep embedder; what is inside `attn` is the family's own affair."""
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        _plan_block(planner, name, block)
        plan_attention(planner, f"{name}.attn", block.attn)
        plan_mlp(planner, f"{name}.mlp", block.mlp)
    plan_head(planner, model.final_layer)
    plan_timesteps(planner, model.t_embedder)


def plan_timesteps(planner: Planner, embedder: Any) -> None:
    """Plans the timestep embedder of a model in which something else is changed."""
    if not planner.edits or (
        not has(embedder, "mlp", "frequency_embedding_size", "timestep_embedding")
        or parameters_of_forward(embedder)[1:] not in ((), ("use_fp16",))
        or set(own_attributes(embedder)) != {"frequency_embedding_size"}
    ):
        return
    switches = (False,) * (len(parameters_of_forward(embedder)) - 1)
    planner.offer(
        "t_embedder",
        embedder,
        AnyDtypeTimesteps,
        "casts its sinusoid to the weights' dtype",
        lambda dtype: (torch.tensor([0.0, 3.5, 999.0]), *switches),
        dtype=torch.float32,
    )


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    width = block.norm1.normalized_shape[0] if plain_layernorm(block.norm1) else 0
    if set(dict(block.named_children())) != BLOCK_PARTS:
        planner.keep(name, f"its parts are not exactly {', '.join(sorted(BLOCK_PARTS))}")
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
            [tokens_and_condition(3, width), tokens_and_condition(70, width)],
            bypassed=(block.norm1, block.norm2),
            stand_ins={"attn": StandIn(width), "mlp": StandIn(width)},
        )


def tokens_and_condition(length: int, width: int) -> Inputs:
    return lambda dtype: (torch.randn(2, length, width, dtype=dtype), torch.randn(2, width, dtype=dtype))


def plan_head(planner: Planner, head: Any) -> None:
    """Plans the final layer, with torch's LayerNorm or a root mean square norm."""
    parts = set(dict(head.named_children()))
    if parts != HEAD_PARTS or not has(head, "linear.weight") or len(parameters_of_forward(head)) != 2:
        planner.keep("final_layer", f"it is not {', '.join(sorted(HEAD_PARTS))} on (x, c)")
        return
    if own_attributes(head):
        planner.keep("final_layer", f"its forward may read what it stores: {', '.join(own_attributes(head))}")
        return
    width = head.linear.weight.shape[1]
    norm, layer = head.norm_final, plain_layernorm(head.norm_final, width)
    norms = None if layer else plan_rms_norms(planner, {"final_layer.norm_final": norm}, width, "final_layer")
    if not layer and norms is None:
        planner.keep("final_layer", "its norm is neither torch's LayerNorm nor a root mean square norm")
        return
    low = planner.once(reads_low_precision, head.linear, width)
    fused = (FusedHead if low else FusedHeadInFull) if layer else (FusedRMSHead if low else FusedRMSHeadInFull)
    planned = planner.offer(
        "final_layer",
        head,
        fused,
        f"{'LayerNorm' if layer else 'RMSNorm'}+modulate: one pass",
        [tokens_and_condition(3, width), tokens_and_condition(70, width)],
        bypassed=(norm,),
        stand_ins={} if layer else {"norm_final": NormStandIn(norm, width)},
    )
    if planned and norms is not None:
        norms()
