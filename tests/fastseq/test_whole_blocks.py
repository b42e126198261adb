"""Blocks that are one function each, with the tokens spread: as one device, whatever the method and what is kept."""

from __future__ import annotations

import pytest

from tests.fastseq import whole_blocks
from tests.launch import of_every_rank

CASES = [(world, case) for world in (2, 4) for case in whole_blocks.cases(world)]


@pytest.mark.parametrize(("world", "case"), [c for c in CASES if c[1].startswith("right") or c[1] == "frozen"])
def test_as_one_device(world: int, case: str):
    for found in of_every_rank("tests.fastseq.whole_blocks", world, case):
        assert len(found) >= 5
        for error, name, how in found:
            assert error <= 1e-5, f"{how}: {name}"  # in fp32


@pytest.mark.parametrize("case", [case for world, case in CASES if world == 2 and case.startswith("wrong")])
def test_mistakes_are_seen(case: str):
    assert max(of_every_rank("tests.fastseq.whole_blocks", 2, case)) > 1e-2


@pytest.mark.parametrize("world", [2, 4])
def test_heads_may_be_wider_than_tokens(world: int):
    assert max(of_every_rank("tests.fastseq.whole_blocks", world, "wider")) <= 1e-12


@pytest.mark.parametrize("world", [2, 4])
def test_graphs_of_collectives_are_asked_for(world: int):
    assert of_every_rank("tests.fastseq.whole_blocks", world, "graphs") == [[False, True]] * world


@pytest.mark.parametrize("world", [2, 4])
def test_methods_of_modules_are_refused(world: int):
    for said in of_every_rank("tests.fastseq.whole_blocks", world, "in parts"):
        assert "sequence_parallel='fastseq' or 'ulysses', which a block can compute itself" in said
