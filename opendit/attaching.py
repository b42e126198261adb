"""Puts a `Stepper` into an optimizer's step, and takes it out; holds a schedule still after a skipped step.

What the stepper counts, its loss scale and its averages become part of the model's state, which checkpoints hold.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, TypeVar, cast

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from opendit import attached, ema, ema_snapshots
from opendit.stepping import Stepper, Stepping, _steppers, logger, stepper_of

SchedulerT = TypeVar("SchedulerT", bound=LRScheduler)


class Attached:
    """Base of classes made for one optimizer or scheduler: what it was, and the stepper."""

    _opendit_base: Any
    _opendit_stepper: Stepper

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy holds other parameters: it is what it was before.
        state = cast(Any, self).__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _unattached, (type(self)._opendit_base,), state


def _unattached(base: Any) -> Any:
    return base.__new__(base)


def check(model: nn.Module, optimizer: Optimizer, wanted: Stepping) -> None:
    """Raises what `put_in` would, and changes nothing.

    `ValueError` where the optimizer or the model is attached otherwise, or the optimizer needs a closure; `ImportError`
    where a package for what is wanted is missing.
    """
    if wanted and isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer: got LBFGS, which runs its closure several times a step; allowed with skip_nonfinite, fp16 or "
            "ema: optimizers that step once on the gradients there are"
        )
    before = stepper_of(model)
    if before is not None and before.optimizer() not in (None, optimizer):
        raise ValueError("model: it is attached to another optimizer; call opendit.restore(model) first")
    if isinstance(optimizer, Attached) and type(optimizer)._opendit_stepper is not before:
        raise ValueError("optimizer: it is attached to another model; allowed: an optimizer of its own for each model")
    if wanted.ema is not None and wanted.ema.snapshot_every:
        ema_snapshots.check_packages()


def put_in(model: nn.Module, optimizer: Optimizer, wanted: Stepping) -> None:
    """Makes `optimizer.step()` do what is `wanted` for `model` (unwrapped), anew where it did so before.

    Schedules that were given to `schedule` stay so. Raises what `check` does.
    """
    check(model, optimizer, wanted)
    before = stepper_of(model)
    schedulers = list(before.schedulers) if before is not None else []
    if before is not None:
        take_out(model)
        logger.info("attached anew: averages start again at the parameters, counters and the loss scale as well")
    if not wanted:
        return
    stepper = Stepper(model, optimizer, wanted)
    made = _made(type(optimizer), _step_of(type(optimizer), stepper), stepper)
    patched = optimizer.__dict__.get("step")
    optimizer.__class__ = made
    if patched is not None:  # by a scheduler, say, which calls the class's step that it found
        optimizer.step = _around(optimizer, patched, stepper)  # type: ignore[method-assign]
    _steppers[model] = stepper
    for scheduler in schedulers:
        _hold(scheduler, stepper)
    attached.attach(model, "stepping", attached.Attached(_counted, _count_on))
    if stepper.ema is not None:
        averages = attached.Attached(ema.description, ema.load_description, _averages)
        attached.attach(model, "ema", averages)


def _counted(model: nn.Module) -> dict[str, Any]:
    return _with_its_own_parameters(model).state()


def _count_on(model: nn.Module, state: Any) -> None:
    _with_its_own_parameters(model).load(state)


def _with_its_own_parameters(model: nn.Module) -> Stepper:
    stepper = cast(Stepper, stepper_of(model))
    if stepper.swapped:
        raise ValueError(
            "model: its parameters are an EMA's just now, inside opendit.ema_weights; save and load outside of it"
        )
    return stepper


def _averages(model: nn.Module) -> dict[str, Any]:
    return {f"{label}/{name}": piece for label, found in ema.pieces(model).items() for name, piece in found.items()}


def take_out(model: nn.Module) -> None:
    """Undoes `put_in`, and the edits of schedulers."""
    stepper = _steppers.pop(model, None)
    for name in ("stepping", "ema"):
        attached.detach(model, name)
    if stepper is None:
        return
    for scheduler in list(stepper.schedulers):
        scheduler.__class__ = type(scheduler)._opendit_base
    if stepper.scale is not None:
        stepper.scale.remove()
    optimizer = stepper.optimizer()
    if isinstance(optimizer, Attached):
        cast(Any, optimizer).__class__ = type(optimizer)._opendit_base
        patched = getattr(cast(Any, optimizer).__dict__.get("step"), "_opendit_patched", None)
        if patched is not None:
            cast(Any, optimizer).step = patched


def schedule(scheduler: SchedulerT) -> SchedulerT:
    """Lets `scheduler.step()` do nothing after a step of its optimizer that was skipped; returns the same object.

    For schedulers that are stepped once per optimizer step, in the usual loop. It may be built before or after
    `accelerate`; this call comes after. `opendit.restore(model)` undoes it.

    Raises `TypeError` where it is no LRScheduler, `ValueError` where its optimizer skips nothing.
    """
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler: got {type(scheduler).__name__}; allowed: a torch.optim.lr_scheduler.LRScheduler")
    stepper = _stepper_behind(scheduler.optimizer)
    if stepper is None:
        raise ValueError(
            "scheduler: its optimizer skips nothing; allowed: one on the optimizer that accelerate was given, or "
            "returned, with skip_nonfinite, fp16 or ema. Call this after accelerate"
        )
    if not isinstance(scheduler, Attached):
        _hold(scheduler, stepper)
    return scheduler


def _stepper_behind(optimizer: Any) -> Stepper | None:
    """What is attached to `optimizer`, or to an engine's wrapper around it."""
    if isinstance(optimizer, Attached):
        return type(optimizer)._opendit_stepper
    return next((s for s in _steppers.values() if getattr(s.optimizer(), "inner", None) is optimizer), None)


def _hold(scheduler: LRScheduler, stepper: Stepper) -> None:
    kind = cast(Any, type(scheduler))
    cast(Any, scheduler).__class__ = _made(kind, _held(kind), stepper)
    stepper.schedulers.add(scheduler)


def _made(base: Any, step: Any, stepper: Stepper) -> Any:
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_opendit_base": base,
        "_opendit_stepper": stepper,
        "step": step,
    }
    return type(base.__name__, (Attached, base), namespace)


def _step_of(base: Any, stepper: Stepper) -> Any:
    @functools.wraps(base.step)  # its `hooked` too: the base's step runs the hooks
    def step(self: Any, closure: Any = None, **kwargs: Any) -> Any:
        if not _is_in(stepper, self):
            return base.step(self, closure, **kwargs)
        return stepper.step(self, functools.partial(base.step, self, **kwargs), closure)

    return step


def _is_in(stepper: Stepper, optimizer: Any) -> bool:
    """Or else it was taken out, maybe for another, while a scheduler that was built meanwhile still calls its step."""
    return getattr(type(optimizer), "_opendit_stepper", None) is stepper


def _around(optimizer: Optimizer, patched: Any, stepper: Stepper) -> Any:
    this = weakref.ref(optimizer)

    @functools.wraps(patched)
    def step(closure: Any = None, **kwargs: Any) -> Any:
        optimizer = cast(Any, this())
        if not _is_in(stepper, optimizer):
            return patched(closure, **kwargs)
        return stepper.step(optimizer, functools.partial(patched, **kwargs), closure)

    cast(Any, step)._opendit_patched = patched
    return step


def _held(base: Any) -> Any:
    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        if not type(self)._opendit_stepper.stands_still():
            base.step(self, *args, **kwargs)

    return step
