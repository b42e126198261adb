"""Two processes that share a batch give both the whole of it: the numbers of one process."""

from __future__ import annotations

import pytest

from tests.launch import of_every_rank
from tests.sampling import pairing

MODULE = "tests.sampling.pairing"
STEPS = [(world, case) for world in (2, 4) for case in pairing.cases(world) if case.startswith("steps")]
WHOLE = [(2, f"whole blocks/{method}") for method in ("fastseq", "ulysses")]


@pytest.mark.parametrize(("world", "case"), [*STEPS, (2, "guided"), *WHOLE])
def test_the_same_as_one_process(world: int, case: str):
    for errors in of_every_rank(MODULE, world, case):
        assert all(error <= 1e-12 for error in errors.values()), errors


def test_one_collective_a_forward():
    assert of_every_rank(MODULE, 2, "collectives") == [1, 1]


def test_both_calibrate_to_one_schedule():
    for equal, cache in of_every_rank(MODULE, 2, "cached"):
        assert equal
        assert "false" in cache  # something is reused


def test_different_inputs_and_numbers_of_processes_are_refused():
    for said in of_every_rank(MODULE, 2, "refusals"):
        assert "called the model with different tensors" in said[0]
        assert "cfg_parallel: got True with 2 processes and sp_size=2" in said[1]


@pytest.mark.parametrize("world", [2, 4])
def test_one_pair_makes_a_forward_without_the_others(world: int):
    assert of_every_rank(MODULE, world, "one pair's forward") == [True] * world


def test_inputs_that_are_alike_and_not_numbers_are_computed():
    assert of_every_rank(MODULE, 2, "alike but not numbers") == [True, True]


@pytest.mark.parametrize("world", [2, 4])
def test_a_pair_is_one_share_of_the_data(world: int):
    assert of_every_rank(MODULE, world, "ranks") == [(0, 1)] * world
