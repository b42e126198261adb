"""Layouts of videos between blocks that look within a frame and blocks that look within a token's frames.

    frames  [ρ, T, D]   this process's frames, whole
    tokens  [R, l, D]   this process's tokens of every frame, padding at the end

    mine_of      [R, T, D] → [ρ, T, D]    nothing travels, all have it; backward: all-gather of the parts, / sp
    to_tokens    [ρ, T, D] → [R, l, D]    one all-to-all; backward: to_frames
    to_frames    [R, l, D] → [ρ, T, D]    one all-to-all; backward: to_tokens

R frames of all samples in one order, ρ of them here, T tokens of a frame, l here (`shards.py`), D hidden. No attention
is spread, so heads don't matter. Received by each process in each all-to-all: R·T·D·(s−1)/s² numbers.

Frames are spread as evenly as can be. A process that gets none computes a frame of zeros, which nobody reads: whatever
runs on it has something to run on, and its gradients are exact zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.fastseq import ops
from opendit.fastseq.collectives import joined
from opendit.fastseq.ops import Line
from opendit.fastseq.shards import evenly, local_length, real


def mine_of(x: Tensor, sp: int) -> Tensor:
    """This process's frames [ρ, T, D] of x [R, T, D], which all processes of the group hold alike."""
    part: Tensor = _Mine.apply(x, Line(sp, 1, "sp"))  # type: ignore[no-untyped-call]
    return part


def to_tokens(x: Tensor, frames: int, sp: int) -> Tensor:
    """[ρ, T, D] → [frames, l, D]; padding tokens are zero."""
    out: Tensor = _ToTokens.apply(x, frames, Line(sp, 1, "sp"))  # type: ignore[no-untyped-call]
    return out


def to_frames(x: Tensor, tokens: int, sp: int) -> Tensor:
    """[R, l, D] → [ρ, tokens, D]."""
    out: Tensor = _ToFrames.apply(x, tokens, Line(sp, 1, "sp"))  # type: ignore[no-untyped-call]
    return out


def frames_of(c: Tensor, sp: int) -> Tensor:
    """The rows of c [R, C] that belong to this process's frames, [ρ, C]; its gradient is that of these rows."""
    begin, here, _ = _frames(c.shape[0], Line(sp, 1, "sp"))
    return _never_none(c[begin : begin + here])


def tokens_of(c: Tensor, tokens: int, sp: int) -> Tensor:
    """The rows of c [B·tokens, C] that belong to this process's tokens, [B·l, C]; zeros for padding."""
    line, local = Line(sp, 1, "sp"), local_length(tokens, sp)
    begin = min(line.rank * local, tokens)
    here = real(tokens, local, line.rank)
    mine = c.view(-1, tokens, c.shape[-1])[:, begin : begin + here]
    return F.pad(mine, (0, 0, 0, local - here)).flatten(0, 1)


def received(frames: int, tokens: int, width: int, itemsize: int, sp: int) -> float:
    """Bytes that each process receives in one all-to-all, per sample."""
    return frames * tokens * width * (sp - 1) / sp**2 * itemsize


def _frames(total: int, line: Line) -> tuple[int, int, list[int]]:
    """(the first of this process's frames, how many, how many everyone has)."""
    counts = evenly(total, line.size)
    return sum(counts[: line.rank]), counts[line.rank], counts


def _never_none(rows: Tensor) -> Tensor:
    # The sum over no rows: zeros that the graph knows, so that every parameter has a gradient on every process.
    return rows if rows.shape[0] else rows.sum(0, keepdim=True)


class _Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line, ctx.total = line, x.shape[0]
        begin, here, _ = _frames(x.shape[0], line)
        # A copy, not a view: all frames must not stay in memory for the sake of some.
        return x[begin : begin + here].clone() if here else x.new_zeros((1, *x.shape[1:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None]:
        _, here, counts = _frames(ctx.total, ctx.line)
        dpart = dpart[:here]
        if here < counts[0]:
            dpart = F.pad(dpart, (0, 0, 0, 0, 0, counts[0] - here))
        parts = ops.gather(dpart, ctx.line)
        if counts[-1] == counts[0]:
            whole = parts.flatten(0, 1)
        else:
            whole = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return whole / ctx.line.size, None


def _tokens_first(x: Tensor, total: int, line: Line) -> Tensor:
    T, D = x.shape[1:]
    local, n = local_length(T, line.sp), line.size
    _, here, counts = _frames(total, line)
    whole = F.pad(x[:here], (0, 0, 0, n * local - T)) if n * local > T else x[:here]
    packed = whole.reshape(here, n, local, D).transpose(0, 1).reshape(-1)
    row = local * D
    # Frames come in their order, so what is received is the result.
    return ops.exchange(packed, [here * row] * n, [m * row for m in counts], line, (total, local, D))


def _frames_first(x: Tensor, T: int, line: Line) -> Tensor:
    total, local, D = x.shape
    _, here, counts = _frames(total, line)
    row = local * D
    flat = ops.exchange(x.reshape(-1), [m * row for m in counts], [here * row] * line.size, line)
    if not here:
        return x.new_zeros((1, T, D))
    return joined(flat.view(line.size, here, local, D), T)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, line: Line) -> Tensor:
        ctx.line, ctx.tokens = line, x.shape[1]
        return _tokens_first(x, total, line)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _frames_first(dx, ctx.tokens, ctx.line), None, None


class _ToFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, line: Line) -> Tensor:
        ctx.line, ctx.total = line, x.shape[0]
        return _frames_first(x, tokens, line)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _tokens_first(dx, ctx.total, ctx.line), None, None
