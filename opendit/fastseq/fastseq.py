"""FastSeq: the block's input is gathered before it is projected, so that only D numbers a token travel, not 3·D.

    x [B, l, D] ─ all-gather ► [B, L, D] → q, k, v of local heads [B, L, h, K] → attention → ─ all-to-all ► [B, l, H, K]

Two collectives a layer. Received per process and sample: l·D·(s−1)·(1 + 1/s) numbers: less than Ulysses for s = 2. The
weights of local heads are rows of the layer's own parameters, taken as views.

Overlapped, the all-gather is a ring: while one part is projected, the next is on the wire; in the backward, while a
part's dx travels to its owner collecting its sum, the next part's dx and weight gradients are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opendit.fastseq.collectives import to_tokens
from opendit.fastseq.method import SelfAttention, Shape, uneven_heads
from opendit.fastseq.project import Rows, gather_project
from opendit.fastseq.sequence import Sequence
from opendit.fastseq.shards import evenly

# From this many numbers of a part on, a part's projection outlasts the launches that overlapping adds: an assumption
# from launch costs of about 20 µs, to be replaced by a measurement.
_OVERLAP_FROM = 2**21


@dataclass(frozen=True)
class FastSeq:
    name: str = "fastseq"

    def layout(self, size: int, heads: int) -> int:
        return 1

    def extra(self, shape: Shape, size: int) -> float:
        return uneven_heads(shape, size)

    def calls(self, size: int, heads: int) -> tuple[int, int]:
        return 2, 2

    def received(self, shape: Shape, size: int) -> tuple[float, float]:
        once = shape.tokens / size * shape.width * (size - 1) * (1 + 1 / size) * shape.itemsize
        return once, once

    def attention(self, x: Tensor, layer: SelfAttention, sequence: Sequence) -> Tensor:
        projection = layer.projection
        if isinstance(projection, str):
            raise ValueError(
                f"sequence_parallel: 'fastseq' computes q, k, v from rows of the weights, but {projection}; use "
                "'ulysses', 'ring' or 'usp', which call the layer's own modules"
            )
        line, local = sequence.line("sp"), x.shape[1]
        heads = evenly(layer.heads, line.size)
        rows = Rows(layer.heads, sum(heads[: line.rank]), heads[line.rank])
        overlapped, regather = overlaps(x, sequence), sequence.regather
        q, k, v = gather_project(x, projection, rows, line, overlapped=overlapped, regather=regather)
        q, k = layer.normalise(q, k)
        out = layer.attend(q.to(v.dtype), k.to(v.dtype), v)
        return to_tokens(out, layer.heads, line, local).flatten(2)


def overlaps(x: Tensor, sequence: Sequence) -> bool:
    """Whether to compute on one part of x's whole while the next is on the wire."""
    if torch.compiler.is_compiling():
        return False  # an operator of a traced graph can't leave a transfer under way
    return sequence.overlap if sequence.overlap is not None else x.is_cuda and x.numel() >= _OVERLAP_FROM


METHOD = FastSeq()
