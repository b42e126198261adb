"""What the modules of a model that samples know of the step that they are in: values looked up.

    site      a module whose value v(t, y) depends on the timestep and the condition alone: a block's modulation, the
              head's, the timestep embedding. For S steps and R rows of a batch
                  table[s] = (v₁(t_s, y) [R, W₁], v₂(t_s, y) [R, W₂], …)        one row of memory for all sites
              is made by the sites' own modules, for many steps at once, and then looked up step by step.

How a table is made: the model's own forward runs on the inputs of a step with the timesteps of many, while blocks give
back what they are given. What a site computes there must not depend on x; that is tried out first.

The k-th call of the model is taken for the k-th step, so that steps need not wait for the device; those do where a
table is made, or that have fewer rows than it. That it was is compared there, and said at the end of the run. Which
blocks are computed at all is decided in `reuse.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opendit.patch.core import hooked
from opendit.patch.reuse import Residuals

# Bytes of a table; a longer run's is made in several parts.
TABLE_BYTES = 2 << 30
# From more rows on a modulation's product is no longer bound by reading its weights: made at once it costs as much as
# step by step, and the passes of the model's forward that a table takes come on top.
TABLE_ROWS = 64

Compute = Callable[[Tensor], Tensor]
Condition = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Call:
    """A call of the model.

    Attributes:
        shape: of its first tensor, x, [rows, …].
        time: its timesteps, one or a row each.
        conditions: its other tensors with a row per sample, but the first, x.
        repeated: runs the model's forward on the rows repeated so many times, at given timesteps, with x or zeros.
        at_once: how often they can be repeated.
    """

    shape: torch.Size
    time: Tensor
    conditions: tuple[Tensor, ...]
    repeated: Callable[[int, Tensor, bool], object]
    at_once: int

    @property
    def rows(self) -> int:
        """Samples in its batch."""
        return self.shape[0]


class _Place(NamedTuple):
    """Where in a table's row a site's value [R, width] begins, and how many rows of the site each of its rows is."""

    begin: int
    width: int
    repeats: int


class _Seen(NamedTuple):
    site: int
    value: Tensor
    repeats: int


class Steps:
    """A run of a sampler, over and over: its timesteps, the table, what is reused.

    Args:
        times: of the model's calls, in their order. A sampler that calls the model twice a step has two there.
        residuals: decides which blocks are computed; None: all are, always.
        table: whether to look values up; else why not, in words.
    """

    def __init__(self, times: Sequence[float], residuals: Residuals | None = None, table: bool | str = True) -> None:
        self.times = [float(t) for t in times]
        self.residuals = residuals
        self.calls = 0
        self.without = table if isinstance(table, str) else None  # why there is no table
        self.row: Tensor | None = None  # what this step looks its values up in
        self.wide: str | None = None  # why a step had no table, where others had
        self._table: Tensor | None = None
        self._window = range(0)
        self._rows = 0  # of the table
        self._now = 0  # of this call
        self._conditions: tuple[Tensor, ...] = ()
        self._places: dict[int, _Place] = {}
        self._recording: int | None = None  # rows of the call that is recorded
        self._seen: list[_Seen] = []
        self._tried = False
        self._off: Tensor | None = None  # whether a call was not the step that it was taken for

    @property
    def step(self) -> int:
        return self.calls % len(self.times)

    @property
    def recording(self) -> bool:
        return self._recording is not None

    # Around each call of the model, outside of all graphs.

    def begin(self, call: Call) -> None:
        """Prepares the step that this call is. Raises `ValueError` where it can be seen to be another."""
        s, self._now = self.step, call.rows
        if s == 0:
            self._window = range(0)  # another batch may have other conditions
        wrong = (call.time != _as(self.times[s], call.time.dtype)).any()
        if self.without is None:
            wrong = self._look_up(call, s, wrong)
        if wrong.device.type == "cpu" and bool(wrong):
            raise ValueError(self._said())
        self._off = wrong if self._off is None else self._off | wrong
        if self.residuals is not None:
            self.residuals.begin(s, self.times, call.shape, call.time.device)

    def end(self) -> None:
        if self.residuals is not None:
            self.residuals.end()
        self.calls += 1

    def finish(self) -> None:
        """After the run. Raises `ValueError` where a call was not the step that it was taken for."""
        if self._off is not None and bool(self._off):
            raise ValueError(self._said())

    def key(self) -> tuple[object, ...]:
        """What decides which computations a step is made of."""
        return (self.row is not None, self._rows, *self._places.values(), self.residuals and self.residuals.key())

    def tensors(self) -> list[Tensor]:
        """What a step's computations read that is not the model's or the call's."""
        return [t for t in (self.row, self.residuals and self.residuals.factor) if isinstance(t, Tensor)]

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Has this step's computations read these instead."""
        left = list(tensors)
        if self.row is not None:
            self.row = left.pop(0)
        if self.residuals is not None:
            self.residuals.factor = left.pop(0)

    def _said(self) -> str:
        shown = ", ".join(f"{t:g}" for t in self.times[:4]) + (", …" if len(self.times) > 4 else "")
        return (
            f"timesteps: got {len(self.times)} ({shown}), but the model's calls had others, or conditions that changed "
            "within a run; allowed: the timesteps of its calls, in their order. What was drawn since is not right"
        )

    # The table.

    def _look_up(self, call: Call, s: int, wrong: Tensor) -> Tensor:
        if call.rows > TABLE_ROWS:
            self.row = None
            self.wide = (
                f"with {call.rows} rows a product is not bound by reading its weights (up to {TABLE_ROWS} it is)"
            )
            return wrong
        if s not in self._window or not self._covers(call):
            self._make(call, s)
        elif self._conditions:
            changed = [(a != b[: len(a)]).any() for a, b in zip(call.conditions, self._conditions, strict=True)]
            wrong = torch.stack([wrong.to(changed[0].device), *changed]).any()
        self.row = self._table[s - self._window.start] if self._table is not None else None
        return wrong

    def _covers(self, call: Call) -> bool:
        """Whether the table has this call's rows; fewer ones, as where guidance pauses, if they are its first."""
        if call.rows == self._rows:
            return True
        return call.rows < self._rows and all(
            torch.equal(a, b[: len(a)]) for a, b in zip(call.conditions, self._conditions, strict=True)
        )

    def _make(self, call: Call, s: int) -> None:
        """The table from step s on, for as many steps as it may hold."""
        self._table, self._window, self.row = None, range(0), None
        if not self._tried:
            self._try(call, self.times[s : s + 1])
        parts: list[Tensor] = []
        end = len(self.times)
        while self.without is None and (begin := s + sum(map(len, parts))) < end:
            times = self.times[begin : min(begin + call.at_once, end)]
            self._places, values = self._record(call, times)
            parts.append(values)
            end = min(end, s + max(1, TABLE_BYTES // values[0].nbytes))
        if self.without is None:
            self._table, self._window = torch.cat(parts)[: end - s], range(s, end)
            self._rows, self._conditions = call.rows, tuple(c.clone() for c in call.conditions)

    def _try(self, call: Call, times: Sequence[float]) -> None:
        """Finds out whether there can be a table."""
        places, values = self._record(call, times)
        if not places:
            self.without = "no module of this model is known to depend on timestep and condition alone"
        elif not torch.equal(values, self._record(call, times, blank=True)[1]):
            self.without = "what its blocks are conditioned on depends on its first input"
        self._tried = True

    def _record(self, call: Call, times: Sequence[float], blank: bool = False) -> tuple[dict[int, _Place], Tensor]:
        """Where each site's values are, and the values [len(times), …]."""
        n = len(times)
        t = torch.stack([_as(time, call.time.dtype) for time in times]).to(call.time.device)
        self._seen, self._recording = [], n * call.rows
        try:
            call.repeated(n, t.repeat_interleave(call.rows), blank)
        finally:
            self._recording, seen = None, self._seen
            self._seen = []
        sites = [one.site for one in seen]
        once = [one for one in seen if sites.count(one.site) == 1]  # what is called twice has two values
        places, begin = {}, 0
        for one in once:
            places[one.site] = _Place(begin, one.value.shape[1], one.repeats)
            begin += call.rows * one.value.shape[1]
        rows = [one.value.reshape(n, -1) for one in once]
        if not rows:
            return {}, t.new_empty(0)
        return places, torch.cat(rows, 1)

    def value(self, site: nn.Module, c: Condition, compute: Compute, *modules: nn.Module) -> Tensor:
        """compute(c) for the rows of c, looked up where there is a table.

        Args:
            c: [rows, …], or what gives it; rows may be those of the batch, each repeated.
            modules: that compute calls. Hooks on them must run, so such values are not looked up.
        """
        if self._recording is not None:
            return self._recorded(site, c() if callable(c) else c, compute, modules, self._recording)
        place = self._places.get(id(site))
        if place is None or self.row is None:
            return compute(c() if callable(c) else c)
        begin, width, repeats = place
        found = self.row[begin : begin + self._now * width].view(self._now, width)
        return found if repeats == 1 else found.repeat_interleave(repeats, dim=0)

    def _recorded(
        self, site: nn.Module, c: Tensor, compute: Compute, modules: Iterable[nn.Module], rows: int
    ) -> Tensor:
        repeats = len(c) // rows if c.dim() and len(c) % rows == 0 else 0
        if repeats > 1:
            apart = c.reshape(rows, repeats, *c.shape[1:])
            c, repeats = (apart[:, 0], repeats) if bool((apart == apart[:, :1]).all()) else (c, 0)
        value = compute(c)
        hooks = any(hooked(inner) for module in modules for inner in module.modules())
        if repeats and not hooks and value.shape[:-1] == (rows,):
            self._seen.append(_Seen(id(site), value, repeats))
        return value.repeat_interleave(repeats, dim=0) if repeats > 1 else value


def _as(time: float, dtype: torch.dtype) -> Tensor:
    """The timestep as a tensor of `dtype` holds it."""
    return torch.tensor(time, dtype=torch.float64).to(dtype)


# By module; a module finds here the run that it is in. Outside the modules, as all that mixins remember.
_runs: WeakKeyDictionary[nn.Module, Steps] = WeakKeyDictionary()


def steps_of(module: object) -> Steps | None:
    """The run that a module is in."""
    if torch.compiler.is_compiling() or not _runs:
        return None
    return _runs.get(module)  # type: ignore[call-overload]


def enter(model: nn.Module, steps: Steps) -> None:
    """Tells the modules of `model` of the run. Raises `ValueError` where they are in one."""
    if any(module in _runs for module in model.modules()):
        raise ValueError(
            "model: it is in a run of opendit.sampling or opendit.calibrate already; allowed: one at a time. Leave the "
            "context out inside of another, and in calibrate's draw"
        )
    for module in model.modules():
        _runs[module] = steps


def leave(model: nn.Module) -> None:
    for module in model.modules():
        _runs.pop(module, None)
