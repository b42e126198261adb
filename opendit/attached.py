"""What else belongs to a model's training state, kept beside the model: its EMA, its rule for skipped steps.

Whoever makes such a thing attaches it; checkpoints save and load whatever is attached, without knowing what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from opendit.pieces import Piece


@dataclass(frozen=True)
class Attached:
    """How one thing's state is read and written; each function is given the model, so that nothing here keeps it alive.

    Args:
        state: the thing's numbers, as plain Python values.
        load_state: takes such values back; raises `ValueError`, before it changes anything, where they don't fit.
        pieces: this process's pieces of its tensors, by name; writing to their values loads them. When loading it is
            called after `load_state`, which may make room for them.
    """

    state: Callable[[nn.Module], Mapping[str, Any]]
    load_state: Callable[[nn.Module, Mapping[str, Any]], None]
    pieces: Callable[[nn.Module], Mapping[str, Piece]] = lambda model: {}


_attached: WeakKeyDictionary[nn.Module, dict[str, Attached]] = WeakKeyDictionary()


def attach(model: nn.Module, name: str, thing: Attached) -> None:
    """Makes `thing` part of the state of `model`, the one inside all wrappers."""
    _attached.setdefault(model, {})[name] = thing


def detach(model: nn.Module, name: str) -> None:
    """Undoes `attach`, if it was done."""
    _attached.get(model, {}).pop(name, None)


def attached(model: nn.Module) -> dict[str, Attached]:
    """What is attached to `model`, by name."""
    return dict(_attached.get(model, {}))
