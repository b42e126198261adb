"""Tensors divided among processes as flat ranges: what torch's clipping does to them, and what is refused."""

from __future__ import annotations

from tests.launch import of_every_rank


def outcome(case: str) -> list:
    return of_every_rank("tests.dividing", 2, case)


def test_norms_are_those_of_the_whole():
    assert max(outcome("norms")) < 1e-12


def test_what_is_not_finite_in_one_process_is_so_for_all():
    assert outcome("nan") == [[], []]


def test_changes_in_place_are_those_of_the_whole():
    assert outcome("in place") == [[], []]


def test_anything_else_is_refused():
    for messages in outcome("refused"):
        assert len(messages) == 5
        for message in messages:
            assert "on a tensor that is divided over processes; allowed: norms" in message
            assert ".full_tensor()" in message


def test_it_is_a_piece():
    first, second = outcome("whole")
    assert (first["range"], second["range"]) == ((0, 8), (8, 15))
    for found in (first, second):
        assert found["shape"] == (3, 5)
        assert found["shares memory"]
        assert found["repr"].startswith("Divided(shape=(3, 5), [")
        assert found["detached"] == "Divided"
