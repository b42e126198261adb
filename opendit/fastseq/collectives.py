"""The collectives with their gradients.

Contract. Every process of a group computes the whole loss from the gathered output, so d(loss)/d(output) is the same on
all. `gather_tokens` hands each its own part back times sp; from there down to `split_tokens` every gradient is sp times
what this process's tokens (or heads) contribute. The mean over the group is then the sum of the contributions: the
gradient of one device, for parameters before the split, inside, and after the gather. `split_tokens` gathers the
parts and divides by sp, so that what lies before it gets the whole gradient on every process.

    forward                                  backward
    split_tokens   [B, L, D] → [B, l, D]     all-gather of the parts, / sp
    gather_tokens  [B, l, C] → [B, L, C]     own part · sp
    to_heads       [B, l, H, K] → [B, L, h, K]     to_tokens
    to_tokens      [B, L, h, K] → [B, l, H, K]     to_heads

    gather_heads   [B, n, h, K] → [B, n, H, K]     own heads of the sum over all

gather_heads is for tokens that every process holds as a whole, a text's beside a video's. Each process computes all of
them but attention, of which it has its heads; what it gets as their gradient is its share, times sp.

Under to_heads and to_tokens no factor appears: they only move elements, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.fastseq import ops
from opendit.fastseq.ops import Line
from opendit.fastseq.shards import evenly, local_length, real, total_length


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        L = x.shape[1]
        local = local_length(L, line.sp)
        ctx.line, ctx.length = line, L
        begin = min(line.rank * local, L)
        here = real(L, local, line.rank)
        # A copy, not a view: the whole sequence must not stay in memory for the sake of a part of it. Its length is a
        # number, also where a compiler knows x's by a formula only.
        part = (x.new_zeros if here < local else x.new_empty)((x.shape[0], local, *x.shape[2:]))
        part[:, :here].copy_(x[:, begin : begin + here])
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None]:
        whole = in_order(ops.gather(dpart, ctx.line))[:, : ctx.length]
        return whole / ctx.line.size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, line: Line) -> Tensor:
        ctx.line, ctx.local = line, part.shape[1]
        return joined(ops.gather(part, line), total_length(part.shape[1], line.sp))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:
        local, line = ctx.local, ctx.line
        begin = min(line.rank * local, dwhole.shape[1])
        part = dwhole[:, begin : begin + local]
        return F.pad(part * line.size, (0, 0, 0, local - part.shape[1])), None


def in_order(parts: Tensor) -> Tensor:
    """[n, B, l, …] → [B, n·l, …]; a view where B is 1."""
    n, B, local = parts.shape[:3]
    return parts.transpose(0, 1).reshape(B, n * local, *parts.shape[3:])


def joined(parts: Tensor, length: int) -> Tensor:
    """[n, B, l, …] → [B, length, …], without padding; a copy, so that code may write into what a Function returns."""
    local = parts.shape[2]
    return torch.cat([part[:, : real(length, local, r)] for r, part in enumerate(parts.unbind(0))], 1)


def split_tokens(x: Tensor, sp: int) -> Tensor:
    """This process's part [B, l, D] of x [B, L, D], which all processes of the group hold alike."""
    part: Tensor = _Split.apply(x, Line(sp, 1, "sp"))  # type: ignore[no-untyped-call]
    return part


def gather_tokens(part: Tensor, sp: int) -> Tensor:
    """The whole [B, L, C] of the parts [B, l, C], without padding, on every process of the group."""
    whole: Tensor = _Gather.apply(part, Line(sp, 1, "sp"))  # type: ignore[no-untyped-call]
    return whole


def heads_first(parts: Sequence[Tensor], line: Line, length: int) -> tuple[Tensor, ...]:
    """From S tensors [B, l, H, K] to S of [B, length, h, K]: all tokens of the line, this process's heads; one call.

    Results are views of one buffer [B, n·l, S, h, K], cut at `length`.
    """
    B, local, H, K = parts[0].shape
    S, heads = len(parts), evenly(H, line.size)
    row, h = B * local * S * K, heads[line.rank]
    packed = parts[0].new_empty(row * H)
    begin = 0
    for piece, n in zip(packed.split([row * n for n in heads]), heads, strict=True):  # type: ignore[no-untyped-call]
        to = piece.view(B, local, S, n, K)
        for s, part in enumerate(parts):
            to[:, :, s].copy_(part[:, :, begin : begin + n])
        begin += n
    flat = ops.exchange(packed, [row * n for n in heads], [row * h] * line.size, line)
    return in_order(flat.view(line.size, B, local, S, h, K))[:, :length].unbind(2)


def tokens_first(parts: Sequence[Tensor], total_heads: int, line: Line, local: int) -> tuple[Tensor, ...]:
    """From S tensors [B, length, h, K] to S of [B, l, H, K], the way back of `heads_first`; one call.

    What lies between `length` and n·l is zero in the results.
    """
    return packed_tokens_first(parts, total_heads, line, local).unbind(2)


def packed_tokens_first(parts: Sequence[Tensor], total_heads: int, line: Line, local: int) -> Tensor:
    """`tokens_first` in one tensor, [B, l, S, H, K]."""
    B, length, h, K = parts[0].shape
    S, n, heads = len(parts), line.size, evenly(total_heads, line.size)
    row = B * local * S * K
    packed = parts[0].new_empty((n, B, local, S, h, K))
    if length < n * local:
        packed.zero_()
    if B == 1:
        for s, part in enumerate(parts):
            packed.view(1, n * local, S, h, K)[:, :length, s].copy_(part)
    else:
        for r in range(n):
            here = real(length, local, r)
            for s, part in enumerate(parts):
                packed[r, :, :here, s].copy_(part[:, r * local : r * local + here])
    flat = ops.exchange(packed.view(-1), [row * h] * n, [row * m for m in heads], line)
    out = flat.new_empty((B, local, S, total_heads, K))
    begin = 0
    for piece, m in zip(flat.split([row * m for m in heads]), heads, strict=True):  # type: ignore[no-untyped-call]
        out[:, :, :, begin : begin + m].copy_(piece.view(B, local, S, m, K))
        begin += m
    return out


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: Line, length: int, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.line, ctx.local, ctx.heads = line, parts[0].shape[1], parts[0].shape[2]
        return heads_first(parts, line, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *tokens_first(grads, ctx.heads, ctx.line, ctx.local))


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total_heads: int, line: Line, local: int) -> Tensor:
        ctx.line, ctx.length = line, x.shape[1]
        return tokens_first((x,), total_heads, line, local)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return heads_first((dx,), ctx.line, ctx.length)[0], None, None, None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total_heads: int, line: Line) -> Tensor:
        ctx.line, ctx.heads = line, evenly(total_heads, line.size)
        missing = ctx.heads[0] - x.shape[2]
        parts = ops.gather(F.pad(x, (0, 0, 0, missing)) if missing else x, line)
        return torch.cat([part[:, :, :n] for part, n in zip(parts.unbind(0), ctx.heads, strict=True)], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None, None]:
        heads: list[int] = ctx.heads
        parts = dwhole.split(heads, 2)  # type: ignore[no-untyped-call]
        packed = torch.stack([F.pad(p, (0, 0, 0, heads[0] - n)) for p, n in zip(parts, heads, strict=True)])
        return ops.reduce_scatter(packed, ctx.line)[:, :, : heads[ctx.line.rank]], None, None


def gather_heads(x: Tensor, total_heads: int, line: Line) -> Tensor:
    """[B, n, h, K] → [B, n, H, K] on every process: what the heads of all give for tokens that all hold alike.

    Each process's gradient of the result is a share, sp times what its own tokens contribute; their sum goes back.
    """
    whole: Tensor = _GatherHeads.apply(x, total_heads, line)  # type: ignore[no-untyped-call]
    return whole


def to_heads(parts: Sequence[Tensor], line: Line, length: int) -> tuple[Tensor, ...]:
    """`heads_first` with its gradient."""
    out: tuple[Tensor, ...] = _ToHeads.apply(line, length, *parts)  # type: ignore[no-untyped-call]
    return out


def to_tokens(x: Tensor, total_heads: int, line: Line, local: int) -> Tensor:
    """[B, length, h, K] → [B, l, H, K]: `tokens_first` of one tensor, with its gradient."""
    out: Tensor = _ToTokens.apply(x, total_heads, line, local)  # type: ignore[no-untyped-call]
    return out
