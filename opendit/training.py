"""What `accelerate` knows of a model that trains: its engine and its optimizer. Kept outside the model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from opendit.config import BoosterConfig
from opendit.engines.engine import Engine, Placed
from opendit.wrapping import unwrap


@dataclass(frozen=True)
class Training:
    """One model's. It keeps nothing alive: models and optimizers are referred to weakly.

    Attributes:
        cfg: what was asked for.
        sp_size: how many processes share a sequence.
        engine: what it was placed on; None without a plugin.
        lines: for `explain`.
        model, optimizer: what `accelerate` returned, called to get them; `optimizer()` is None where there was none.
        hooks: handles of those that were put on the optimizer or the wrapper.
    """

    cfg: BoosterConfig[Any]
    sp_size: int
    engine: Engine | None
    lines: tuple[str, ...]
    model: Callable[[], nn.Module | None]
    optimizer: Callable[[], Optimizer | None]
    hooks: list[Any] = field(default_factory=list)

    def let_go(self) -> None:
        """Takes the hooks off."""
        while self.hooks:
            self.hooks.pop().remove()

    def placed(self) -> nn.Module:
        """The model on its engine. Raises `ValueError` where what `accelerate` returned was dropped."""
        model = self.model()
        if model is None:
            raise ValueError("model: the wrapper that accelerate returned is gone; keep it, and pass it")
        return model


# Keyed by the model inside its wrappers.
_trainings: WeakKeyDictionary[nn.Module, Training] = WeakKeyDictionary()


def remember(model: nn.Module, cfg: BoosterConfig[Any], sp_size: int, engine: Engine | None, placed: Placed) -> None:
    """Remembers what `accelerate` did with `model`, which is inside `placed.model`."""
    optimizer = weakref.ref(placed.optimizer) if placed.optimizer is not None else _none
    _trainings[model] = Training(cfg, sp_size, engine, placed.lines, weakref.ref(placed.model), optimizer)


def _none() -> None:
    return None


def forget(model: nn.Module) -> None:
    known = _trainings.pop(model, None)
    if known is not None:
        known.let_go()


def training_of(model: nn.Module) -> Training | None:
    """What `accelerate` remembered of `model`, which may be inside its wrapper; None if there is nothing."""
    return _trainings.get(unwrap(model))


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """A context for all micro-batches of a step but the last: their gradients are added up with less communication.

        for i, micro_batch in enumerate(micro_batches):
            with opendit.no_sync(model) if i + 1 < len(micro_batches) else contextlib.nullcontext():
                (loss(model, micro_batch) / len(micro_batches)).backward()

    Forward and backward belong in it. The gradients after the last micro-batch are the same without it, whatever the
    plugin. What it spares: with "ddp" and "zero1" all communication of gradients until the last backward; with the
    others, whose gradients are divided by promise, that between nodes. See docs/engines.md.

    Args:
        model: what `accelerate` returned; DDP that was put on by hand is understood as well.

    Raises `TypeError` where `model` is no module, `ValueError` where it is sharded by hand.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: the torch.nn.Module that accelerate returned")
    training = training_of(model)
    if training is not None and training.engine is not None:
        return training.engine.no_sync(training.placed())
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "model: got one that was sharded by hand; allowed: a model placed by plugin=..., DDP, or a plain one. Use "
            "FSDPModule.set_requires_gradient_sync"
        )
    return contextlib.nullcontext()
