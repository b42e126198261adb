"""USP: Ulysses within rows of processes, ring attention between rows, for more processes than heads allow.

    x [B, l, D] → q, k, v [B, l, H, K] ─ all-to-all in the row ► [B, u·l, h, K] ─ ring over rows ► [B, u·l, h, K]
                                       ─ all-to-all in the row ► [B, l, H, K]

s = u·r processes, u in a row: the largest divisor of s that divides the heads. A row's tokens lie together in the
sequence. With u = s it is Ulysses, with u = 1 ring attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opendit.fastseq.collectives import to_heads, to_tokens
from opendit.fastseq.method import SelfAttention, Shape
from opendit.fastseq.ring import Ring, ring_attention
from opendit.fastseq.sequence import Sequence
from opendit.fastseq.shards import reals, total_length


@dataclass(frozen=True)
class Usp:
    name: str = "usp"

    def layout(self, size: int, heads: int) -> int:
        row = max(u for u in range(1, size + 1) if size % u == 0 and heads % u == 0)
        return size // row

    def extra(self, shape: Shape, size: int) -> float:
        return _BETWEEN_ROWS.extra(shape, size) if self.layout(size, shape.heads) > 1 else 0.0

    def calls(self, size: int, heads: int) -> tuple[int, int]:
        ring = self.layout(size, heads)
        exchanges = 2 if ring < size else 0
        forward, backward = _BETWEEN_ROWS.calls(ring, heads) if ring > 1 else (0, 0)
        return exchanges + forward, exchanges + backward

    def received(self, shape: Shape, size: int) -> tuple[float, float]:
        ring = self.layout(size, shape.heads)
        row = size // ring
        exchanged = 4 * shape.tokens / size * shape.width * (row - 1) / row * shape.itemsize
        if ring == 1:
            return exchanged, exchanged
        # The ring sees rows as its processes, each with its share of the heads.
        forward, backward = _BETWEEN_ROWS.received(shape._replace(width=shape.width // row), ring)
        return exchanged + forward, exchanged + backward

    def attention(self, x: Tensor, layer: SelfAttention, sequence: Sequence) -> Tensor:
        local, ring, row = x.shape[1], sequence.ring, sequence.size // sequence.ring
        total = total_length(local, sequence.size)
        q, k, v = layer.project(x)
        q, k = layer.normalise(q, k, sequence.line("sp").rank * local)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if row > 1:
            # Padding travels with its row: the ring tells by the length what of a block is real.
            q, k, v = to_heads((q, k, v), sequence.line("ulysses"), row * local if ring > 1 else total)
        if ring > 1:
            counts = reals(total, row * local, ring)
            out = ring_attention(q, k, v, layer.pair, sequence.line("ring"), counts)
        else:
            out = layer.attend(q, k, v)
        if row > 1:
            out = to_tokens(out, layer.heads, sequence.line("ulysses"), local)
        return out.flatten(2)


_BETWEEN_ROWS = Ring()
METHOD = Usp()
