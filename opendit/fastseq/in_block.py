"""Attention over processes without autograd, for a block that writes its own backward.

    ulysses   qkv = h·Wᵀ + b [B, l, 3, H, K] ─ all-to-all ► q, k, v [B, L, n, K] → a [B, L, n, K] ─ all-to-all ► o
    fastseq   h ─ all-gather ► X [B, L, D] → q, k, v = X·W_jᵀ + b_j of the local heads → a ─ all-to-all ► o

h [B, l, D] of the local tokens, W [3·H·K, D], b [3·H·K], o [B, l, H·K]; n of the H heads are local. In the backward the
same ways are gone the other way round. Ulysses gives dqkv of the local tokens, from which the caller computes dh and dW
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
    backward(dout, q, k, v, out, what it needs) gives dq, dk, dv.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Several[Tensor]], tuple[Tensor, Tensor, Tensor]]


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
        rows = h.reshape(B * local, D)
        qkv = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        q, k, v = heads_first(qkv.view(B, local, 3, heads, -1).unbind(2), line, length)
    else:
        rows_of = _rows(heads, sequence)
        biases = [] if bias is None else rows_of.cut([bias])
        run = project._forward_overlapped if overlaps(h, sequence) else project._forward
        X, outs = run(h, rows_of.cut([weight]), biases, line, length)
        q, k, v = (out.view(B, length, rows_of.here, -1) for out in outs)
        kept.append(h if sequence.regather else X)
    a, more = attend.forward(q, k, v)
    return tokens_first((a,), heads, line, local)[0].flatten(2), [*kept, q, k, v, a, *more]


def backward_through_heads(
    do: Tensor, saved: Several[Tensor], heads: int, sequence: Sequence, attend: Attend
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, L, n, K] of the local heads, from do [B, l, H·K] of the local tokens."""
    q, k, v, a, *more = saved
    (da,) = heads_first((do.unflatten(2, (heads, -1)),), sequence.line("sp"), q.shape[1])
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
    grads = [g.flatten(2) for g in backward_through_heads(do, saved, heads, sequence, attend)]
    rows, overlapped = _rows(heads, sequence), overlaps(do, sequence)
    if sequence.regather and not overlapped:
        X = in_order(ops.gather(X, line))[:, : grads[0].shape[1]]
    dweights: list[Tensor | None] = [None] * 3 if dweight is None else [*rows.cut([dweight.zero_()])]
    run = project._backward_overlapped if overlapped else project._backward
    dh = run(grads, X, rows.cut([weight]), dweights, line, local, True)
    assert dh is not None
    if dbias is not None:
        for part, g in zip(rows.cut([dbias.zero_()]), grads, strict=True):
            part.copy_(g.sum((0, 1), dtype=torch.promote_types(g.dtype, torch.float32)))
    return Gradients(dh, dweight, dbias)


def _rows(heads: int, sequence: Sequence) -> Rows:
    line = sequence.line("sp")
    each = evenly(heads, line.size)
    return Rows(heads, sum(each[: line.rank]), each[line.rank])
