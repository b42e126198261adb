"""How a model is given its condition, whatever that is.

A condition is a tensor, the model's third argument (class labels [B], say), or a dict of keyword arguments, each with
one row per sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Condition = Tensor | Mapping[str, Tensor]


def conditioned(model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return model(x, t, **cond) if isinstance(cond, Mapping) else model(x, t, cond)


def both(first: Condition, second: Condition) -> Condition:
    """The rows of one, then those of the other."""
    if isinstance(first, Mapping):
        return {name: torch.cat([value, second[name]]) for name, value in first.items()}
    return torch.cat([first, second])


def rows(cond: Condition, start: int, stop: int) -> Condition:
    if isinstance(cond, Mapping):
        return {name: value[start:stop] for name, value in cond.items()}
    return cond[start:stop]


def count(cond: Condition) -> int:
    return len(next(iter(cond.values())) if isinstance(cond, Mapping) else cond)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] to [B, 1, 1, …], with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
