"""The families beside those of `on_engines`, for the slow run."""

from __future__ import annotations

import itertools
from typing import Any

from tests.engines.on_engines import parity
from tests.engines.training import PLUGINS

MODELS = {
    2: (
        "dit-qk-norm",
        "sit-odd",
        "fast-dit-patch4",
        "example",
        "latte",
        "latte-text",
        "latte-img",
        "diffusers",
        "diffusers-affine",
    ),
    4: ("dit", "sit-odd", "latte", "diffusers"),
}


def names(world: int) -> list[str]:
    found = itertools.product(("fsdp", *PLUGINS), MODELS[world], (1, 2))
    return [f"{p}/{m}/{sp}" for p, m, sp in found if sp == 1 or not m.startswith("latte")]


def cases(world: int) -> dict[str, Any]:
    return parity(names(world))
