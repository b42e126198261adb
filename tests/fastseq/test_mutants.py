"""The proofs and the comparison of inputs must notice mistakes: each is planted once, with dp 2 × sp 2."""

from __future__ import annotations

import pytest

from tests.fastseq import going_wrong
from tests.launch import of_every_rank


def found(case: str):
    return of_every_rank("tests.fastseq.going_wrong", 4, case)


@pytest.mark.parametrize("method", going_wrong.METHODS)
def test_nothing_is_wrong_without_them(method: str):
    assert max(found(f"honest/{method}")) <= 1e-8


ALL = [*going_wrong.MUTANTS, *(f"positions of the first tokens, {method}" for method in going_wrong.POSITIONS)]


@pytest.mark.parametrize("mutant", ALL)
def test_caught(mutant: str):
    assert min(found(mutant)) >= 1e-2


def test_seeded_inputs_pass():
    assert found("seeded") == [[]] * 4


SAID = {
    "noise differs in a group": "were given different inputs",
    "noise equal across groups": "all 2 data-parallel groups were given the same inputs",
    "random state differs in a group": "their random states differ",
    "shape differs in a group": "inputs of different shapes",
}


@pytest.mark.parametrize("what", SAID)
def test_inputs_are_compared_and_everyone_hears_of_it(what: str):
    for said in found(what):
        assert len(said) == 1
        assert SAID[what] in said[0]


def test_seed_and_data_parallel_rank():
    rows = found("seeds")
    assert [(rank, size) for rank, size, *_ in rows] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [used for _, _, used, *_ in rows] == [10, 10, 11, 11]
    drawn = [draw for *_, draw, _ in rows]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
