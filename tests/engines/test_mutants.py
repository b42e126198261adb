"""The comparisons see what is broken."""

from __future__ import annotations

import pytest

from tests.engines import mutants
from tests.launch import of_every_rank


@pytest.mark.parametrize("case", list(mutants.cases(2)))
def test_is_seen(case: str):
    assert max(of_every_rank("tests.engines.on_engines", 2, case)) > 1e-4
