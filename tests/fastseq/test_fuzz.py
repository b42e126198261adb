"""Heads 1 to 17, tokens 1 to 65: right, whatever divides what."""

from __future__ import annotations

import pytest

from tests.fastseq import every_shape, fuzzing
from tests.launch import of_every_rank

EACH = [(world, case) for world in (2, 4) for case in fuzzing.cases(world)]


def _right(module: str, world: int, case: str, times: int, limit: float = 240.0) -> None:
    for compared, worst, where in of_every_rank(module, world, case, limit):
        assert compared == len(fuzzing.HEADS) * times
        assert worst <= 1e-10, where


@pytest.mark.parametrize(("world", "case"), EACH)
def test_shapes_drawn(world: int, case: str):
    _right("tests.fastseq.fuzzing", world, case, fuzzing.draws(world, case))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in (2, 4) for case in every_shape.cases(world)])
def test_every_shape(world: int, case: str):
    _right(every_shape.__name__, world, case, len(fuzzing.TOKENS), 3600.0)
