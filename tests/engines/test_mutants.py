"""The comparisons see what is broken."""

from __future__ import annotations

import pytest

from tests.engines import mutants
from tests.engines.on_engines import of


@pytest.mark.parametrize("case", list(mutants.cases(2)))
def test_is_seen(case: str):
    assert max(of(case)) > 1e-4
