"""Who writes which part of what: every element once, by one of the processes that hold it.

Each process tells for each tensor which range of its elements it holds. Ranges are equal (the tensor, or a shard of it,
is replicated: its holders divide it) or disjoint, and together they are the whole tensor. What is replicated must be
equal, or parts of different models would be mixed: sums of its bits are compared. Only buffers may differ, as batch
statistics do under DDP; the first holder's is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from opendit.checkpoint.errors import CheckpointError
from opendit.pieces import Piece

# Replicated ranges of fewer elements are written by one of their holders.
_WORTH_DIVIDING = 1 << 14

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Row = tuple[tuple[int, ...], str, int, int]
"""Shape, dtype, start, stop."""


def table(pieces: Mapping[str, Piece]) -> dict[str, Row]:
    return {key: (p.shape, str(p.values.dtype).removeprefix("torch."), p.start, p.stop) for key, p in pieces.items()}


def checksums(pieces: Mapping[str, Piece], tables: Sequence[Mapping[str, Row]], rank: int) -> dict[str, int]:
    """For what others hold as well: the sum of its elements' bits, as whole numbers modulo 2⁶⁴."""
    shared = [
        key
        for key, row in tables[rank].items()
        if row[2] < row[3] and any(one.get(key) == row for r, one in enumerate(tables) if r != rank)
    ]
    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for key in shared:
        values = pieces[key].values
        values = torch.view_as_real(values) if values.is_complex() else values
        total = values.view(_WHOLE_NUMBERS[values.element_size()]).sum(dtype=torch.int64)
        sums.setdefault(values.device, []).append((key, total))
    found: dict[str, int] = {}
    for rows in sums.values():
        numbers = torch.stack([total for _, total in rows]).tolist()  # one wait for each device
        found.update((key, n) for (key, _), n in zip(rows, numbers, strict=True))
    return found


def check_equal(sums: Sequence[Mapping[str, int]], tables: Sequence[Mapping[str, Row]]) -> None:
    """Raises `CheckpointError` where two processes hold one range with different values."""
    seen: dict[tuple[str, Row], tuple[int, int]] = {}
    for rank, one in enumerate(sums):
        for key, number in one.items():
            first, expected = seen.setdefault((key, tables[rank][key]), (rank, number))
            if number != expected:
                raise CheckpointError(
                    f"{key}: rank {first} and rank {rank} hold different values of what should be one tensor; allowed: "
                    "copies that are equal, as DDP keeps them. Wrap the model, or give both the same values"
                )


def divide(
    tables: Sequence[Mapping[str, Row]], rank: int, undivided: Collection[str] = ()
) -> dict[str, tuple[int, int]]:
    """For each tensor the range that process `rank` writes; tensors of which it writes nothing are left out.

    The first holder writes the whole of those named in `undivided`.

    Raises `CheckpointError` where processes hold different tensors under one name, or parts that don't fit together.
    """
    mine = {}
    for number, key in enumerate(sorted({key for one in tables for key in one})):
        rows = {r: one[key] for r, one in enumerate(tables) if key in one}
        kinds = {row[:2] for row in rows.values()}
        if len(kinds) > 1:
            raise CheckpointError(f"{key}: processes hold different tensors of that name: {sorted(map(str, kinds))}")
        holders: dict[tuple[int, int], list[int]] = {}
        for r, (_, _, start, stop) in rows.items():
            if start < stop:
                holders.setdefault((start, stop), []).append(r)
        check_whole(key, next(iter(kinds))[0], sorted(holders))
        for (start, stop), ranks in holders.items():
            if rank not in ranks:
                continue
            if key in undivided:
                part = (start, stop) if ranks[0] == rank else (0, 0)
            elif stop - start < _WORTH_DIVIDING:
                part = (start, stop) if ranks[number % len(ranks)] == rank else (0, 0)
            else:
                each, which = -(-(stop - start) // len(ranks)), ranks.index(rank)
                part = (min(start + which * each, stop), min(start + (which + 1) * each, stop))
            if part[0] < part[1]:
                mine[key] = part
    return mine


def check_whole(key: str, shape: tuple[int, ...], ranges: Sequence[tuple[int, int]]) -> None:
    """Raises `CheckpointError` unless the sorted `ranges` follow each other from the tensor's start to its end."""
    end = 0
    for start, stop in ranges:
        if start != end or stop < start:
            raise CheckpointError(f"{key}: parts {list(ranges)[:8]} of shape {shape} leave a gap or overlap")
        end = stop
    if end != math.prod(shape):
        raise CheckpointError(f"{key}: parts {list(ranges)[:8]} are not all of shape {shape}")
