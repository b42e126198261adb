"""Saved on one number of processes, by one way of dividing them; loaded on another, by another."""

from __future__ import annotations

import pytest

from tests.checkpoint import elastic
from tests.launch import of_every_rank


def _check(found, pairs):
    assert set(found[0]) == {f"{elastic._name(s)} → {elastic._name(t)}" for s, t in pairs}
    for rank, of_rank in enumerate(found):
        assert all(wrong == [] for wrong in of_rank.values()), (rank, {k: v[:3] for k, v in of_rank.items() if v})


def test_loaded_elsewhere_is_what_was_saved():
    _check(of_every_rank("tests.checkpoint.elastic", 4, "some", 600.0), elastic.SOME)


@pytest.mark.slow
def test_every_pair():
    _check(of_every_rank("tests.checkpoint.elastic_slow", 4, "all", 1200.0), elastic.ALL)
