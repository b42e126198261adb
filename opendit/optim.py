"""Keeps the caller's optimizer true to the model's parameters, whatever became of them.

An optimizer built before `accelerate` holds the parameters it was given. An engine may replace those; then
every group is re-bound in place, so that the same object, and an LR scheduler built on it, go on working.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opendit.config import OptimizerFactory

logger = logging.getLogger("opendit")


def check(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises `ValueError` where `optimizer` holds no parameter of `model`: it would train something else.

    Where it holds only some of the trainable ones, that is logged.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name for name, p in model.named_parameters() if id(p) in held}
    left = [name for name, p in model.named_parameters() if p.requires_grad and name not in trained]
    if trained and left:
        logger.warning("%d trainable parameters of the model are not in the optimizer, such as %s", len(left), left[0])
    if not trained:
        raise ValueError(
            "optimizer: got an optimizer that holds none of the model's parameters; allowed: one built on "
            "model.parameters(), or a factory. Was the model copied or moved to new parameters after the "
            "optimizer was built? Build the optimizer on the model that is passed to accelerate"
        )


def build(factory: OptimizerFactory, model: nn.Module) -> Optimizer:
    """Calls the factory on the model's final parameters; raises `TypeError` if no optimizer comes back."""
    optimizer = factory(model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: the factory returned {type(optimizer).__name__}; allowed: a callable that takes the "
            "parameters and returns a torch.optim.Optimizer"
        )
    return optimizer


def rebind(optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
    """Points every group of `optimizer` at the parameters that took the old ones' place, in place.

    Args:
        before, after: the model's named parameters before and after they were replaced.

    Groups, their options and the optimizer's identity stay. Per-parameter state moves along with its
    parameter where every tensor in it that has the old shape also fits the new parameter.

    Raises:
        ValueError: a parameter has disappeared, or its state can't be carried to what replaced it. Nothing
            has been changed then.
    """
    successor: dict[int, nn.Parameter] = {}
    names: dict[int, str] = {}
    for name, old in before.items():
        names[id(old)] = name
        if name in after:
            successor[id(old)] = after[name]

    moves: list[tuple[nn.Parameter, nn.Parameter]] = []
    for group in optimizer.param_groups:
        for old in group["params"]:
            if id(old) not in names:
                continue  # not the model's: a joint optimizer may train other things too
            name = names[id(old)]
            if id(old) not in successor:
                raise ValueError(
                    f"optimizer: its parameter {name!r} is no longer in the model; pass a factory instead of "
                    "an optimizer, so that it is built on the model's final parameters"
                )
            new = successor[id(old)]
            if new is not old:
                _check_state(name, old, new, optimizer.state.get(old, {}))
                moves.append((old, new))

    replaced = {id(old): new for old, new in moves}
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    for old, new in moves:
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def _check_state(name: str, old: nn.Parameter, new: nn.Parameter, state: Mapping[str, Any]) -> None:
    carried = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0]
    if carried and (type(new.data) is not type(old.data) or new.shape != old.shape or new.device != old.device):
        raise ValueError(
            f"optimizer: the state of {name!r} ({', '.join(carried)}) can't be carried from "
            f"{type(old.data).__name__} {tuple(old.shape)} on {old.device} to {type(new.data).__name__} "
            f"{tuple(new.shape)} on {new.device}; call accelerate before the first optimizer step, or load the "
            "optimizer's state afterwards"
        )
