"""The gradient contract on whole models: every parameter, every method, every layout of two and four processes."""

from __future__ import annotations

import pytest

from tests.fastseq import whole_models
from tests.launch import of_every_rank


@pytest.mark.parametrize(("world", "case"), [(world, name) for world in (2, 4) for name in whole_models.names(world)])
def test_as_one_device(world: int, case: str):
    for found in of_every_rank("tests.fastseq.whole_models", world, case):
        assert len(found) >= 3
        for how, (loss, gradient, name) in found.items():
            assert loss <= 1e-10, how
            assert gradient <= 1e-8, f"{how}: {name}"
