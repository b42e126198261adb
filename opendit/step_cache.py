"""Step caching with a budget: which steps of a sampler need not compute their middle blocks, measured on the model.

Between neighbouring steps the residual R_s that blocks a … b add to x changes little, so some steps can reuse it
(FORA, arXiv 2407.01425, reuses layers' outputs; TeaCache, arXiv 2411.19108, decides by how much their input changed),
or draw it on along the last two (order 1, as TaylorSeer, arXiv 2503.06923). How much that costs differs from model to
model, step to step and sampler to sampler. `calibrate` draws a few samples and finds out:

    e(s)      = ‖R_s − its prediction from the steps computed before‖ / ‖R_s‖           of the uncached run
    schedule  : step s is computed where e(s) > τ
    PSNR(τ)   = 10·log₁₀(range² / mean (cached − uncached)²)                             of whole cached runs
    τ         : the largest with PSNR(τ) at least what was asked for, or the e that was asked for

The schedule is fixed from then on and the same for all samples. A decision for each sample by its own activations, as
TeaCache's, would make a sample depend on its neighbours in the batch and have the host wait for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opendit.everyone import gathered
from opendit.patch import core
from opendit.patch.registry import Alternating, families
from opendit.sampling import checked, running

if TYPE_CHECKING:
    from opendit.patch.steps import Steps

# Of a step's residual at most so many numbers are kept to compare it with others.
_KEPT = 1 << 20
_ORDERS = (0, 1)


@dataclass(frozen=True)
class StepCache:
    """A schedule of steps that reuse their middle blocks' residual, and what it cost when it was calibrated.

    Attributes:
        timesteps: of the runs that it is for.
        computed: for each, whether all blocks are computed.
        first, last: the numbers of the first and the last block that may be left out.
        blocks: how many the model has.
        order: 0: residuals are reused as they are; 1: drawn on along the last two.
        psnr: in dB, of the cached calibration samples to the uncached, all together; worst_psnr: of the worst one.
            None where it was not measured.
        asked: the budget, in words.
    """

    timesteps: tuple[float, ...]
    computed: tuple[bool, ...]
    first: int
    last: int
    blocks: int
    order: int = 0
    psnr: float | None = None
    worst_psnr: float | None = None
    asked: str = "nothing"

    def __post_init__(self) -> None:
        for name in ("timesteps", "computed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.computed or len(self.computed) != len(self.timesteps) or not self.computed[0]:
            raise ValueError(
                f"computed: got {self.computed} for {len(self.timesteps)} timesteps; allowed: one value for each, the "
                "first of them True"
            )
        if not 0 <= self.first <= self.last < self.blocks:
            raise ValueError(
                f"first, last: got {self.first} and {self.last} of {self.blocks} blocks; allowed: numbers of blocks, "
                "in order"
            )
        if self.order not in _ORDERS:
            raise ValueError(f"order: got {self.order!r}; allowed: 0 or 1")

    @property
    def blocks_computed(self) -> int:
        """Of a whole run."""
        return len(self.computed) * self.blocks - self.blocks_reused

    @property
    def blocks_reused(self) -> int:
        return (len(self.computed) - sum(self.computed)) * (self.last - self.first + 1)

    def report(self) -> str:
        """What was gained and what was lost, in words."""
        total, left = self.blocks_computed + self.blocks_reused, f"{self.first} to {self.last}"
        gained = (
            f"{sum(self.computed)} of {len(self.computed)} steps compute all {self.blocks} blocks, in the others "
            f"blocks {left} reuse their residual (order {self.order}): {self.blocks_computed} of {total} blocks are "
            f"computed, {total / self.blocks_computed:.2f} times fewer"
        )
        if self.psnr is None or self.worst_psnr is None:
            return f"{gained}; what was lost was not measured"
        return (
            f"{gained}; lost: PSNR {self.psnr:.1f} dB, {self.worst_psnr:.1f} of the worst sample; asked: {self.asked}"
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StepCache:
        """What `to_json` wrote. Raises `ValueError` for anything else."""
        found = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or not found.keys() <= names:
            raise ValueError(f"cache: got JSON of a {type(found).__name__}; allowed: what StepCache.to_json writes")
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"cache: it is not what StepCache.to_json writes: {error}") from error


@torch.no_grad()
def calibrate(
    model: nn.Module,
    draw: Callable[[], Tensor],
    timesteps: Sequence[float] | Tensor,
    *,
    psnr: float | None = None,
    distance: float | None = None,
    data_range: float = 2.0,
) -> StepCache:
    """The cheapest schedule that stays within a budget, for `opendit.sampling(..., cache=...)`.

        cache = opendit.calibrate(model, lambda: decode(sampler(model, noise, y)), timesteps, psnr=30)
        print(cache.report())

    It runs `draw` some fifteen times, most of them with a part of the blocks. With several processes every one makes
    this call, and all get the first's schedule.

    Args:
        model: as in `opendit.sampling`.
        draw: the sampler, with the model, on a few samples of what will be drawn; the same noise and conditions each
            time. It gives the samples, [B, …], as the budget means them: decoded, where the PSNR of pixels is meant.
        timesteps: of the model's calls in a run of `draw`, as in `opendit.sampling`.
        psnr: the budget: how near the cached samples must be to the uncached ones, in dB, all of them together.
        distance: another budget: how far, relatively, a residual may be from what is used instead; of the order 0.05.
        data_range: of the samples: 2 for −1 … 1.

    Returns:
        A schedule that was measured to keep the budget. Where none does, all blocks are computed in it.

    Raises:
        ValueError: the model can't be cached (its blocks do other things than add to x), `draw` gives other samples
            each time, or another number of calls; a budget that is not allowed.
        TypeError: an argument of the wrong type.
    """
    target, times = checked(model, timesteps)
    if (psnr is None) == (distance is None):
        raise ValueError("psnr, distance: allowed: exactly one of them, the budget. Give psnr=30, or distance=0.05")
    for name, value in (("psnr", psnr), ("distance", distance), ("data_range", data_range)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name}: got {value!r}; allowed: a number above 0")
    first, last, count = reusable(target)
    asked = f"PSNR of at least {psnr:g} dB" if psnr is not None else f"a relative distance of at most {distance:g}"
    whole = StepCache(tuple(times), (True,) * len(times), first, last, count, asked=asked)

    def drawn(cache: StepCache | None, observe: Callable[[int, Tensor], None] | None = None) -> Tensor:
        with running(target, times, cache, observe) as run:
            samples = draw()
        _check_drawn(samples, run, times)
        return samples.detach().double().cpu()

    uncached = drawn(None)
    seen = _Seen(times)
    again = _psnrs(drawn(whole, seen), uncached, data_range)[0]
    if again < (psnr or 40.0):
        raise ValueError(
            f"draw: two uncached runs of it differ by {again:.1f} dB; allowed: the same samples each time. Give it the "
            "same noise and conditions, by a generator that is seeded inside of it"
        )
    best = dataclasses.replace(whole, psnr=math.inf, worst_psnr=math.inf)

    def tried(order: int, computed: tuple[bool, ...]) -> StepCache:
        cache = dataclasses.replace(whole, order=order, computed=computed)
        of_all, worst = gathered(_psnrs(drawn(cache), uncached, data_range))[0]
        return dataclasses.replace(cache, psnr=of_all, worst_psnr=worst)

    if distance is not None:
        options = [(order, gathered(seen.schedule(distance, order))[0]) for order in _ORDERS]
        return tried(*min(options, key=lambda option: sum(option[1])))
    assert psnr is not None
    for order in _ORDERS:
        low, high = 0, sum(best.computed)  # fewer than low + 1 were too few; high are enough
        while low + 1 < high:
            wanted = (low + high) // 2
            cache = tried(order, gathered(seen.with_at_most(wanted, order))[0])
            if cache.psnr is not None and cache.psnr >= psnr:
                best, high = cache, min(wanted, sum(cache.computed))
            else:
                low = wanted
    return best


def reusable(target: nn.Module) -> tuple[int, int, int]:
    """The numbers of the first and the last block that may be left out (all but one at each end), and how many exist.

    Of blocks in pairs, a spatial and a temporal one, the temporal ones at both ends, whose x is laid out alike.

    Raises `ValueError` where the model has no blocks that can be.
    """
    plan = core.plan_of(target)
    family = families().get(plan.family) if plan is not None else None
    if family is None or not isinstance(family.blocks, str):
        why = "it has no list of blocks" if family is None else "its blocks are in several lists"
        raise ValueError(f"cache: the model can't be cached: {why}. Leave the cache out for this model")
    count = len(family.blocks_of(target))
    first, last = 1, count - (1 if isinstance(family.spread, Alternating) else 2)
    if first > last:
        raise ValueError(f"cache: the model has {count} blocks; allowed: three or more. Leave the cache out")
    return first, last, count


class _Seen:
    """Residuals of the uncached run, and how well those of some steps predict those of others."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times = times
        self.residuals: dict[int, list[Tensor]] = {}
        self._errors: dict[tuple[int, int, int | None], float] = {}

    def __call__(self, step: int, residual: Tensor) -> None:
        flat = residual.detach().flatten()
        self.residuals.setdefault(step, []).append(flat[:: -(-flat.numel() // _KEPT)].float())

    @functools.cached_property
    def _of_all(self) -> dict[int, Tensor]:
        return {step: torch.cat(parts) for step, parts in self.residuals.items()}

    def _error(self, s: int, last: int, before: int | None) -> float:
        key = (s, last, before)
        if key not in self._errors:
            R = self._of_all
            predicted = R[last]
            if before is not None:
                ahead = (self.times[s] - self.times[last]) / (self.times[last] - self.times[before])
                predicted = predicted + ahead * (R[last] - R[before])
            self._errors[key] = ((R[s] - predicted).norm() / R[s].norm()).item()
        return self._errors[key]

    def schedule(self, limit: float, order: int) -> tuple[bool, ...]:
        """Which steps are computed where those that can be predicted within `limit` are not."""
        computed = [True]
        last, before = 0, None
        for s in range(1, len(self.times)):
            computed.append(not self._error(s, last, before if order else None) <= limit)
            if computed[-1]:
                last, before = s, (last if self.times[s] != self.times[last] else None)
        return tuple(computed)

    def with_at_most(self, count: int, order: int) -> tuple[bool, ...]:
        """The schedule of the smallest limit for which at most so many steps are computed."""
        low, high = 0.0, 1.0
        while sum(self.schedule(high, order)) > count:
            high *= 2
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(self.schedule(middle, order)) <= count else (middle, high)
        return self.schedule(high, order)


def _psnrs(samples: Tensor, uncached: Tensor, data_range: float) -> tuple[float, float]:
    """(of all samples together, of the worst one), in dB; what is not a number is infinitely bad."""
    errors = (samples - uncached).square().flatten(1).mean(1)

    def in_db(error: float) -> float:
        if error != error:
            return -math.inf
        return 10 * math.log10(data_range**2 / error) if error else math.inf

    return in_db(errors.mean().item()), in_db(errors.max().item())


def _check_drawn(samples: Any, run: Steps, times: Sequence[float]) -> None:
    if not isinstance(samples, Tensor) or samples.dim() == 0:
        raise TypeError(f"draw: it gave a {type(samples).__name__}; allowed: a tensor of samples [B, …]")
    if run.calls == 0 or run.calls % len(times):
        raise ValueError(
            f"draw: it called the model {run.calls} times; allowed: once for each of the {len(times)} timesteps, or "
            "several times all of them"
        )
