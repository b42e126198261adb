"""Vchitect/Latte and LatteIMG: classes that live in users' own files, so structure decides.

    for pairs of blocks:  x [B·F, T, D] ← spatial(x, c_s);   x → [B·T, F, D];   x ← x + temp_embed (first pair only)
                          x [B·T, F, D] ← temporal(x, c_t);  x → [B·F, T, D]
    block, head:          as in `opendit/patch/adaln_zero.py`, with c_s [B·F, D], c_t [B·T, D]

B batch, F frames, T tokens of a frame, D hidden. Both kinds of block are of one class and work on rows [rows, L, D]
with a condition each, so the model's forward (pairs, temp_embed, joint training on images) stays the model's own.

It repeats each sample's condition F or T times, and every block computes its modulation on all rows: D·6D products a
row, beside the 12·D² of each of its L tokens, so 1/(2·L) of a block (L=16 frames: 3 %; L=256 tokens: 0.2 %). The
repeated condition is a copy by the time a block sees it, and nothing but its values says which rows are equal (in
LatteIMG not all rows of a sample are). To compare them would wait for the device; to know them takes another forward
of the model, or tensors that remember how they were repeated through whatever the model does with them. So it is left.
With sp_size > 1 each process computes the rows of its own frames and tokens (`opendit/patch/alternating.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from opendit.patch.adaln_zero import TRAITS, plan_modules
from opendit.patch.families.dit import DispatchedAttention, plan_attention
from opendit.patch.parts import AttentionParts
from opendit.patch.planner import Planner, has
from opendit.patch.registry import Alternating, Family, Trait


class MathAttention(DispatchedAttention):
    """Latte's Attention in the mode that writes the matrix of weights [B, H, L, L]."""

    mode: ClassVar[str] = "math"
    attention_mode: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.attention_mode != self.mode:  # the others compute something else, see below
            return self._upstream(f"its attention_mode is now {self.attention_mode!r}", x)
        return super().forward(x)

    def _parts(self) -> AttentionParts | str:
        if self.attention_mode != self.mode:
            return f"its attention_mode is now {self.attention_mode!r}"
        return super()._parts()


class XformersAttention(MathAttention):
    """The same by xformers, in copies where that is what it computes."""

    mode = "xformers"


class FlashAttention(MathAttention):
    """The same by torch's kernels, in copies where that is what it computes."""

    mode = "flash"


_MIXINS = {mixin.mode: mixin for mixin in (MathAttention, XformersAttention, FlashAttention)}
# What upstream's other modes compute, where the probe finds that it is not attention.
_HINTS = {
    "flash": "upstream's 'flash' reads [B, H, L, K] as [B, L, D], so heads and tokens are mixed",
    "xformers": "'xformers' needs GPU kernels, which this check has not; in upstream's LatteIMG it attends among heads",
}


def _plan_attention(planner: Planner, name: str, attn: Any) -> None:
    mode = getattr(attn, "attention_mode", None)
    if isinstance(mode, str) and mode in _MIXINS:
        plan_attention(planner, name, attn, _MIXINS[mode], frozenset({"attention_mode"}), _HINTS.get(mode, ""))
    else:
        planner.keep(name, f"its attention_mode is {mode!r}, not one of {', '.join(_MIXINS)}")


def plan(model: Any, planner: Planner) -> None:
    plan_modules(model, planner, _plan_attention)


FAMILY = Family(
    name="latte",
    describes="Vchitect/Latte, LatteIMG; recognised by structure",
    traits=(
        # First, so that what is nearly a Latte is told what it lacks of one, not that it is no DiT.
        Trait("it has temp_embed", lambda m: has(m, "temp_embed")),
        *TRAITS,
        Trait(
            "it has pos_embed [1, T, D] and temp_embed [1, F, D]",
            lambda m: all(e.dim() == 3 and len(e) == 1 for e in (m.pos_embed, m.temp_embed)),
        ),
        Trait("its blocks come in pairs, spatial and temporal", lambda m: len(m.blocks) % 2 == 0),
    ),
    plan=plan,
    blocks="blocks",
    spread=Alternating(
        gather="final_layer",
        tokens=lambda model: int(model.pos_embed.shape[1]),
        frames=lambda model: int(model.temp_embed.shape[1]),
    ),
)
