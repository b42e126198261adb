"""Rotary position embeddings as a module with its table: t → t·cos + turned(t)·sin, for q and for k.

Shapes: t [B, H, N, K], freqs_cos, freqs_sin [N, K]. N tokens, K head dim. turned((a, b)) = (−b, a) for each pair of a
head's elements: neighbours, or elements half a head apart (`opendit/kernels/qk_norm_rope.py`).

The module is handed to every attention, which reads its table. So all that an edit does to it is to say which pairs it
turns; called by itself it runs its own forward.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendit.kernels.qk_norm_rope import turned
from opendit.patch.core import REFERENCE, Patched, hooked, patched_class
from opendit.patch.planner import Planner, parameters_of_forward
from opendit.patch.probe import disagreement, own_attributes

_TABLE = {"freqs_cos", "freqs_sin"}


class Rotation(Patched):
    """Base of what says how a module turns q and k."""

    interleaved: ClassVar[bool]
    freqs_cos: Tensor
    freqs_sin: Tensor

    def forward(self, t: Tensor) -> Tensor:
        return cast(Tensor, type(self)._opendit_base.forward(cast(nn.Module, self), t))

    def tokens(self) -> int:
        return self.freqs_cos.shape[0]

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """cos, sin [count, K] of the tokens from `first` on; zeros for what is padding."""
        cos, sin = self.freqs_cos, self.freqs_sin
        if first == 0 and count == cos.shape[0]:
            return cos, sin
        return _rows(cos, first, count), _rows(sin, first, count)


class Neighbours(Rotation):
    """Pairs (0, 1), (2, 3), …."""

    interleaved = True


class Halves(Rotation):
    """Pairs (0, K/2), (1, K/2 + 1), …."""

    interleaved = False


class NeighboursFormula(Neighbours):
    """What a module that turns neighbours is compared with."""

    def forward(self, t: Tensor) -> Tensor:
        return t * self.freqs_cos + turned(t, self.interleaved) * self.freqs_sin


class HalvesFormula(NeighboursFormula):
    """What a module that turns halves is compared with."""

    interleaved = False


class Table(nn.Module):
    """A table of random rows, to try attention with; it turns what `mixin` says."""

    interleaved: ClassVar[bool]
    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, tokens: int, head_dim: int, mixin: type[Rotation], dtype: torch.dtype) -> None:
        super().__init__()
        for name in sorted(_TABLE):
            self.register_buffer(name, torch.randn(tokens, head_dim, dtype=dtype))
        self.__class__ = patched_class(Table, mixin, REFERENCE)  # type: ignore[assignment]

    def forward(self, t: Tensor) -> Tensor:
        return t * self.freqs_cos + turned(t, self.interleaved) * self.freqs_sin


def rotation(rope: object) -> Rotation | None:
    """`rope` as what was found of it, if nothing was put on it since."""
    if not isinstance(rope, Rotation) or hooked(cast(nn.Module, rope)):
        return None
    made: type = type(rope)
    return rope if rope._opendit_made is made else None


def plan_rotary(planner: Planner, name: str, rope: Any) -> type[Rotation] | None:
    """Which pairs `rope` turns; planned if that is known, else kept with the reason."""
    found = _pairs(rope)
    if isinstance(found, str):
        planner.keep(name, found)
        return None
    planner.edit(name, found, "its table is read by attention, which turns q and k itself")
    return found


def _pairs(rope: Any) -> type[Rotation] | str:
    cos = getattr(rope, "freqs_cos", None)
    if (
        not isinstance(rope, nn.Module)
        or set(dict(rope.named_buffers())) != _TABLE
        or any(True for _ in rope.parameters())
        or own_attributes(rope)
        or len(parameters_of_forward(rope)) != 1
        or not isinstance(cos, Tensor)
        or cos.dim() != 2
        or cos.shape != rope.freqs_sin.shape
        or cos.shape[1] % 2
    ):
        return "it is not a module of one argument with tables freqs_cos and freqs_sin [N, K] and no more"
    if hooked(rope):
        return "hooks or another forward are registered on it"
    inputs = lambda dtype: (torch.randn(1, 2, *cos.shape, dtype=dtype),)  # noqa: E731
    if disagreement(rope, NeighboursFormula, inputs) is None:
        return Neighbours
    return disagreement(rope, HalvesFormula, inputs) or Halves


def _rows(table: Tensor, first: int, count: int) -> Tensor:
    rows = table[min(first, table.shape[0]) : first + count]
    return F.pad(rows, (0, 0, 0, count - rows.shape[0])) if rows.shape[0] < count else rows
