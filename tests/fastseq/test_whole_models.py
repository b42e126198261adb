"""The gradient contract on whole models: every parameter, every method, every layout of two and four processes."""

from __future__ import annotations

import pytest

from tests.fastseq import whole_models
from tests.launch import of_every_rank


@pytest.mark.parametrize(("world", "case"), [(world, name) for world in (2, 4) for name in whole_models.names(world)])
def test_as_one_device(world: int, case: str):
    for found in of_every_rank("tests.fastseq.whole_models", world, case):
        _right(found, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(w, name) for w in (2, 3, 4) for name in whole_models.every_case(w)])
def test_every_model_and_layout(world: int, case: str):
    """Every sp × dp ≤ 4, and nothing left out."""
    for found in of_every_rank("tests.fastseq.every_model", world, case, 7200.0):
        _right(found, 6)


def _right(found: dict[str, tuple[float, float, str]], least: int) -> None:
    assert len(found) >= least
    for how, (loss, gradient, name) in found.items():
        assert loss <= 1e-10, how
        assert gradient <= 1e-8, f"{how}: {name}"
