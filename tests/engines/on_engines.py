"""All cases of the default run for one start of processes: every plugin × sp × family, behaviour, mutants."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from tests.engines import behaving, mutants
from tests.engines.training import PLUGINS, case

MODELS = {2: ("dit", "diffusers"), 4: ("dit",)}
SIZES = {2: (1, 2), 4: (2,)}


def names(world: int) -> list[str]:
    return ["/".join(map(str, c)) for c in itertools.product(PLUGINS, MODELS[world], SIZES[world])]


def parity(names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        plugin, model, sp = name.split("/")
        found[name] = functools.partial(case, plugin, model, int(sp))
    return found


def cases(world: int) -> dict[str, Any]:
    return {**parity(names(world)), **behaving.cases(world), **mutants.cases(world)}
