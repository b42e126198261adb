"""The collectives as plain functions on tensors, without gradients: eager calls, and operators for torch.compile.

A `Line` says by numbers which group is meant, so that it can be a constant in a traced graph, in a class, in a pickle.
Under torch.compile each call is an operator that Dynamo does not look into: there is no graph break.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opendit.fastseq.mesh import groups
from opendit.fastseq.shards import traced_as_constant


class Line(NamedTuple):
    """A group: one axis ("sp", "ulysses", "ring") of the mesh with this sp size and ring size."""

    sp: int
    ring: int
    axis: str

    @property
    def group(self) -> dist.ProcessGroup:
        return groups(self.sp, self.ring).axis(self.axis)

    @property
    def size(self) -> int:
        return {"sp": self.sp, "ring": self.ring, "ulysses": self.sp // self.ring}[self.axis]

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        rank = rank_in_sp(self.sp)
        ulysses = self.sp // self.ring
        return {"sp": rank, "ring": rank // ulysses, "ulysses": rank % ulysses}[self.axis]


@traced_as_constant
def rank_in_sp(sp: int) -> int:
    return groups(sp).rank


def gather(x: Tensor, line: Line) -> Tensor:
    """[n, *x.shape]: everyone's x, in the order of ranks; x has one shape everywhere."""
    if torch.compiler.is_compiling():
        return torch.ops.opendit.sp_gather(x, *line)
    x = x.contiguous()
    out = x.new_empty((line.size, *x.shape))
    gather_into(out.view(-1, *x.shape[1:]), x, line.group)
    return out


def reduce_scatter(x: Tensor, line: Line) -> Tensor:
    """x.shape[1:]: the sum over everyone's x[my rank]."""
    if torch.compiler.is_compiling():
        return torch.ops.opendit.sp_reduce_scatter(x, *line)
    x = x.contiguous()
    out = x.new_empty(x.shape[1:])
    # torch 2.13 renamed it.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, x.view(-1, *x.shape[2:]), group=line.group)
    return out


def gather_into(out: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Everyone's x, one after the other along the first dimension of `out`."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
    call(out, x, group=group)


def exchange(
    x: Tensor, send: Sequence[int], receive: Sequence[int], line: Line, shape: Sequence[int] | None = None
) -> Tensor:
    """One all-to-all of a flat tensor: `send[r]` elements go to rank r, `receive[r]` come from it, in that order.

    The result is flat, or of `shape`; it is no view of another tensor, so that a Function may return it to code that
    writes in place.
    """
    shape = [sum(receive)] if shape is None else list(shape)
    if torch.compiler.is_compiling():
        return torch.ops.opendit.sp_exchange(x, list(send), list(receive), shape, *line)
    out = x.new_empty(shape)
    dist.all_to_all_single(out.view(-1), x.contiguous(), list(receive), list(send), group=line.group)
    return out


def shift(x: Tensor, line: Line) -> Tensor:
    """The previous rank's x, while ours goes to the next."""
    if torch.compiler.is_compiling():
        return torch.ops.opendit.sp_shift(x, *line)
    out, works = start_shift(x, line)
    wait(works)
    return out


def start_shift(x: Tensor, line: Line, out: Tensor | None = None) -> tuple[Tensor, list[dist.Work]]:
    """`shift` begun, into `out` if given: x must not be written, nor the result read, before `wait`."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    group, rank, size = line.group, line.rank, line.size
    ahead = dist.get_global_rank(group, (rank + 1) % size)
    behind = dist.get_global_rank(group, (rank - 1) % size)
    transfers = [dist.P2POp(dist.isend, x, ahead, group), dist.P2POp(dist.irecv, out, behind, group)]
    return out, dist.batch_isend_irecv(transfers)


def wait(works: Sequence[dist.Work]) -> None:
    """On GPUs the current stream waits, not the host."""
    for work in works:
        work.wait()


@torch.library.custom_op("opendit::sp_gather", mutates_args=())
def _gather(x: Tensor, sp: int, ring: int, axis: str) -> Tensor:
    return gather(x, Line(sp, ring, axis))


@_gather.register_fake
def _(x: Tensor, sp: int, ring: int, axis: str) -> Tensor:
    return x.new_empty((Line(sp, ring, axis).size, *x.shape))


@torch.library.custom_op("opendit::sp_reduce_scatter", mutates_args=())
def _reduce_scatter(x: Tensor, sp: int, ring: int, axis: str) -> Tensor:
    return reduce_scatter(x, Line(sp, ring, axis))


@_reduce_scatter.register_fake
def _(x: Tensor, sp: int, ring: int, axis: str) -> Tensor:
    return x.new_empty(x.shape[1:])


@torch.library.custom_op("opendit::sp_exchange", mutates_args=())
def _exchange(
    x: Tensor, send: list[int], receive: list[int], shape: list[int], sp: int, ring: int, axis: str
) -> Tensor:
    return exchange(x, send, receive, Line(sp, ring, axis), shape)


@_exchange.register_fake
def _(x: Tensor, send: list[int], receive: list[int], shape: list[int], sp: int, ring: int, axis: str) -> Tensor:
    return x.new_empty(shape)


@torch.library.custom_op("opendit::sp_shift", mutates_args=())
def _shift(x: Tensor, sp: int, ring: int, axis: str) -> Tensor:
    return shift(x, Line(sp, ring, axis))


@_shift.register_fake
def _(x: Tensor, sp: int, ring: int, axis: str) -> Tensor:
    return x.new_empty(x.shape)
