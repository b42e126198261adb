"""Who writes which part of what: every element once, by one of the processes that hold it.

Each process tells for each tensor which range of its elements it holds. Ranges are equal (the tensor, or a shard of it,
is replicated: its holders divide it) or disjoint, and together they are the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from opendit.checkpoint.errors import CheckpointError
from opendit.pieces import Piece

# Replicated ranges of fewer elements are written by one of their holders.
_WORTH_DIVIDING = 1 << 14

Row = tuple[tuple[int, ...], str, int, int]
"""Shape, dtype, start, stop."""


def table(pieces: Mapping[str, Piece]) -> dict[str, Row]:
    return {key: (p.shape, str(p.values.dtype).removeprefix("torch."), p.start, p.stop) for key, p in pieces.items()}


def divide(tables: Sequence[Mapping[str, Row]], rank: int) -> dict[str, tuple[int, int]]:
    """For each tensor the range that process `rank` writes; tensors of which it writes nothing are left out.

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
            if stop - start < _WORTH_DIVIDING:
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
