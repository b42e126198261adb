"""What checkpoints keep of an optimizer's step: its counters, fp16's loss scale, the averages.

Pieces of averages are named `label/parameter`; writing to them loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from opendit import ema
from opendit.attached import Attached, attach, detach
from opendit.pieces import Piece
from opendit.stepping import stepper_of


def record(model: nn.Module) -> None:
    """Makes what `accelerate` attached to `model` (unwrapped) part of its checkpoints."""
    forget(model)
    stepper = stepper_of(model)
    if stepper is None:
        return
    attach(model, "steps", Attached(_steps, _load_steps))
    if stepper.ema is not None:
        attach(model, "ema", Attached(ema.description, ema.load_description, _averages))


def forget(model: nn.Module) -> None:
    """Undoes `record`."""
    for name in ("steps", "ema"):
        detach(model, name)


def _steps(model: nn.Module) -> Mapping[str, Any]:
    stepper = stepper_of(model)
    return {} if stepper is None else stepper.state()


def _load_steps(model: nn.Module, values: Mapping[str, Any]) -> None:
    stepper = stepper_of(model)
    if stepper is not None:
        stepper.load(dict(values))


def _averages(model: nn.Module) -> Mapping[str, Piece]:
    averages = ema.pieces(model)
    return {f"{label}/{name}": piece for label, found in averages.items() for name, piece in found.items()}
