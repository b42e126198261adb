"""Every engine trains as one device does: gradients, clipping, accumulation, AdamW with groups, a scheduler; fp64."""

from __future__ import annotations

import pytest

from tests.engines import on_engines, on_more_engines
from tests.engines.training import check
from tests.launch import of_every_rank


@pytest.mark.parametrize(("world", "case"), [(w, name) for w in (2, 4) for name in on_engines.names(w)])
def test_as_one_device(world: int, case: str):
    for errors in on_engines.of(case, world):
        check(errors)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(w, name) for w in (2, 4) for name in on_more_engines.names(w)])
def test_as_one_device_for_every_family(world: int, case: str):
    for errors in of_every_rank("tests.engines.on_more_engines", world, case, limit=600):
        check(errors)
