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
    """One thing's state.

    Args:
        state: its numbers, as plain Python values.
        load_state: takes such values back.
        pieces: this process's pieces of its tensors, by name; writing to their values loads them. Called after
            `load_state` when loading, so that it may make them.
    """

    state: Callable[[], Mapping[str, Any]]
    load_state: Callable[[Mapping[str, Any]], None]
    pieces: Callable[[], Mapping[str, Piece]] = dict


_attached: WeakKeyDictionary[nn.Module, dict[str, Attached]] = WeakKeyDictionary()


def attach(model: nn.Module, name: str, thing: Attached) -> None:
    """Makes `thing` part of the state of `model`, the one inside all wrappers."""
    _attached.setdefault(model, {})[name] = thing


def attached(model: nn.Module) -> dict[str, Attached]:
    return dict(_attached.get(model, {}))
