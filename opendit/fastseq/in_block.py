"""Attention over processes without autograd, for a block that writes its own backward.

    ulysses   qkv = h·Wᵀ + b [B, l, 3, H, K] ─ all-to-all ► q, k, v [B, L, n, K] → a [B, L, n, K] ─ all-to-all ► o
    fastseq   h ─ all-gather ► X [B, L, D] → qkv = X·Vᵀ + c [B, L, 3, n, K] → a ─ all-to-all ► o

h [B, l, D] of the local tokens, W [3·H·K, D], b [3·H·K], o [B, l, H·K]; n of the H heads are local, and V, c are their
rows of W and b, laid together: one product instead of three costs a copy of a few MB. In the backward the same ways are
gone the other way round. Ulysses gives dqkv of the local tokens, from which the caller computes dh and dW
as without processes; FastSeq gives dh, dW and db itself, dW and db zero in the rows of others' heads.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch
from torch import Tensor

from opendit.fastseq import ops, project
from opendit.fastseq.collectives import heads_first, in_order, packed_tokens_first, tokens_first
from opendit.fastseq.fastseq import overlaps
from opendit.fastseq.project import Rows
from opendit.fastseq.sequence import Sequence
from opendit.fastseq.shards import evenly, total_length

METHODS = ("fastseq", "ulysses")


class Attend(NamedTuple):
    """Attention of whole sequences, every tensor [B, L, n, K]: forward(q, k, v) gives out and what the backward needs,
    backward(dout, q, k, v, out, what it needs) gives dq, dk, dv; pack(dq, dk, dv, wanted), of [M, n·K] each, gives
    [M, 3, n·K] and, where wanted, its sums over M, in fp32 at least.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Several[Tensor]], tuple[Tensor, Tensor, Tensor]]
    pack: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


class Gradients(NamedTuple):
    """Of FastSeq's projection: dh [B, l, D], and whether they were wanted, dW [3·H·K, D] and db [3·H·K]."""

    dh: Tensor
    weight: Tensor | None
    bias: Tensor | None


def seen(batch: int, local: int, heads: int, head_dim: int, sequence: Sequence) -> tuple[int, int, int, int]:
    """The shape [B, L, n, K] of q, k and v that this process's attention sees."""
    line = sequence.line("sp")
    return batch, total_length(local, sequence.size), evenly(heads, line.size)[line.rank], head_dim


def forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, heads: int, sequence: Sequence, attend: Attend
) -> tuple[Tensor, list[Tensor]]:
    """(o, what the backward needs)."""
    line, (B, local, D) = sequence.line("sp"), h.shape
    length = total_length(local, sequence.size)
    kept: list[Tensor] = []
    if sequence.method == "ulysses":
        tokens = h.reshape(B * local, D)
        qkv = torch.mm(tokens, weight.t()) if bias is None else torch.addmm(bias, tokens, weight.t())
        q, k, v = heads_first(qkv.view(B, local, 3, heads, -1).unbind(2), line, length)
    else:
        rows = _rows(heads, sequence)
        biases = [] if bias is None else [_laid_together(bias, rows)]
        run = project._forward_overlapped if overlaps(h, sequence) else project._forward
        X, (qkv,) = run(h, [_laid_together(weight, rows)], biases, line, length)
        q, k, v = qkv.view(B, length, 3, rows.here, -1).unbind(2)
        kept.append(h if sequence.regather else X)
    a, more = attend.forward(q, k, v)
    return tokens_first((a,), heads, line, local)[0].flatten(2), [*kept, q, k, v, a, *more]


def backward_through_heads(
    do: Tensor, saved: Several[Tensor], heads: int, sequence: Sequence, attend: Attend
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, L, n, K] of the local heads, from do [B, l, H·K] of the local tokens."""
    q, k, v, a, *more = saved
    (da,) = heads_first((do.view(*do.shape[:2], heads, -1),), sequence.line("sp"), q.shape[1])
    return attend.backward(da, q, k, v, a, more)


def ulysses_backward(do: Tensor, saved: Several[Tensor], heads: int, sequence: Sequence, attend: Attend) -> Tensor:
    """dqkv [B, l, 3, H, K] of the local tokens."""
    grads = backward_through_heads(do, saved, heads, sequence, attend)
    return packed_tokens_first(grads, heads, sequence.line("sp"), do.shape[1])


def fastseq_backward(
    do: Tensor,
    saved: Several[Tensor],
    weight: Tensor,
    heads: int,
    sequence: Sequence,
    attend: Attend,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Gradients:
    """The gradients; dweight and dbias are memory for theirs, None where they are not wanted."""
    X, *saved = saved
    line, local = sequence.line("sp"), do.shape[1]
    dq, dk, dv = backward_through_heads(do, saved, heads, sequence, attend)
    B, length = dq.shape[:2]
    dq, dk, dv = (g.reshape(B * length, -1) for g in (dq, dk, dv))
    packed, sums = attend.pack(dq, dk, dv, dbias is not None)
    rows = _rows(heads, sequence)
    # As the forward was, where the size of h decided; o may be wider or narrower.
    overlapped = overlaps(X, sequence) if sequence.regather else X.dim() == 4
    if sequence.regather and not overlapped:
        X = in_order(ops.gather(X, line))[:, :length]
    V = _laid_together(weight, rows)
    dV = None if dweight is None else torch.zeros_like(V, dtype=dweight.dtype)
    run = project._backward_overlapped if overlapped else project._backward
    dh = run([packed.view(B, length, -1)], X, [V], [dV], line, local, True)
    assert dh is not None
    for whole, own in ((dweight, dV), (dbias, sums)):
        if whole is not None and own is not None:
            for to, part in zip(rows.cut([whole.zero_()]), own.chunk(3), strict=True):
                to.copy_(part)
    return Gradients(dh, dweight, dbias)


def _laid_together(parameter: Tensor, rows: Rows) -> Tensor:
    return torch.cat(rows.cut([parameter]))


def _rows(heads: int, sequence: Sequence) -> Rows:
    line = sequence.line("sp")
    each = evenly(heads, line.size)
    return Rows(heads, sum(each[: line.rank]), each[line.rank])
