"""Which part of a tensor this process holds, whoever divided it.

A piece is the range [start, stop) of a tensor's elements in row-major order:

    a plain tensor, or one held whole by every process     [0, n)
    a DTensor divided along its first dimension            this process's rows, times the elements of a row
    a `opendit.divided.Divided`                            the range that it says

so that a state can be written by one division and read by another, with the numbers alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a tensor of `shape`; `values` [stop - start] shares their memory."""

    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor


def piece_of(tensor: Tensor) -> Piece:
    """This process's piece of `tensor`: plain, `Divided`, or a DTensor; writing to `values` writes to the tensor.

    Raises `ValueError` where the local part is no contiguous range: a dimension other than the first was divided, or
    the memory is laid out in another order.
    """
    if callable(ready := getattr(tensor, "piece", None)):
        return ready()
    shape = tuple(tensor.shape)
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return _checked(shape, 0, tensor)
    mesh, rows = tensor.device_mesh, (0, shape[0] if shape else 1)  # type: ignore[attr-defined]
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not (placement.is_shard(0) and type(placement).__name__ == "Shard"):
            raise ValueError(f"tensor: got a DTensor placed {placements}; allowed: whole, or divided along dimension 0")
        rows = _chunk(rows, mesh.size(axis), mesh.get_local_rank(axis))
    row = math.prod(shape[1:])
    return _checked(shape, rows[0] * row, tensor.to_local())  # type: ignore[attr-defined]


def _chunk(rows: tuple[int, int], parts: int, which: int) -> tuple[int, int]:
    """Rows of part `which`, as `torch.chunk` divides them: parts of ceil(n / parts), the last ones shorter or empty."""
    begin, end = rows
    length = -(-(end - begin) // parts)
    return min(begin + which * length, end), min(begin + (which + 1) * length, end)


def _checked(shape: tuple[int, ...], start: int, local: Tensor) -> Piece:
    if not local.is_contiguous():
        raise ValueError(
            f"tensor: got one of shape {shape} whose memory is not in row-major order (strides {local.stride()}); "
            "allowed: contiguous tensors. Call .contiguous() on it first"
        )
    values = local.detach().view(-1) if local.numel() else torch.empty(0, dtype=local.dtype, device=local.device)
    return Piece(shape, start, start + local.numel(), values)
