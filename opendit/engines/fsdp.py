"""torch's FSDP2: each process holds a part of every parameter, gradient and optimizer state, as DTensors.

    one unit's forward    all-gather its parameters ── compute ── keep them (zero1, zero2) or free them (zero3, gemini)
    its backward          have or gather them       ── compute ── reduce-scatter its gradients to their mean, free

Units are the blocks; what is outside them is one more. They are divided over all dp × sp processes, for each computes a
share of every gradient; over several nodes, within a node, and averaged between nodes (HSDP: replicas of a division).

Bytes per parameter of n bytes, with AdamW, N processes that divide: n/N parameter + n/N gradient + 2n/N moments; from
forward to backward g more, the bytes of a gathered parameter: of all units (zero1, zero2), or of two or three.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from opendit import optim
from opendit.config import OptimizerFactory
from opendit.engines.engine import Placed, Setup
from opendit.fastseq.mesh import device_type

_WHAT = {
    "zero1": "gathered once per step and kept to its last backward; gradients whole while no_sync adds them up",
    "zero2": "gathered in the forward and kept until the backward; gradients always divided",
    "zero3": "gathered block by block, freed after its forward, gathered again in its backward; gradients divided",
    "gemini": "in host memory, as gradients and optimizer states are; gathered block by block on the device",
}


class FSDP:
    source = "torch"
    moves_parameters = "FSDP2 gathers parameters into memory that it frees, so they have no lasting address"

    def __init__(self, plugin: str, like: str | None = None) -> None:
        self.plugin = plugin
        self.kind = like or plugin
        self.frees = self.kind in ("zero3", "gemini")

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        _check_parameters(model, setup)
        if isinstance(optimizer, Optimizer):
            optim.check_divisible(optimizer, model)
        if self.kind == "gemini" and device_type() == "cuda" and "gloo" not in str(dist.get_backend_config()):
            raise ValueError(
                f"plugin: got 'gemini' with a process group of {dist.get_backend()} alone; allowed: one that works on "
                'the CPU too, where its gradients are. Call torch.distributed.init_process_group("cpu:gloo,cuda:nccl") '
                "first, or leave that to accelerate"
            )

    def promises(self, setup: Setup) -> list[str]:
        gathered = "bf16 (where a block has linears only)" if setup.precision == "bf16" else "their own dtype"
        reduced = "bf16" if setup.reduction == "bf16" else "fp32, or their own dtype where that is wider"
        held = "on the host " if self.kind == "gemini" else ""
        more = "+ g of two or three blocks at a time" if self.frees else "+ g from forward to backward"
        return [
            f"torch's FSDP2 ({self.kind}); parameters are divided, {_WHAT[self.kind]}",
            f"parameters are gathered in {gathered}; gradients are averaged over the world in {reduced}",
            "frozen parameters outside blocks stay whole and as they are",
            f"bytes per parameter of n bytes with AdamW, N processes that divide: {held}n/N (parameter) + n/N "
            f"(gradient) + 2n/N (moments), {more}, g the bytes of a gathered one",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        kind = device_type()
        mesh, said = _mesh(kind)
        before = dict(model.named_parameters())
        ignored = _left_whole(model, setup)
        _as_first_process_has(model, kind)
        for parameter in ignored:
            parameter.data = parameter.data.to(kind)
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored}
        if self.kind == "gemini":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
        else:
            options["offload_policy"] = OffloadPolicy()
        units = [model.get_submodule(name) for name in setup.units]
        for unit in units:
            fully_shard(unit, reshard_after_forward=self.frees, mp_policy=_policy(unit, setup), **options)
        fully_shard(model, reshard_after_forward=False, mp_policy=_policy(None, setup), **options)
        in_turn = [model.get_submodule(u) for u in setup.units if not any(u.startswith(v + ".") for v in setup.units)]
        for unit, following in itertools.pairwise(in_turn):
            # Backward prefetches the unit before by itself; in the forward the host must be told what comes next.
            _fsdp(unit).set_modules_to_forward_prefetch([following])
        model.register_forward_hook(_free_after_inference)
        for name in setup.entries:
            register_fsdp_forward_method(model, name)
            setattr(model, name, _freeing(model, getattr(model, name)))
        if isinstance(optimizer, Optimizer):
            optim.rebind(optimizer, before, dict(model.named_parameters()))
        elif optimizer is not None:
            optimizer = optim.build(optimizer, model)
        divided = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in ignored)
        lines = [said, *self.promises(setup)]
        lines.append(f"{divided} parameters are divided, {sum(p.numel() for p in ignored)} whole")
        return Placed(model, optimizer, tuple(lines))

    @contextlib.contextmanager
    def _adding_up(self, model: nn.Module) -> Iterator[None]:
        fsdp = _fsdp(model)
        if self.kind == "zero1":
            switch = fsdp.set_requires_gradient_sync
        else:
            switch = fsdp.set_requires_all_reduce
        try:
            switch(False)
            fsdp.set_reshard_after_backward(self.frees)
            yield
        finally:
            switch(True)
            fsdp.set_reshard_after_backward(True)

    def stepped(self, placed: nn.Module) -> None:
        _free(placed)  # what is gathered is of the old parameters

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        return self._adding_up(placed)

    def undo(self, placed: nn.Module) -> NoReturn:
        raise ValueError(
            f"model: plugin={self.plugin!r} divided its parameters, which restore does not put together again. Take "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)), whose keys are the plain model's, and load it into a plain model"
        )


def _fsdp(module: nn.Module) -> Any:
    """`module` as the FSDPModule that it is."""
    return module


def _check_parameters(model: nn.Module, setup: Setup) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"plugin: got {setup.plugin!r} for a model without trainable parameters; leave plugin out for sampling"
        )
    owners: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((u for u in setup.units if name.startswith(u + ".")), "")
        known = owners.setdefault(id(parameter), (unit, name))
        if known[0] != unit:
            raise ValueError(
                f"plugin: got {setup.plugin!r}, but {name!r} and {known[1]!r} are one parameter in two units of FSDP2; "
                "allowed: parameters that are shared within a block only. Take plugin='ddp'"
            )
        if parameter.is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device; allowed: parameters with values. Call model.to_empty and "
                "initialise or load them first"
            )


def _left_whole(model: nn.Module, setup: Setup) -> set[nn.Parameter]:
    """Frozen parameters outside blocks: position embeddings, which low-precision gathers would round."""
    inside = tuple(u + "." for u in setup.units)
    return {p for name, p in model.named_parameters() if not p.requires_grad and not name.startswith(inside)}


def _policy(unit: nn.Module | None, setup: Setup) -> Any:
    """How a unit's parameters are gathered and its gradients reduced.

    Gathers are in bf16 only where autocast would have cast each of these parameters itself, so that nothing else is
    computed than without FSDP2: blocks of linears, whose norms have no weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    lower = None
    if unit is not None and setup.precision == "bf16" and _linears_only(unit):
        lower = torch.bfloat16
    reduce = torch.bfloat16 if setup.reduction == "bf16" else torch.float32 if lower is not None else None
    return MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=reduce, cast_forward_inputs=False)


def _linears_only(unit: nn.Module) -> bool:
    return all(
        type(module) is nn.Linear and p.dtype == torch.float32
        for module in unit.modules()
        for p in module.parameters(recurse=False)
    )


def _mesh(kind: str) -> tuple[Any, str]:
    """The mesh that parameters are divided over, and what to say of it: [nodes, processes of one], or all alike."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = dist.get_rank(), dist.get_world_size()
    places: list[Any] = [None] * world
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    dist.all_gather_object(places, (local, int(os.environ.get("LOCAL_RANK", rank % max(local, 1)))))
    even = all(place == (local, r % local) for r, place in enumerate(places)) and world % local == 0
    if even and 1 < local < world:
        mesh = init_device_mesh(kind, (world // local, local), mesh_dim_names=("replicate", "shard"))
        return (
            mesh,
            f"over {world // local} nodes of {local} processes ({kind}): divided within a node, alike between (HSDP)",
        )
    why = "" if even else "; nodes have different numbers of processes, so nodes are not told apart"
    return init_device_mesh(kind, (world,), mesh_dim_names=("shard",)), f"divided over {world} processes ({kind}){why}"


def _as_first_process_has(model: nn.Module, kind: str) -> None:
    """Every process takes process 0's values, as DDP sees to, or each would keep a part of its own model."""
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to(kind).contiguous()
        dist.broadcast(there, 0)
        if there.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(there)


def _free(model: nn.Module) -> None:
    """Frees what is gathered of a model that is between steps."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _free_after_inference(model: nn.Module, args: Any, output: Any) -> None:
    """Gathered copies don't outlive a forward without backward: whoever changes parameters then would not be seen."""
    if not torch.is_grad_enabled():
        _free(model)


def _freeing(model: nn.Module, method: Any) -> Any:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        _free_after_inference(model, args, output)
        return output

    return run


ENGINES = (FSDP("zero1"), FSDP("zero2"), FSDP("zero3"), FSDP("fsdp", like="zero3"), FSDP("gemini"))
