"""Who writes what: every element once, whatever is divided and replicated how."""

from __future__ import annotations

import random

import pytest
import torch

from opendit.checkpoint import division
from opendit.checkpoint.errors import CheckpointError
from opendit.pieces import Piece


def _table(n: int, ranges: list[tuple[int, int]]) -> list[dict[str, division.Row]]:
    return [{"x": ((n,), "float32", start, stop)} for start, stop in ranges]


def _written(tables, **more):
    parts = [division.divide(tables, rank, **more).get("x") for rank in range(len(tables))]
    return sorted(part for part in parts if part)


def test_every_element_once():
    dice = random.Random(0)
    for _ in range(300):
        shards, replicas = dice.randint(1, 5), dice.randint(1, 4)
        n = dice.choice([0, 1, 5, 100, division._WORTH_DIVIDING * shards + dice.randint(0, 9)])
        each = -(-n // shards) if n else 0
        ranges = [(min(i * each, n), min((i + 1) * each, n)) for i in range(shards)] * replicas
        dice.shuffle(ranges)
        tables = _table(n, ranges)
        parts = _written(tables)
        assert [a for a, _ in parts] == [0, *(b for _, b in parts)][: len(parts)]
        assert (parts[-1][1] if parts else 0) == n
        if n >= division._WORTH_DIVIDING * shards and replicas > 1:
            assert len(parts) > shards, "replicas share the work"
        first = _written(tables, undivided={"x"})
        assert sum(b - a for a, b in first) == n
        assert len(first) <= shards


@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 6), (4, 10)], [(0, 4), (5, 10)], [(0, 12)], [(2, 10)]])
def test_what_is_not_the_whole_is_refused(ranges):
    with pytest.raises(CheckpointError, match="x: parts"):
        division.divide(_table(10, ranges), 0)


def test_copies_are_compared_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.bool, torch.int16):
        value = torch.ones(5).to(dtype)
        pieces = {"x": Piece((5,), 0, 5, value)}
        tables = [division.table(pieces)] * 2
        sums = division.checksums(pieces, tables, 0)
        division.check_equal([sums, sums], tables)
        value[3] = 0
        with pytest.raises(CheckpointError, match="x: rank 0 and rank 1 hold different values"):
            division.check_equal([sums, division.checksums(pieces, tables, 1)], tables)
    halves = _table(4, [(0, 2), (2, 4)])
    assert division.checksums({"x": Piece((4,), 0, 2, torch.ones(2))}, halves, 0) == {}, "nobody else has it"
