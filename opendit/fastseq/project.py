"""All-gather of tokens and projection of local heads as one function, plain and overlapped, backward written out.

    X = all-gather(x)                    x [B, l, D], X [B, L, D]
    q_j = X·W_jᵀ + b_j    j = q, k, v    W_j [h·K, D]: the local heads' rows of the layer's weights
    dW_j = dq_jᵀ·X                       zero in the rows of others, who write theirs
    dx = reduce-scatter(Σ_j dq_j·W_j)

X is kept for the backward; overlapped, in the parts it came in, [n, B, l, D]. With `regather` only x is kept, and
gathered again: 1/sp of the memory for one more all-gather; overlapped, for another ring, whose first transfer dx hides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.fastseq import ops
from opendit.fastseq.collectives import in_order
from opendit.fastseq.method import Projection
from opendit.fastseq.ops import Line
from opendit.fastseq.shards import real, total_length


class Rows(NamedTuple):
    """Which heads of a projection are local: `here` of `heads`, from `first` on."""

    heads: int
    first: int
    here: int

    def cut(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """q's, k's and v's local rows, as views of one packed parameter or of three."""
        each = parameters if len(parameters) == 3 else parameters[0].chunk(3)
        K = each[0].shape[0] // self.heads
        return [p[self.first * K : (self.first + self.here) * K] for p in each]


class Static(NamedTuple):
    """What the function is told besides tensors."""

    rows: Rows
    line: Line
    overlapped: bool
    dtype: torch.dtype | None
    weights: int  # how many of the parameters are weights
    regather: bool = False


def gather_project(
    x: Tensor, projection: Projection, rows: Rows, line: Line, *, overlapped: bool, regather: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, h, K] of all tokens, for the local heads, from x [B, l, D] of the local tokens."""
    if projection.dtype is not None:
        x = x.to(projection.dtype)
    static = Static(rows, line, overlapped, projection.dtype, len(projection.weights), regather)
    q, k, v = _GatherProject.apply(x, static, *projection.weights, *projection.biases)  # type: ignore[no-untyped-call]
    return q, k, v


class _GatherProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, static: Static, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.static, ctx.local = static, x.shape[1]
        weights, biases = _cut(flat, static)
        length = total_length(x.shape[1], static.line.sp)
        run = _forward_overlapped if static.overlapped else _forward
        with torch.autocast(x.device.type, enabled=False):
            X, outs = run(x, weights, biases, static.line, length)
        ctx.save_for_backward(x if static.regather else X, *flat)
        K = flat[0].shape[0] * static.weights // (3 * static.rows.heads)
        return tuple(out.view(*out.shape[:2], static.rows.here, K) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        static: Static = ctx.static
        X, *flat = ctx.saved_tensors
        weights, _ = _cut(flat, static)
        dflat = [torch.zeros_like(p) if need else None for p, need in zip(flat, ctx.needs_input_grad[2:], strict=True)]
        # Views of these: each local row is written once, in place; None where a parameter is frozen.
        dweights, dbiases = (
            _cut_some(dflat[: static.weights], static.rows),
            _cut_some(dflat[static.weights :], static.rows),
        )
        dq = [g.flatten(2) for g in grads]
        run = _backward_overlapped if static.overlapped else _backward
        with torch.autocast(X.device.type, enabled=False):
            if static.regather and not static.overlapped:
                X = in_order(ops.gather(X, static.line))[:, : dq[0].shape[1]]
            dx = run(dq, X, weights, dweights, static.line, ctx.local, ctx.needs_input_grad[0])
            for db, g in zip(dbiases, dq, strict=False):
                if db is not None:
                    db.copy_(g.sum((0, 1)))
        return (dx, None, *dflat)


def _cut_some(parameters: Sequence[Tensor | None], rows: Rows) -> list[Tensor | None]:
    """`rows.cut` of those that are there: of a packed one three times, of three once each."""
    if len(parameters) == 1:
        return [None] * 3 if parameters[0] is None else [*rows.cut([parameters[0]])]
    return [None if p is None else rows.cut((p, p, p))[0] for p in parameters]


def _cut(flat: Sequence[Tensor], static: Static) -> tuple[list[Tensor], list[Tensor]]:
    """(W_j, b_j) of the local heads, in the dtype they are computed in; no biases: an empty list."""
    weights = static.rows.cut(flat[: static.weights])
    biases = static.rows.cut(flat[static.weights :]) if len(flat) > static.weights else []
    if static.dtype is not None:
        weights, biases = [w.to(static.dtype) for w in weights], [b.to(static.dtype) for b in biases]
    return weights, biases


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], line: Line, length: int
) -> tuple[Tensor, list[Tensor]]:
    """(X [B, L, D], the three outputs [B, L, h·K])."""
    X = in_order(ops.gather(x, line))[:, :length]
    return X, [F.linear(X, w, biases[j] if biases else None) for j, w in enumerate(weights)]


def _backward(
    dq: list[Tensor],
    X: Tensor,
    weights: list[Tensor],
    dweights: list[Tensor | None],
    line: Line,
    local: int,
    need_dx: bool,
) -> Tensor | None:
    B, L, D = X.shape
    rows = [g.flatten(0, 1) for g in dq]
    for g, dw in zip(rows, dweights, strict=True):
        if dw is not None:
            dw.copy_(_weight_gradient(g, X.reshape(B * L, D), dw.dtype))
    if not need_dx:
        return None
    dX = _input_gradient(rows, weights).view(B, L, D)
    parts = F.pad(dX, (0, 0, 0, line.size * local - L)).view(B, line.size, local, D).transpose(0, 1)
    return ops.reduce_scatter(parts, line)


def _weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """gᵀ·x, accumulated in fp32 and rounded once, to the weight's dtype where the device can."""
    if g.is_cuda and dtype == torch.float32 and g.dtype != dtype and not torch.compiler.is_compiling():
        return torch.mm(g.t(), x, out_dtype=dtype)
    return g.t() @ x


def _input_gradient(dq: list[Tensor], weights: list[Tensor]) -> Tensor:
    dx = dq[0] @ weights[0]
    for g, w in zip(dq[1:], weights[1:], strict=True):
        dx.addmm_(g, w)
    return dx


def _forward_overlapped(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], line: Line, length: int
) -> tuple[Tensor, list[Tensor]]:
    """(X in parts [n, B, l, D], the three outputs [B, L, h·K]): parts go round the ring, projected as they come."""
    B, local, D = x.shape
    n, me = line.size, line.rank
    X = x.new_empty((n, B, local, D))
    X[me].copy_(x)
    outs = [x.new_empty((B, length, w.shape[0])) for w in weights]
    for step in range(n):
        r = (me - step) % n
        works = [] if step == n - 1 else ops.start_shift(X[r], line, out=X[(r - 1) % n])[1]
        here = real(length, local, r)
        for j, (out, w) in enumerate(zip(outs, weights, strict=True)):
            _linear_into(out[:, r * local : r * local + here], X[r, :, :here], w, biases[j] if biases else None)
        ops.wait(works)
    return X, outs


def _linear_into(out: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    if out.shape[0] == 1:  # a sample's rows lie together: the product is written where it belongs
        torch.mm(x[0], w.t(), out=out[0]) if b is None else torch.addmm(b, x[0], w.t(), out=out[0])
    else:
        out.copy_(F.linear(x, w, b))


def _backward_overlapped(
    dq: list[Tensor],
    X: Tensor,
    weights: list[Tensor],
    dweights: list[Tensor | None],
    line: Line,
    local: int,
    need_dx: bool,
) -> Tensor | None:
    """Each part's dx starts at its owner's successor, goes round the ring and ends with the owner, summed.

    X [n, B, l, D], or [B, l, D]: this process's part, and the others come round.
    """
    n, (B, _, D) = line.size, X.shape[-3:]
    me, length = line.rank, dq[0].shape[1]
    parts = iter([X[(me - 1 - step) % n] for step in range(n)]) if X.dim() == 4 else _coming_round(X, line)
    total: Tensor | None = None
    for step in range(n):
        r = (me - 1 - step) % n
        here = real(length, local, r)
        rows = [g[:, r * local : r * local + here].flatten(0, 1) for g in dq]
        arriving, works = ops.start_shift(total, line) if total is not None else (None, [])
        part = None
        if need_dx:
            part = F.pad(_input_gradient(rows, weights).view(B, here, D), (0, 0, 0, local - here))
        x = next(parts)
        for g, dw in zip(rows, dweights, strict=True):
            if dw is not None:
                dw.add_(_weight_gradient(g, x[:, :here].reshape(B * here, D), dw.dtype))
        ops.wait(works)
        total = part if arriving is None or part is None else part.add_(arriving)
    return total


def _coming_round(x: Tensor, line: Line) -> Iterator[Tensor]:
    """The predecessor's part, its predecessor's, …, and x itself last; the next is under way while one is used."""
    first = ops.start_shift(x, line)  # now, not when the first part is asked for

    def parts() -> Iterator[Tensor]:
        following, works = first
        for step in range(line.size - 1):
            ops.wait(works)
            part = following
            if step < line.size - 2:
                following, works = ops.start_shift(part, line)
            yield part
        yield x

    return parts()
