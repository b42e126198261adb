"""What checkpoints keep of an optimizer's step: its counters, fp16's loss scale, the averages.

Pieces of averages are named `label/parameter`; writing to them loads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from opendit import ema
from opendit.attached import Attached, attach
from opendit.pieces import Piece
from opendit.stepping import stepper_of


def record(model: nn.Module) -> None:
    """Makes what `accelerate` attached to `model` (unwrapped) part of its checkpoints."""
    stepper = stepper_of(model)
    if stepper is None:
        return
    this = weakref.ref(model)

    def alive() -> nn.Module:
        found = this()
        assert found is not None
        return found

    def state() -> Mapping[str, Any]:
        found = stepper_of(alive())
        return {} if found is None else found.state()

    def load(values: Mapping[str, Any]) -> None:
        found = stepper_of(alive())
        if found is not None:
            found.load(dict(values))

    attach(model, "steps", Attached(state, load))
    if stepper.ema is not None:

        def pieces() -> dict[str, Piece]:
            averages = ema.pieces(alive())
            return {f"{label}/{name}": piece for label, found in averages.items() for name, piece in found.items()}

        attach(
            model,
            "ema",
            Attached(lambda: ema.description(alive()), lambda values: ema.load_description(alive(), values), pieces),
        )
