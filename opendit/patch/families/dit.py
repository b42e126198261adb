"""facebookresearch/DiT, SiT and fast-DiT: classes that live in users' own files, so structure decides.

    attn:  softmax(q·kᵀ/√K)·v of heads cut from x·Wqkvᵀ + bqkv, then the output projection

Shapes: x [B, L, D], q/k/v [B, L, H, K]. B batch, L tokens, D hidden, H heads, K head dim. Blocks, head and timesteps:
`opendit/patch/adaln_zero.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from opendit.attention import attend
from opendit.patch.adaln_zero import TRAITS, plan_modules
from opendit.patch.core import hooked
from opendit.patch.parts import AttentionParts, off, plain_linear
from opendit.patch.planner import Planner, has
from opendit.patch.probe import Inputs, own_attributes
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.spread import SpreadAttention

# What timm's Attention of any version stores on itself; anything else might change what it computes, now or later.
_ATTENTION_ATTRIBUTES = {"num_heads", "head_dim", "attn_dim", "scale", "fused_attn", "gate", "norm"}


class DispatchedAttention(SpreadAttention):
    """timm's Attention, old and new, with its q, k, v [B, L, H, K] handed to `opendit.attention`."""

    uses: ClassVar[tuple[str, ...]] = ("attention",)
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
            return self._upstream("a mask or another argument was given", x, *args, **kwargs)
        reason = self._unusual()
        if reason is not None:
            return self._upstream(reason, x)
        if self._in_parts_of_a_sequence():
            out = self._spread(x, self.num_heads)
        else:
            q, k, v = self._project(x)
            q, k = self._normalise(q, k)
            out = attend(q, k, v, backend=self._opendit_attention).flatten(2)
        return self.proj_drop(self.proj(out))

    def _unusual(self) -> str | None:
        """Why upstream's forward must run instead, this time."""
        if self.training and self.attn_drop.p:
            return "dropout active in attention"
        if hooked(self.attn_drop):
            return "a hook on its attention weights"
        return self._changed()

    def _changed(self) -> str | None:
        """What was changed since it was planned that only upstream's forward honours."""
        if getattr(self, "gate", None) is not None or not off(getattr(self, "norm", None)):
            return "it gates or normalises its output"
        return None if _scale_is_usual(self) else _OTHER_SCALE

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
        changed = self._changed()
        if changed is not None:
            return changed
        if not plain_linear(self.qkv, self.proj):
            return "its linears are not torch's own, or something was put on them"
        return AttentionParts((self.qkv,), self.proj, self.num_heads, self._opendit_attention)


_OTHER_SCALE = "its scale is not 1/√K"


def _scale_is_usual(attn: Any) -> bool:
    """Whether nobody changed what old timm, and new timm without its fused kernels, multiply q·kᵀ with."""
    scale, width = getattr(attn, "scale", None), getattr(attn.qkv, "out_features", None)
    if scale is None or width is None:
        return True
    K = width // (3 * attn.num_heads)
    return isinstance(scale, (int, float)) and abs(scale * scale * K - 1.0) < 1e-6


def plan(model: Any, planner: Planner) -> None:
    plan_modules(model, planner, plan_attention)


def plan_attention(
    planner: Planner,
    name: str,
    attn: Any,
    mixin: type[DispatchedAttention] = DispatchedAttention,
    stores: frozenset[str] = frozenset(),
    hint: str = "",
    what: str = "q, k, v go to the chosen attention backend",
    more: tuple[Inputs, ...] = (),
    bypassed: tuple[nn.Module, ...] = (),
    stand_ins: Mapping[str, nn.Module] | None = None,
) -> bool:
    """Offers `mixin` for a module built like timm's Attention, or says why not; whether it is planned.

    `stores`: attributes besides timm's that the mixin looks at itself. `hint`: what to add to the probe's reason.
    `what` changes, in words; `more` examples to probe with; `bypassed`, `stand_ins`: see `Planner.offer`.
    """
    dropout = getattr(getattr(attn, "attn_drop", None), "p", None)
    unknown = set(own_attributes(attn)) - _ATTENTION_ATTRIBUTES - stores
    if not has(attn, "num_heads", "qkv.weight", "proj", "attn_drop", "proj_drop"):
        planner.keep(name, "it is not built like timm's Attention (num_heads, qkv, attn_drop, proj, proj_drop)")
    elif dropout is None or dropout > 0:
        planner.keep(name, f"dropout active in attention (p={dropout})")
    elif getattr(attn, "gate", None) is not None:
        planner.keep(name, "it gates its output")
    elif not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        planner.keep(name, "it normalises its output")
    elif not _scale_is_usual(attn):
        planner.keep(name, _OTHER_SCALE)
    elif unknown:
        planner.keep(name, f"its forward may read what it stores: {', '.join(sorted(unknown))}")
    else:
        width = attn.qkv.weight.shape[1]
        return planner.offer(
            name,
            attn,
            mixin,
            what,
            [
                lambda dtype: (torch.randn(2, 5, width, dtype=dtype),),
                lambda dtype: (torch.randn(1, 133, width, dtype=dtype),),
                *more,
            ],
            bypassed=(attn.attn_drop, *bypassed),
            stand_ins=stand_ins,
            hint=hint,
        )
    return False


def tokens(model: Any) -> int | None:
    """How many tokens a model with a table of positions is built for."""
    positions = getattr(model, "pos_embed", None)
    return positions.shape[-2] if isinstance(positions, torch.Tensor) and positions.dim() > 1 else None


FAMILY = Family(
    name="dit",
    describes="facebookresearch/DiT, SiT, fast-DiT; recognised by structure",
    traits=(
        *TRAITS,
        Trait("it has no temp_embed (that would be Latte)", lambda m: not hasattr(m, "temp_embed")),
        Trait("it has no feat_rope (that would be LightningDiT)", lambda m: not hasattr(m, "feat_rope")),
    ),
    plan=plan,
    blocks="blocks",
    spread=Spread(gather="final_layer", attention="attn", mlp="mlp", tokens=tokens),
)
