"""What an engine is: a name that `BoosterConfig` may say, checks that change nothing, and `place`.

The gradient contract holds whatever the engine: after backward, a parameter's gradient is the mean over all dp × sp
processes, whole or this process's part of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from opendit.config import OptimizerFactory


@dataclass(frozen=True)
class Setup:
    """What was asked for, and what an engine may need to know of the model.

    Attributes:
        plugin, precision, reduction: as in `BoosterConfig`.
        sp_size: how many processes share a sequence; gradients are averaged over them too.
        units: names of the modules that are gathered and freed as one, each before those that contain it: the blocks,
            and modules in them that the model also calls from outside.
        entries: names of methods besides forward that run the model, such as `forward_with_cfg`.
        device: where the model is.
    """

    plugin: str
    precision: str
    reduction: str
    sp_size: int
    units: tuple[str, ...]
    entries: tuple[str, ...]
    device: torch.device


class Placed(NamedTuple):
    """A model on its engine.

    Attributes:
        model: what `accelerate` returns, the model itself or a wrapper around it.
        optimizer: what `accelerate` returns with it; None where there was none.
        lines: for `explain`: the mesh, what is divided among which processes, bytes per parameter.
    """

    model: nn.Module
    optimizer: Optimizer | None
    lines: tuple[str, ...]


class Engine(Protocol):
    """One plugin of one engine."""

    source: str
    """What `BoosterConfig.engine` says."""
    plugin: str
    """What `BoosterConfig.plugin` says."""
    moves_parameters: str | None
    """Why parameters are not at one address from step to step, which CUDA graphs of blocks need; None: they are."""

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        """Raises `ValueError`, `NotImplementedError` or `ImportError` where it can't be placed. Changes nothing."""

    def promises(self, setup: Setup) -> list[str]:
        """What it does, for `explain`, without a process group."""

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        """Puts the model there; a process group is set up. The optimizer: `opendit.optim` re-binds or builds it."""

    def stepped(self, placed: nn.Module) -> None:
        """Called after each step of the optimizer, whether `place` was given it or it came later."""

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        """A context in which backward adds gradients up with less communication; see `opendit.no_sync`."""

    def undo(self, placed: nn.Module) -> nn.Module:
        """The model without the engine; raises `ValueError`, with what to do instead, where that can't be."""


_found: dict[tuple[str, str], Engine] = {}


def engines() -> dict[tuple[str, str], Engine]:
    """Every engine by (source, plugin): what the files of this package end in as ``ENGINES``."""
    if not _found:
        package = importlib.import_module("opendit.engines")
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for engine in getattr(module, "ENGINES", ()):
                _found[engine.source, engine.plugin] = engine
    return _found


def find(source: str, plugin: str) -> Engine:
    """Raises `ValueError` where this source has no such plugin."""
    if (source, plugin) not in engines():
        allowed = ", ".join(sorted(repr(name) for given, name in engines() if given == source)) or "none yet"
        raise ValueError(
            f"plugin: got {plugin!r} with engine={source!r}; allowed with it: {allowed}. Choose one of them, or "
            "another engine"
        )
    return engines()[source, plugin]
