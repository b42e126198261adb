"""A module's and an optimizer's state, by name: this process's pieces of its tensors, and the rest as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit.checkpoint.errors import CheckpointError
from opendit.checkpoint.plain import decode, encode
from opendit.pieces import Piece, piece_of
from opendit.wrapping import unwrap

# How an optimizer computes, not what: these stay as the optimizer at hand has them.
_HOW = ("foreach", "fused", "capturable", "differentiable")


def module_pieces(module: nn.Module, prefix: str) -> dict[str, Piece]:
    """Pieces of what is in the state dict, under `prefix`/name."""
    found = {}
    for name, value in unwrap(module).state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{prefix}: its state {name!r} is {type(value).__name__}; allowed: tensors")
        found[f"{prefix}/{name}"] = _piece(f"{prefix}/{name}", value)
    return found


def _piece(key: str, value: Tensor) -> Piece:
    try:
        return piece_of(value)
    except ValueError as error:
        raise CheckpointError(f"{key}: {error}") from error


def _parameters(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[int, str, nn.Parameter]]:
    """Group, name and parameter of all that `optimizer` holds."""
    names = {id(p): name for name, p in unwrap(model).named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise CheckpointError(
                    f"optimizer: a parameter of shape {tuple(p.shape)} in its group {number} is not one of the "
                    "model's; pass a module that holds all of them, such as torch.nn.ModuleDict"
                )
            yield number, names[id(p)], p
    strangers = [key for key in optimizer.state if not (isinstance(key, Tensor) and id(key) in names)]
    if strangers:
        raise CheckpointError(f"optimizer: has state for {strangers[:3]!r}; allowed: for parameters of the model")


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Any], dict[str, Piece]]:
    """Plain values and pieces. Tensors lie under optimizer/(parameter)/(name), or optimizer/group(number)/(option)."""
    groups: list[dict[str, Any]] = [{"parameters": []} for _ in optimizer.param_groups]
    values: dict[str, dict[str, Any]] = {}
    pieces: dict[str, Piece] = {}
    for number, name, p in _parameters(optimizer, model):
        groups[number]["parameters"].append(name)
        tensors: dict[str, Tensor] = {}
        state = optimizer.state.get(p, {})
        values[name] = {key: encode(value, f"optimizer/{name}/{key}", tensors) for key, value in state.items()}
        pieces.update((key, _piece(key, value)) for key, value in tensors.items())
    for number, group in enumerate(optimizer.param_groups):
        tensors = {}
        options = {key: value for key, value in group.items() if key != "params"}
        groups[number]["options"] = encode(options, f"optimizer/group{number}", tensors)
        pieces.update((key, _piece(key, value)) for key, value in tensors.items())
    return {"kind": type(optimizer).__name__, "groups": groups, "values": values}, pieces


class OptimizerLoad:
    """Everything that an optimizer gets, made ready beside it, so that it changes at once or not at all.

    Args:
        saved: the plain values that `optimizer_state` gave.
        records: shape and dtype of each saved tensor.

    `pieces` are to be filled; `finish` then puts all in place. Raises `CheckpointError` where the optimizer is of
    another kind, or its groups hold other parameters.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> None:
        if saved["kind"] != type(optimizer).__name__:
            raise CheckpointError(f"optimizer: got {type(optimizer).__name__}; the checkpoint is from {saved['kind']}")
        held: list[list[str]] = [[] for _ in optimizer.param_groups]
        parameters = {}
        for number, name, p in _parameters(optimizer, model):
            held[number].append(name)
            parameters[name] = (p, optimizer.param_groups[number])
        for number, group in enumerate(saved["groups"]):
            here = held[number] if number < len(held) else []
            if set(group["parameters"]) != set(here) or len(saved["groups"]) != len(held):
                other = sorted(set(group["parameters"]) ^ set(here))[:3]
                raise CheckpointError(
                    f"optimizer: the checkpoint has {len(saved['groups'])} groups, this optimizer {len(held)}; group "
                    f"{number} differs in {other}. Build it with the groups that it was saved with"
                )
        self._optimizer, self._parameters = optimizer, parameters
        self._tensors: dict[str, Tensor] = {}
        self.pieces: dict[str, Piece] = {}
        for name, (p, group) in parameters.items():
            for key in _tensor_keys(saved["values"][name]):
                self._add(key, _room(key, p, group, optimizer.state.get(p, {}), _record(records, key)))
        for key in _tensor_keys(saved["groups"]):
            record = _record(records, key)
            self._add(key, torch.empty(record["shape"], dtype=getattr(torch, record["dtype"])))
        # Now, for it may fail; the tensors in it are filled later.
        self._options = [decode(group["options"], self._tensors) for group in saved["groups"]]
        self._states = {name: decode(saved["values"][name], self._tensors) for name in parameters}

    def _add(self, key: str, tensor: Tensor) -> None:
        self._tensors[key] = tensor
        self.pieces[key] = _piece(key, tensor)

    def finish(self) -> None:
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            for option, value in options.items():
                now = group.get(option)
                if isinstance(now, Tensor) and isinstance(value, Tensor):
                    now.copy_(value)  # a learning rate that a captured graph reads
                elif option not in _HOW:
                    group[option] = value
        for name, (p, _) in self._parameters.items():
            if self._states[name]:
                self._optimizer.state[p] = self._states[name]
            else:
                self._optimizer.state.pop(p, None)


def _tensor_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if value.get("!") == "tensor":
            yield value["is"]
        else:
            for v in value.values():
                yield from _tensor_keys(v)
    elif isinstance(value, list):
        for v in value:
            yield from _tensor_keys(v)


def _record(records: Mapping[str, Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    if key not in records:
        raise CheckpointError(f"{key}: the checkpoint does not hold it")
    return records[key]


def _room(key: str, p: Tensor, group: Mapping[str, Any], now: Mapping[str, Any], record: Mapping[str, Any]) -> Tensor:
    """An empty tensor for the saved state `key` of `p`: like the optimizer's own, or as torch would make it."""
    shape, dtype = tuple(record["shape"]), getattr(torch, record["dtype"])
    like = now.get(key.rpartition("/")[2])
    if isinstance(like, Tensor) and tuple(like.shape) == shape:
        return torch.empty_like(like, dtype=dtype)
    if shape == tuple(p.shape) and shape:
        return torch.empty_like(p.detach(), dtype=dtype)
    if shape and hasattr(p, "device_mesh"):
        raise CheckpointError(
            f"{key}: has shape {shape}, the parameter {tuple(p.shape)}, and how the optimizer would divide it is not "
            "known before its first step; take one step, then load"
        )
    on_host = not shape and not (group.get("fused") or group.get("capturable"))
    return torch.empty(shape, dtype=dtype, device="cpu" if on_host else p.device)
