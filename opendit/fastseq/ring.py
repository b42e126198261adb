"""Ring attention: q stays, k and v go round; results are merged by their softmax denominators.

    out, lse ← merge over blocks of (o_i, lse_i) = attention(q, k_i, v_i)
    lse = log Σ_i exp(lse_i), out = Σ_i exp(lse_i − lse)·o_i

With the whole lse and out, a block's own backward gives its share of dq, dk and dv (softmax's Jacobian needs nothing
else): dq adds up here, dk and dv travel on with their block and come home after n steps, summed.

Forward: n − 1 shifts of k and v. Backward: n − 1 of k and v, n of dk and dv. The next block is on the wire while one is
computed. Received per process and sample, forward: 2·l·D·(s−1) numbers. Any number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.fastseq import ops
from opendit.fastseq.method import Pair, SelfAttention, Shape, attention_operations
from opendit.fastseq.ops import Line
from opendit.fastseq.sequence import Sequence
from opendit.fastseq.shards import reals, total_length

# Only torch's flash kernels give a block's lse and take it back; alone they took 1.6 times as long as those that the
# attention backends choose (one H200, 4096 tokens, head_dim 72, forward and backward), merging not counted.
_SLOWER = 0.6


@dataclass(frozen=True)
class Ring:
    name: str = "ring"

    def layout(self, size: int, heads: int) -> int:
        return size

    def extra(self, shape: Shape, size: int) -> float:
        return _SLOWER * attention_operations(shape) / size

    def calls(self, size: int, heads: int) -> tuple[int, int]:
        return size - 1, size

    def received(self, shape: Shape, size: int) -> tuple[float, float]:
        numbers = 2 * shape.tokens / size * shape.width
        forward = numbers * (size - 1) * shape.itemsize
        return forward, forward + numbers * size * max(shape.itemsize, 4)

    def attention(self, x: Tensor, layer: SelfAttention, sequence: Sequence) -> Tensor:
        q, k, v = layer.project(x)
        q, k = layer.normalise(q, k, sequence.line("sp").rank * x.shape[1])
        line = sequence.line("ring")
        counts = reals(total_length(x.shape[1], sequence.size), x.shape[1], line.size)
        out = ring_attention(q.to(v.dtype), k.to(v.dtype), v, layer.pair, line, counts)
        return out.flatten(2)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, pair: Pair, line: Line, counts: tuple[int, ...]) -> Tensor:
    """Attention of q [B, l, H, K] over k and v of all the line's processes: `counts` of each, then padding."""
    out: Tensor = _Ring.apply(q, k, v, pair, line, counts)  # type: ignore[no-untyped-call]
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pair: Pair, line: Line, counts: tuple[int, ...]) -> Tensor:
        ctx.pair, ctx.line, ctx.counts = pair, line, counts
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse: Tensor | None = None
        block = torch.stack((k, v))
        for step in range(line.size):
            following, works = _start(block, line, step)
            here = counts[(line.rank - step) % line.size]
            if here:
                part, part_lse = pair.forward(q, block[0, :, :here], block[1, :, :here])
                out, lse = _merge(out, lse, part, part_lse.to(wide))
            ops.wait(works)
            block = following
        assert lse is not None
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        pair, line, counts = ctx.pair, ctx.line, ctx.counts
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        block = torch.stack((k, v))
        dblock: Tensor | None = None
        for step in range(line.size):
            following, works = _start(block, line, step)
            # Sums that the previous process handed on arrive while this block's share is computed.
            arriving, sums = _start(dblock, line, -1) if dblock is not None else (None, [])
            here = counts[(line.rank - step) % line.size]
            share = torch.zeros(block.shape, dtype=wide, device=q.device)
            if here:
                dq_part, dk, dv = pair.backward(dout, q, block[0, :, :here], block[1, :, :here], out, lse)
                dq += dq_part
                share[0, :, :here] = dk
                share[1, :, :here] = dv
            ops.wait(works)
            ops.wait(sums)
            dblock = share if arriving is None else share.add_(arriving)
            block = following
        assert dblock is not None
        # Here lies the sum for the next process's block, which its owner takes.
        dk, dv = ops.shift(dblock, line).to(k.dtype).unbind(0)
        return dq.to(q.dtype), dk, dv, None, None, None


def _start(block: Tensor, line: Line, step: int) -> tuple[Tensor, list[Any]]:
    """The next block under way, unless this is the last step; under torch.compile it has arrived."""
    if step == line.size - 1:
        return block, []
    if torch.compiler.is_compiling():
        return ops.shift(block, line), []
    return ops.start_shift(block, line)


def _merge(out: Tensor, lse: Tensor | None, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over different keys as one; lse [B, H, L], out [B, L, H, K]."""
    if lse is None:
        return part.to(out.dtype), part_lse
    both = torch.logaddexp(lse, part_lse)
    keep, add = (torch.exp(x - both).transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse))
    return out * keep + part * add, both


METHOD = Ring()
