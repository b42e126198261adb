"""All cases of the default run for one start of processes: every plugin × sp × family, behaviour, mutants."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from tests.engines import behaving, mutants
from tests.engines.training import PLUGINS, case
from tests.launch import of_every_rank

# Plugins, models and sequence sizes; the others are `on_more_engines`'.
GRID = {
    2: ((PLUGINS, ("dit",), (1, 2)), (("ddp", "zero3"), ("diffusers",), (1, 2))),
    4: ((("ddp", "zero3"), ("dit",), (2,)),),
}


def names(world: int) -> list[str]:
    return ["/".join(map(str, c)) for grid in GRID[world] for c in itertools.product(*grid)]


def parity(names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        plugin, model, sp = name.split("/")
        found[name] = functools.partial(case, plugin, model, int(sp))
    return found


def cases(world: int) -> dict[str, Any]:
    return {**parity(names(world)), **behaving.cases(world), **mutants.cases(world)}


def of(case: str, world: int = 2) -> list[Any]:
    """What `case` returned on each rank. All cases of a world are one start: give it the time."""
    return of_every_rank(__name__, world, case, limit=600.0)
