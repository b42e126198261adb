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
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opendit.everyone import gathered
from opendit.sampling import checked, reusable, running
from opendit.step_cache import ORDERS, StepCache

if TYPE_CHECKING:
    from opendit.patch.steps import Steps

# Of a step's residual at most so many numbers are kept to compare it with others.
_KEPT = 1 << 20


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
        options = [(order, gathered(seen.schedule(distance, order))[0]) for order in ORDERS]
        return tried(*min(options, key=lambda option: sum(option[1])))
    assert psnr is not None
    for order in ORDERS:
        low, high = 0, sum(best.computed)  # fewer than low + 1 were too few; high are enough
        while low + 1 < high:
            wanted = (low + high) // 2
            cache = tried(order, gathered(seen.with_at_most(wanted, order))[0])
            if cache.psnr is not None and cache.psnr >= psnr:
                best, high = cache, min(wanted, sum(cache.computed))
            else:
                low = wanted
    return best


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
            off, size = (R[s] - predicted).norm().item(), R[s].norm().item()
            self._errors[key] = off / size if size else math.inf if off else 0.0
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
        while sum(self.schedule(high, order)) > count and high < math.inf:  # what is not a number has no limit
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
