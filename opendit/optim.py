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


def check_divisible(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises `ValueError` where `optimizer` could not go on with each parameter divided among processes.

    That is where it also holds parameters of others, which nobody divides or averages; where it keeps parameters
    elsewhere than in its groups, where `rebind` does not reach them; or state of another shape than the parameter's.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"optimizer: its group {index} holds a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's; allowed with a plugin that divides parameters: the model's alone. Give others an "
                    "optimizer of their own"
                )
            state = optimizer.state.get(parameter, {})
            odd = [k for k, v in state.items() if not _follows(v, parameter)]
            if odd:
                raise ValueError(
                    f"optimizer: the state of {names[id(parameter)]!r} ({', '.join(odd)}) can't be divided as its "
                    "parameter is; call accelerate before the first optimizer step, or pass a factory"
                )
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state") and _holds(value, names, optimizer):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__}.{name} holds parameters of the model besides its groups, which "
                "can't be exchanged there; pass a factory instead of an optimizer, so that it is built on the "
                "model's final parameters"
            )


def _follows(value: Any, parameter: nn.Parameter) -> bool:
    """Whether an entry of the state is a number, or one tensor per parameter, element by element."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 or value.shape == parameter.shape
    return value is None or isinstance(value, (bool, int, float, str))


def _holds(value: Any, names: Mapping[int, str], optimizer: Optimizer, depth: int = 3) -> bool:
    if isinstance(value, torch.Tensor):
        return id(value) in names
    if depth == 0 or any(value is group["params"] for group in optimizer.param_groups):
        return False  # the groups' own lists are changed in place
    if isinstance(value, Mapping):
        return any(_holds(v, names, optimizer, depth - 1) for v in (*value.keys(), *value.values()))
    return isinstance(value, (list, tuple, set)) and any(_holds(v, names, optimizer, depth - 1) for v in value)


def rebind(optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
    """Points every group of `optimizer` at the parameters that took the old ones' place, in place.

    Args:
        before, after: the model's named parameters before and after they were replaced.

    Groups, their options and the optimizer's identity stay. Per-parameter state moves along with its
    parameter where every tensor in it that has the old shape also fits the new parameter; where the new one is a
    DTensor, it is divided in the same way.

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
        group["params"][:] = [replaced.get(id(p), p) for p in group["params"]]  # some optimizers keep the list
    for old, new in moves:
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {key: _divided(value, new) for key, value in state.items()}


def _divided(value: Any, parameter: nn.Parameter) -> Any:
    """A state's whole tensor as its parameter is: on its device, and this process's part of it."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    whole = value.detach().to(mesh.device_type)
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # from what every process has
    local = part.to_local().to(parameter.to_local().device)  # type: ignore[attr-defined]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _check_state(name: str, old: nn.Parameter, new: nn.Parameter, state: Mapping[str, Any]) -> None:
    carried = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0]
    if hasattr(new, "placements") and new.shape == old.shape and all(state[key].shape == old.shape for key in carried):
        return
    if carried and (type(new.data) is not type(old.data) or new.shape != old.shape or new.device != old.device):
        raise ValueError(
            f"optimizer: the state of {name!r} ({', '.join(carried)}) can't be carried from "
            f"{type(old.data).__name__} {tuple(old.shape)} on {old.device} to {type(new.data).__name__} "
            f"{tuple(new.shape)} on {new.device}; call accelerate before the first optimizer step, or load the "
            "optimizer's state afterwards"
        )
