"""What a model needs to know about its sequence parallelism: constants only.

It is part of the made classes of a model's modules, so that copies and pickles carry it; groups are looked up by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opendit.fastseq.ops import Line


@dataclass(frozen=True)
class Sequence:
    """How a sequence is spread.

    Attributes:
        method: the name of one of `methods()`, or "switch".
        size: how many processes share a sequence.
        ring: how many blocks K and V are passed around in; size / ring processes exchange heads.
        overlap: whether `fastseq` computes on one part while the next is on the wire; None: by size.
        regather: whether `fastseq` gathers its input again in the backward, instead of keeping it.
        tokens: of a frame, where layouts are switched between blocks ("switch") and attention sees whole sequences.
        reasons: the choice and its numbers, in words, for `explain`.
    """

    method: str
    size: int
    ring: int = 1
    overlap: bool | None = None
    regather: bool = False
    tokens: int | None = None
    reasons: tuple[str, ...] = field(default=(), compare=False)

    @property
    def in_attention(self) -> bool:
        """Whether attention is given a part of its sequence."""
        return self.tokens is None

    def line(self, axis: str) -> Line:
        return Line(self.size, self.ring, axis)
