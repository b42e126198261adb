"""What happens inside `optimizer.step()`: gradients are checked, all processes skip or none, averages follow.

    look         is any gradient, on any process, inf or NaN?  opendit/nonfinite.py
    found        step, averages and schedule stay;  fp16's loss scale falls;  after N in a row an error
    not found    the optimizer's own step, then the averages' update

An optimizer that can be told `found` on the device (torch's fused ones) is told there, and the averages' update is
masked by it, so that nobody waits; what came of the step is read when it is next needed. Others wait for one number.

The optimizer instance gets a class made for it, from its own class and this step, like modules do (patch/core.py). Its
state, groups, hooks and state dict are its own class's; a copy or pickle of it is of its own class.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit import nonfinite
from opendit.ema_profiles import EMA
from opendit.sharded_ema import ShardedEma

logger = logging.getLogger("opendit")

# Of each model, unwrapped.
_steppers: WeakKeyDictionary[nn.Module, Stepper] = WeakKeyDictionary()


class NonFiniteGradients(RuntimeError):
    """Too many steps in a row had gradients that were inf or NaN."""


@dataclass(frozen=True)
class Stepping:
    """What `attach` is to do. `limit`: after how many skipped steps in a row to stop; None: nothing is skipped."""

    precision: str = "inherit"
    limit: int | None = None
    ema: EMA | None = None

    def __bool__(self) -> bool:
        return self.limit is not None or self.ema is not None


class Stepper:
    """The step of one optimizer on one model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, wanted: Stepping) -> None:
        self.limit = wanted.limit
        self.ema = ShardedEma(model, wanted.ema) if wanted.ema is not None else None
        self.model = weakref.ref(model)
        self.names = _names(model)
        self.taken = self.skipped = self.in_a_row = 0
        self.last_skipped = False
        self.swapped = False  # the averages stand in for the parameters
        self.schedulers: WeakSet[Any] = WeakSet()
        self.optimizer = weakref.ref(optimizer)
        self._pending: nonfinite.Pending | None = None
        self._seen = nonfinite.Seen([], None)
        this = weakref.ref(self)  # last: it leaves hooks on the parameters
        self.scale = _loss_scale(model, lambda: _settle(this())) if wanted.precision == "fp16" else None

    def step(self, optimizer: Optimizer, own: Callable[[], Any], closure: Callable[[], Any] | None) -> Any:
        """`own()` is the optimizer's own step, without a closure."""
        self.settle()
        if self.swapped:
            raise RuntimeError(
                "optimizer: step() inside opendit.ema_weights would train the EMA; leave the block first"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_known(optimizer)
        found = self._found(optimizer)
        if found is None:
            own()
            self._follow(None)
            self._conclude(False)
        elif _takes_found(optimizer):
            _told(optimizer, found, own)
            self._follow(found)
            self._pending = nonfinite.Pending.of(found)
            if self.ema is not None and self.ema.snapshot_due():
                self.settle()
        else:
            skipped = bool(found)
            if not skipped:
                own()
                self._follow(None)
            self._conclude(skipped)
        return loss

    def settle(self) -> None:
        """Learns what the last step came to, waiting for the device if need be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            skipped = pending.read()
            if skipped and self.ema is not None:
                self.ema.retract()
            self._conclude(skipped)

    def stands_still(self) -> bool:
        """Whether the schedule must not advance now."""
        self.settle()
        return self.last_skipped

    def state(self) -> dict[str, Any]:
        """Counters and loss scale, as JSON has them."""
        self.settle()
        counters = {"taken": self.taken, "skipped": self.skipped, "in_a_row": self.in_a_row}
        return {**counters, "last_skipped": self.last_skipped, "scale": self.scale.state() if self.scale else None}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned; a scale is taken where this precision has one."""
        self.settle()
        self.taken, self.skipped, self.in_a_row = (int(state[key]) for key in ("taken", "skipped", "in_a_row"))
        self.last_skipped = bool(state["last_skipped"])
        if self.scale is not None and state.get("scale") is not None:
            self.scale.load(state["scale"])

    def _follow(self, found: Tensor | None) -> None:
        if self.ema is not None:
            self.ema.update(found)

    def _conclude(self, skipped: bool) -> None:
        self.last_skipped = skipped
        if not skipped:
            self.taken += 1
            self.in_a_row = 0
            if self.ema is not None and self.ema.snapshot_due():
                self.ema.snapshot()
        else:
            self.skipped += 1
            self.in_a_row += 1
            self._tell()
        if self.scale is not None:
            self.scale.update(skipped)
        if skipped and self.limit is not None and self.in_a_row >= self.limit:
            raise NonFiniteGradients(
                f"{self.in_a_row} steps in a row had gradients that were inf or NaN, and were skipped; {self.taken} "
                f"were taken before. Worst now: {self._seen.worst()}. Parameters and averages are as after the last "
                "good step: look at the data, the learning rate and the loss, or allow more with skip_nonfinite"
            )

    def _tell(self) -> None:
        expected = self.scale is not None  # how a loss scale finds its height
        level = logging.INFO if expected or self.skipped > 1 else logging.WARNING
        logger.log(level, "step skipped: gradients were inf or NaN (%d so far)", self.skipped)
        optimizer: Any = self.optimizer()
        built_on = (optimizer, getattr(optimizer, "inner", None))  # an engine's wrapper, and the user's own in it
        scheduled = any(hasattr(getattr(o, "step", None), "_wrapped_by_lr_sched") for o in built_on)
        if self.skipped == 1 and scheduled and not self.schedulers:
            logger.warning(
                "a learning-rate scheduler is built on this optimizer: it advances after a skipped step too, unless it "
                "was passed through opendit.schedule(scheduler)"
            )

    def _check_known(self, optimizer: Optimizer) -> None:
        """A parameter that came or thawed since: nobody scales its gradient back (fp16), and no average follows it."""
        asked = [("precision='fp16'", "its gradient is scaled", self.scale), ("ema", "no average has it", self.ema)]
        followed = [(what, follows, part.known) for what, follows, part in asked if part is not None]
        stepped = [p for p in nonfinite.parameters(optimizer) if p.grad is not None] if followed else []
        model, names = self.model(), self.names
        if model is not None and any(id(p) not in names for p in stepped):
            names = _names(model)  # modules were added, or the optimizer trains others' parameters too
        for p in stepped:
            for what, follows, known in followed:
                if id(p) in names and id(p) not in known:
                    was = "frozen when" if id(p) in self.names else "added after"
                    raise RuntimeError(
                        f"optimizer: {names[id(p)]!r} was {was} {what} was set up, so {follows}; call "
                        "opendit.attach(model, optimizer) after adding modules, freezing and unfreezing (averages "
                        "start anew)"
                    )
        if model is not None and self.ema is not None and self.ema.snapshot_due(next=True):
            self.ema.check_complete(model)

    def _found(self, optimizer: Optimizer) -> Tensor | None:
        """1 where a gradient on any process is inf or NaN, else 0; None where nobody asks."""
        given = getattr(optimizer, "found_inf", None)  # from torch.amp.GradScaler, for this step
        given = (given != 0).float().reshape(()) if given is not None else None
        if self.limit is None:
            return given
        found, self._seen = nonfinite.look(optimizer, self.names, given)
        return found


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _loss_scale(model: nn.Module, settle: Callable[[], None]) -> Any:
    from opendit.loss_scale import LossScale  # registers operators; import opendit itself stays light

    return LossScale(model, settle)


def _settle(stepper: Stepper | None) -> None:
    if stepper is not None:
        stepper.settle()


def _takes_found(optimizer: Optimizer) -> bool:
    """Whether its step reads `found_inf`, as torch's fused optimizers do, and begins no state, which they do anyhow."""
    return (
        bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        and all(group.get("fused") for group in optimizer.param_groups)
        and all(optimizer.state.get(p) for p in nonfinite.parameters(optimizer) if p.grad is not None)
    )


def _told(optimizer: Any, found: Tensor, own: Callable[[], Any]) -> None:
    """The own step, which changes nothing where `found` is 1."""
    had = {name: getattr(optimizer, name) for name in ("found_inf", "grad_scale") if hasattr(optimizer, name)}
    optimizer.found_inf = found
    optimizer.grad_scale = had.get("grad_scale")
    try:
        own()
    finally:
        del optimizer.found_inf, optimizer.grad_scale
        for name, value in had.items():
            setattr(optimizer, name, value)


def stepper_of(model: nn.Module) -> Stepper | None:
    """What is attached to `model`, unwrapped."""
    return _steppers.get(model)


def in_words(wanted: Stepping | None, model: nn.Module, *, applied: bool) -> list[str]:
    """`explain`'s lines about steps."""
    if not wanted:
        return []
    lines = []
    if wanted.limit is not None:
        lines.append(
            f"  gradients that are inf or NaN: all processes skip the step; {wanted.limit} in a row are an error"
        )
    if wanted.precision == "fp16":
        lines.append("  loss scale: from 65536, halved after a skipped step, doubled after 2000 good ones")
    if wanted.ema is not None:
        lines.append(
            f"  EMA: {', '.join(wanted.ema.profiles())}; fp32, 4 bytes per trained parameter and average in all"
        )
        if wanted.ema.warmup:
            lines.append("    decays warm up as min(decay, (1 + t) / (10 + t))")
        if wanted.ema.snapshot_every:
            lines.append(f"    snapshots every {wanted.ema.snapshot_every} steps in {wanted.ema.snapshots}")
    stepper = stepper_of(model)
    if stepper is not None:
        # Not settled: that may raise on all processes together, and explain is called by one.
        scale = f", loss scale {stepper.scale.value:g}" if stepper.scale is not None else ""
        pending = ", and one that the device has not told yet" if stepper._pending is not None else ""
        lines.append(f"  so far: {stepper.taken} steps taken, {stepper.skipped} skipped{scale}{pending}")
    elif applied:
        lines.append("  not attached to an optimizer yet: opendit.attach(model, optimizer) does it")
    return lines
