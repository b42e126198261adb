"""The verbs: `accelerate`, `explain`, `restore`, and `attach` for optimizers that come later.

`accelerate` is one straight line: config → checks → plan → apply → place → optimizer → attach. Everything up to the
plan only reads, and a call that fails leaves the model and the optimizer as they were; only an engine that fails
half-way, after its own checks, may leave a part of the model sharded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TextIO, TypeVar, cast, overload

import torch
from torch import nn
from torch.optim import Optimizer

from opendit import attaching, engines, optim, training
from opendit.config import DEFAULT_TIMEOUT, BoosterConfig, OptimizerFactory
from opendit.engines import Engine, Placed
from opendit.patch import core, lowered
from opendit.patch.core import Patched, Plan
from opendit.wrapping import device_of, unwrap

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
        optimizer: an optimizer on the model's parameters (the same object comes back; where ColossalAI divides its
            steps, a wrapper that has it as `.inner`), or a factory, such as
            `functools.partial(torch.optim.AdamW, lr=1e-4)`, which is called last. With a plugin it is called once
            before that, on the parameters as they came in: what can't be used is refused while nothing has changed.
        sp_size: over how many processes a sequence is spread, a divisor of their number. Every process makes this call,
            and those of one group (sp_size neighbours) run the model on the same inputs; see `seed` and
            `data_parallel_rank`. Where there is no process group, one is set up from torchrun's environment.
        family: None recognises the model. A name insists on that family. `"generic"` takes any model: modules that are
            recognised wherever they stand (attention, MLPs) are edited, the rest keeps its code, and `explain` says
            what was not fused.

    Returns:
        `model`, or `(model, optimizer)` where an optimizer was given here or in the config. With `plugin="ddp"` the
        model comes back inside torch's DistributedDataParallel.

    Raises:
        ValueError: unknown model or setting, a request that can't run here, a model that is already
            accelerated or sharded. The message says what was given, what is allowed, and what to do.
        TypeError: an argument of the wrong type.
        NotImplementedError: a part of the interface whose work is not done yet, by name.
    """
    cfg = BoosterConfig.of(booster_cfg)
    optimizer = _one_optimizer(optimizer, cfg)
    _check_sp_size(sp_size)
    if cfg.sampling and optimizer is not None:
        raise ValueError(
            f"optimizer: got {type(optimizer).__name__} for a model that is to sample; allowed: None. Leave it out, or "
            "take the recipe 'train'"
        )
    target = _target(model)
    if isinstance(optimizer, Optimizer):
        optim.check(optimizer, target)

    from opendit.plan import plan_for  # brings the kernels in; import opendit itself stays light

    engine = _engine(cfg, model, target)
    _ensure_processes(target, sp_size, cfg)
    plan = plan_for(target, cfg, sp_size, family)
    if isinstance(optimizer, Optimizer):
        attaching.check(target, optimizer, plan.stepping)
    if engine is not None:
        engine.check(target, optimizer, _setup(target, cfg, sp_size, plan))
        plan = _without_graphs(plan, engine)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            attaching.check(target, optim.build(optimizer, target), plan.stepping)  # an engine can't be undone
    before = dict(target.named_parameters())
    core.apply(target, plan)
    core.logger.info("%r; opendit.explain(model) shows it in full", plan)
    try:
        if plan.choices.sampling is not None:
            lowered.lower(target, plan.choices.sampling.weights)
        if engine is not None:
            placed = engine.place(target, optimizer, _setup(target, cfg, sp_size, plan))
        else:
            if isinstance(optimizer, Optimizer):
                optim.rebind(optimizer, before, dict(target.named_parameters()))
            elif optimizer is not None:
                optimizer = optim.build(optimizer, target)
            placed = Placed(model, optimizer, ())
        if placed.optimizer is not None:
            attaching.put_in(target, placed.optimizer, plan.stepping)
        elif cfg.ema is not None or cfg.skip_nonfinite:
            core.logger.warning("ema and skip_nonfinite wait for an optimizer: opendit.attach(model, optimizer)")
        elif engine is not None and engine.moves_parameters is not None:
            core.logger.warning(
                "plugin=%r waits for an optimizer: after a step of one that was not passed through "
                "opendit.attach(model, optimizer), what is gathered may be the old parameters",
                cfg.plugin,
            )
    except BaseException:
        with contextlib.suppress(ValueError):  # classes that an engine put on top stay
            core.unapply(target)
            lowered.give_back(target)
        raise
    training.remember(target, cfg, sp_size, engine, placed)
    _follow(target, placed.optimizer)
    return placed.model if placed.optimizer is None else Boosted(placed.model, placed.optimizer)


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
    from opendit.describing import describe
    from opendit.plan import plan_for

    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got {type(model).__name__}; allowed: a torch.nn.Module that is not scripted")
    target = unwrap(model)
    cfg = BoosterConfig.of(booster_cfg)
    applied = core.plan_of(target)
    given = [("booster_cfg", booster_cfg is not None), ("sp_size", sp_size != 1), ("family", family is not None)]
    if applied is not None and any(is_given for _, is_given in given):
        name = next(name for name, is_given in given if is_given)
        raise ValueError(f"{name}: the model is already accelerated; explain(model) shows its plan")
    _check_sp_size(sp_size)
    if applied is not None:
        plan, known = applied, training.training_of(target)
        lines = known.lines if known is not None else ()
    else:
        _ensure_processes(target, sp_size)
        plan = plan_for(target, cfg, sp_size, family)
        engine = _engine(cfg, model, target)
        lines = ()
        if engine is not None:
            plan = _without_graphs(plan, engine)
            lines = tuple(engine.promises(_setup(target, cfg, sp_size, plan)))
    print(describe(plan, target, applied=applied is not None, engine=lines), file=file or sys.stdout)
    return plan


def attach(model: nn.Module, optimizer: OptimizerT) -> OptimizerT:
    """Lets `optimizer.step()` do what the model's config asks for: skip_nonfinite, fp16's loss scale, EMA, its plugin.

    `accelerate` does it for an optimizer that it is given. This is for one built later, after your own `fully_shard`,
    say; every process makes this call. With a plugin it lets go of gathered parameters after a step, which would be the
    old ones. A second call starts anew: averages at the parameters as they are, counters and the loss scale as well.
    Schedules stay held.

    Args:
        model: the accelerated model, wrapped or sharded as it will be trained.
        optimizer: on the model's parameters; the same object comes back.

    Raises:
        ValueError: the model is not accelerated, its config asks for nothing of that, or the optimizer holds none of
            its parameters.
        TypeError: an argument of the wrong type.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}; allowed: a torch.optim.Optimizer")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: an accelerated torch.nn.Module")
    target = unwrap(model)
    plan = core.plan_of(target)
    known = training.training_of(target)
    if plan is None or not (plan.stepping or (known is not None and known.engine is not None)):
        raise ValueError(
            "model: nothing of it goes into optimizer.step(); allowed: a model accelerated with precision, ema, "
            "skip_nonfinite or a plugin. Give them to accelerate"
        )
    optim.check(optimizer, target)
    attaching.put_in(target, optimizer, plan.stepping)
    _follow(target, optimizer)
    return optimizer


def restore(model: ModelT) -> ModelT:
    """Undoes `accelerate` in place and returns `model` as it came in: its classes, outputs and keys.

    A model that `plugin="ddp"` wrapped comes back without its wrapper.

    Raises `ValueError` if the model is not accelerated, or is sharded; the message says what to do then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: an accelerated torch.nn.Module")
    target = unwrap(model)
    if core.plan_of(target) is None and not any(isinstance(m, Patched) for m in target.modules()):
        raise ValueError(f"model: {type(target).__name__} is not accelerated; there is nothing to restore")
    known = training.training_of(target)
    if known is not None and known.engine is not None:
        wrapper = known.model()
        model = cast(ModelT, known.engine.undo(wrapper) if wrapper is not None else target)
    plan = core.plan_of(target)
    if plan is not None and plan.choices.sampling is not None:
        lowered.check(target, plan.choices.sampling.weights)
    core.unapply(target)
    lowered.give_back(target)
    training.forget(target)
    attaching.take_out(target)
    from opendit.patch import graphs, sampled

    graphs.release(list(target.parameters()))
    sampled.release(target)
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


def _ensure_processes(model: nn.Module, sp_size: int, cfg: BoosterConfig[Any] | None = None) -> None:
    """With `sp_size` > 1, a process group, whose processes it divides; with a plugin, one of this process at least."""
    plugin = cfg.plugin if cfg is not None else None
    in_pairs = cfg is not None and cfg.cfg_parallel
    if in_pairs:
        from opendit.fastseq import mesh, pairs

        mesh.ensure_world(device_of(model), "cfg_parallel: got True")
        pairs.check_size(sp_size)
        pairs.pair(sp_size)  # here, where every process comes by; a forward may be made by one pair alone
    if sp_size > 1 or plugin is not None:
        from opendit.fastseq import mesh

        device = device_of(model)
        timeout = (cfg.timeout or DEFAULT_TIMEOUT) if cfg is not None and plugin is not None else None
        if plugin is not None and sp_size == 1:
            mesh.ensure_world(device, f"plugin: got {plugin!r}", alone=True, timeout=timeout)
        else:
            mesh.ensure_world(device, timeout=timeout)
        mesh.check_size(sp_size)


def _follow(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Where `model` is on an engine: from now on that knows of steps, and a process that is gone ends the others.

    Steps are the optimizer's, or else training forwards.
    """
    known = training.training_of(model)
    if known is None or known.engine is None:
        return
    from opendit.watch import watch

    known.let_go()
    watching = watch(known.cfg.timeout, DEFAULT_TIMEOUT)
    placed, engine = known.placed(), known.engine
    if optimizer is not None:
        this = weakref.ref(placed)
        stepped = lambda *_: engine.stepped(m) if (m := this()) is not None else None  # noqa: E731
        known.hooks.append(optimizer.register_step_post_hook(stepped))
        if watching is not None:
            known.hooks.append(optimizer.register_step_post_hook(watching.step_done))
    elif watching is not None:
        counted = lambda m, *_: watching.step_done() if m.training else None  # noqa: E731
        known.hooks.append(placed.register_forward_hook(counted))


def _engine(cfg: BoosterConfig[Any], model: nn.Module, target: nn.Module) -> Engine | None:
    if cfg.plugin is None:
        return None
    if model is not target:
        raise ValueError(
            f"plugin: got {cfg.plugin!r} for a model inside {type(model).__name__}; allowed: the model itself, which "
            "the plugin places. Leave the wrapper out (compile=True compiles blocks), or plugin"
        )
    return engines.find(cfg.engine, cfg.plugin)


def _setup(model: nn.Module, cfg: BoosterConfig[Any], sp_size: int, plan: Plan) -> engines.Setup:
    """What an engine is asked for."""
    assert cfg.plugin is not None
    device = device_of(model)
    return engines.Setup(cfg.plugin, cfg.precision, cfg.reduction, sp_size, plan.units, plan.entries, device)


def _without_graphs(plan: Plan, engine: Engine) -> Plan:
    """`plan` for an engine that moves parameters: no CUDA graphs, said where it is so."""
    if not plan.choices.graphs or engine.moves_parameters is None:
        return plan
    left = core.Kept("", f"no CUDA graphs of blocks: {engine.moves_parameters}")
    return dataclasses.replace(plan, choices=dataclasses.replace(plan.choices, graphs=False), kept=(*plan.kept, left))


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
