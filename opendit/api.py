"""The three verbs: `accelerate`, `explain`, `restore`.

`accelerate` is one straight line: config → checks → plan → apply → optimizer. Everything up to the plan only
reads, and a call that fails leaves the model and the optimizer as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TextIO, TypeVar, cast, overload

import torch
from torch import nn
from torch.optim import Optimizer

from opendit import optim
from opendit.config import BoosterConfig, OptimizerFactory
from opendit.patch import core
from opendit.patch.core import Patched, Plan

ModelT = TypeVar("ModelT", bound=nn.Module)
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


@overload
def accelerate(
    model: ModelT,
    booster_cfg: BoosterConfig[None] | Mapping[str, Any] | str | None = None,
    *,
    optimizer: None = None,
    sp_size: int = 1,
    family: str | None = None,
) -> ModelT: ...


@overload
def accelerate(
    model: ModelT,
    booster_cfg: BoosterConfig[None] | Mapping[str, Any] | str | None = None,
    *,
    optimizer: OptimizerT | Callable[[Iterable[nn.Parameter]], OptimizerT],
    sp_size: int = 1,
    family: str | None = None,
) -> tuple[ModelT, OptimizerT]: ...


@overload
def accelerate(
    model: ModelT,
    booster_cfg: BoosterConfig[OptimizerT] | BoosterConfig[Callable[[Iterable[nn.Parameter]], OptimizerT]],
    *,
    sp_size: int = 1,
    family: str | None = None,
) -> tuple[ModelT, OptimizerT]: ...


def accelerate(
    model: nn.Module,
    booster_cfg: Any = None,
    *,
    optimizer: Any = None,
    sp_size: int = 1,
    family: str | None = None,
) -> Any:
    """Makes `model` faster, in place, computing the same function with the same gradients.

    Args:
        model: a model of a known family (any, see `family`), plain or wrapped by `torch.compile` or DDP. It is edited
            in place; parameters, buffers and state-dict keys stay the same objects and names.
        booster_cfg: a `BoosterConfig`, a mapping of its fields, or a recipe (`"train"`, `"sample"`).
        optimizer: an optimizer on the model's parameters (the same object comes back), or a factory, such as
            `functools.partial(torch.optim.AdamW, lr=1e-4)`, which is called last.
        sp_size: over how many processes a sequence is spread, a divisor of their number. Every process makes this call,
            and those of one group (sp_size neighbours) run the model on the same inputs; see `seed` and
            `data_parallel_rank`. Where there is no process group, one is set up from torchrun's environment.
        family: None recognises the model. A name insists on that family. `"generic"` takes any model: modules that are
            recognised wherever they stand (attention, MLPs) are edited, the rest keeps its code, and `explain` says
            what was not fused.

    Returns:
        `model`, or `(model, optimizer)` where an optimizer was given here or in the config.

    Raises:
        ValueError: unknown model or setting, a request that can't run here, a model that is already
            accelerated or sharded. The message says what was given, what is allowed, and what to do.
        TypeError: an argument of the wrong type.
        NotImplementedError: a part of the interface whose work is not done yet, by name.
    """
    cfg = BoosterConfig.of(booster_cfg)
    optimizer = _one_optimizer(optimizer, cfg)
    _check_sp_size(sp_size)
    target = _target(model)
    if isinstance(optimizer, Optimizer):
        optim.check(optimizer, target)

    from opendit.plan import plan_for  # brings the kernels in; import opendit itself stays light

    _ensure_processes(target, sp_size)
    plan = plan_for(target, cfg, sp_size, family)
    before = dict(target.named_parameters())
    core.apply(target, plan)
    core.logger.info("%r; opendit.explain(model) shows it in full", plan)
    if optimizer is None:
        return model
    try:
        if isinstance(optimizer, Optimizer):
            optim.rebind(optimizer, before, dict(target.named_parameters()))
        else:
            optimizer = optim.build(optimizer, target)
    except BaseException:
        core.unapply(target)
        raise
    return Boosted(model, optimizer)


class Boosted(NamedTuple):
    """What `accelerate` returns when there is an optimizer."""

    model: nn.Module
    optimizer: Optimizer


def explain(
    model: nn.Module,
    booster_cfg: Any = None,
    *,
    sp_size: int = 1,
    family: str | None = None,
    file: TextIO | None = None,
) -> Plan:
    """Prints what was changed in `model`, by what, and what was not, and why; returns the plan.

    For a model that is not accelerated, it is what `accelerate` would do, given the same arguments; with `sp_size` > 1
    every process makes this call then.
    """
    from opendit.plan import describe, plan_for

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: a torch.nn.Module")
    target = unwrap(model)
    applied = core.plan_of(target)
    given = [("booster_cfg", booster_cfg is not None), ("sp_size", sp_size != 1), ("family", family is not None)]
    if applied is not None and any(is_given for _, is_given in given):
        name = next(name for name, is_given in given if is_given)
        raise ValueError(f"{name}: the model is already accelerated; explain(model) shows its plan")
    _check_sp_size(sp_size)
    _ensure_processes(target, sp_size)
    plan = applied or plan_for(target, BoosterConfig.of(booster_cfg), sp_size, family)
    print(describe(plan, target, applied=applied is not None), file=file or sys.stdout)
    return plan


def restore(model: ModelT) -> ModelT:
    """Undoes `accelerate` in place and returns `model` as it came in: its classes, outputs and keys.

    Raises `ValueError` if the model is not accelerated, or was sharded since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: an accelerated torch.nn.Module")
    target = unwrap(model)
    if core.plan_of(target) is None and not any(isinstance(m, Patched) for m in target.modules()):
        raise ValueError(f"model: {type(target).__name__} is not accelerated; there is nothing to restore")
    core.unapply(target)
    from opendit.patch import graphs

    graphs.release(list(target.parameters()))
    return model


def _one_optimizer(given: Any, cfg: BoosterConfig[Any]) -> Optimizer | OptimizerFactory | None:
    if given is not None and cfg.optimizer is not None:
        raise ValueError("optimizer: given both to accelerate and in booster_cfg; leave one of them out")
    if given is None:
        return cast("Optimizer | OptimizerFactory | None", cfg.optimizer)
    return cast("Optimizer | OptimizerFactory", BoosterConfig(optimizer=given).optimizer)  # checked there


def _check_sp_size(sp_size: object) -> None:
    if not isinstance(sp_size, int) or isinstance(sp_size, bool):
        raise TypeError(f"sp_size: got {sp_size!r}; allowed: a positive int")
    if sp_size < 1:
        raise ValueError(f"sp_size: got {sp_size}; allowed: 1 or more, a divisor of the number of processes")


def _ensure_processes(model: nn.Module, sp_size: int) -> None:
    """With `sp_size` > 1: a process group, whose processes it divides."""
    if sp_size > 1:
        from opendit.fastseq import mesh

        mesh.ensure_world(next((p.device for p in model.parameters()), torch.device("cpu")))
        mesh.check_size(sp_size)


def _target(model: object) -> nn.Module:
    """The model proper, inside its wrappers, if it can be accelerated."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got {type(model).__name__}; allowed: a torch.nn.Module that is not scripted")
    target = unwrap(model)
    if core.plan_of(target) is not None or any(isinstance(m, Patched) for m in target.modules()):
        raise ValueError(
            f"model: {type(target).__name__} is already accelerated; call opendit.restore(model) first to change how"
        )
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharded or any(hasattr(p, "device_mesh") for p in target.parameters()):
        raise ValueError(
            f"model: {type(target).__name__} is already sharded; call accelerate first and shard what it returns"
        )
    return target


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner  # torch.compile's wrapper
        else:
            return model
