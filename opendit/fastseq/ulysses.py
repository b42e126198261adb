"""Ulysses: q, k, v of the local tokens exchanged for all tokens of local heads, and the output back.

    x [B, l, D] → q, k, v [B, l, H, K] ─ all-to-all ► [B, L, h, K] → attention → ─ all-to-all ► [B, l, H, K]

Two collectives a layer: q, k and v travel in one. Received per process and sample: 4·l·D·(s−1)/s numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opendit.fastseq.collectives import to_heads, to_tokens
from opendit.fastseq.method import SelfAttention, Shape, uneven_heads
from opendit.fastseq.sequence import Sequence
from opendit.fastseq.shards import total_length


@dataclass(frozen=True)
class Ulysses:
    name: str = "ulysses"

    def layout(self, size: int, heads: int) -> int:
        return 1

    def extra(self, shape: Shape, size: int) -> float:
        return uneven_heads(shape, size)

    def calls(self, size: int, heads: int) -> tuple[int, int]:
        return 2, 2

    def received(self, shape: Shape, size: int) -> tuple[float, float]:
        once = 4 * shape.tokens / size * shape.width * (size - 1) / size * shape.itemsize
        return once, once

    def attention(self, x: Tensor, layer: SelfAttention, sequence: Sequence) -> Tensor:
        line, local = sequence.line("sp"), x.shape[1]
        q, k, v = layer.project(x)
        q, k = layer.normalise(q, k, line.rank * local)
        # Norms may run in fp32 under autocast; what is sent is what attention reads.
        q, k = q.to(v.dtype), k.to(v.dtype)
        q, k, v = to_heads((q, k, v), line, total_length(local, sequence.size))
        out = layer.attend(q, k, v)
        return to_tokens(out, layer.heads, line, local).flatten(2)


METHOD = Ulysses()
