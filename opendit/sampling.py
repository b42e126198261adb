"""`opendit.sampling`: a context for a sampler's loop, in which what the model's steps share is computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from opendit.patch import core
from opendit.patch.registry import Alternating, families
from opendit.step_cache import StepCache
from opendit.wrapping import unwrap

if TYPE_CHECKING:
    from opendit.patch.steps import Steps


def sampling(
    model: nn.Module, timesteps: Sequence[float] | Tensor, cache: StepCache | None = None
) -> contextlib.AbstractContextManager[Steps]:
    """Inside it the model's calls are the steps of a sampler: modulations of all of them are computed at once.

        model = opendit.accelerate(model.eval(), "sample")
        with torch.no_grad(), opendit.sampling(model, timesteps=scheduler.timesteps):
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.expand(len(x)), y), t, x).prev_sample

    At the first step, for the conditions given there, the timestep embeddings and the modulation of every block are
    computed for all timesteps by the model's own modules, on many rows at once, and then looked up: the same numbers
    within rounding. The loop may run several times, each with conditions of its own. Where that does not hold of a
    model (what conditions its blocks depends on x), or blocks have no such modulation, they compute it in each step;
    the log and `explain` say so.

    Args:
        model: accelerated with the recipe "sample", or sampling=True; in eval mode.
        timesteps: of the model's calls, in their order, as it is given them. Of a sampler that calls it twice a step,
            both. One number for all samples of a batch.
        cache: from `opendit.calibrate`, for the same timesteps; None: every block is computed in every step. Samples
            are not the same with it; `cache.report()` says how far they were when it was calibrated.

    Returns:
        A context. What it gives counts: `.calls` of the model, and with a cache `.residuals.computed` and
        `.residuals.reused` blocks.

    Raises:
        ValueError: the model is not accelerated for sampling, is in training mode or has compiled blocks; or its calls
            had other timesteps than announced, or conditions that changed within a run. On GPUs that is said when the
            context ends, so that steps need not wait for the device (those do where a table is made, or that have
            fewer rows than it). The model is in such a context already. A cache for other timesteps or another model.
        TypeError: an argument of the wrong type.
    """
    target, times = checked(model, timesteps)
    if cache is not None:
        _blocks(target, cache, times)
        cast(core.Patched, target)._note(f"step cache: {cache.report()}")
    return running(target, times, cache)


@contextlib.contextmanager
def running(
    target: nn.Module,
    times: Sequence[float],
    cache: StepCache | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Steps]:
    """`sampling` of what was checked; observe: called with each step that is computed, and its blocks' residual."""
    from opendit.patch import steps as runs
    from opendit.patch.reuse import Residuals, Reuse
    from opendit.patch.sampled import kept_of
    from opendit.patch.steps import Steps

    residuals = None
    if cache is not None:
        blocks = _blocks(target, cache, times)
        reuse = Reuse(cache.first, cache.last, cache.computed, cache.order)
        residuals = Residuals(reuse, blocks, kept_of(target).memory, observe)
    steps = Steps(times, residuals, table=table_of(target))
    runs.enter(target, steps)
    try:
        yield steps
    finally:
        runs.leave(target)
    steps.finish()


def _blocks(target: nn.Module, cache: StepCache, times: Sequence[float]) -> list[nn.Module]:
    """The model's, in order. Raises where `cache` is not for it."""
    if not isinstance(cache, StepCache):
        raise TypeError(f"cache: got {type(cache).__name__}; allowed: an opendit.StepCache, from opendit.calibrate")
    if cache.timesteps != tuple(times):
        raise ValueError(
            f"cache: it was calibrated for {len(cache.timesteps)} other timesteps than these {len(times)}; allowed: "
            "the same. Call opendit.calibrate for these"
        )
    count = reusable(target)[2]
    if cache.blocks != count:
        raise ValueError(
            f"cache: it is for a model of {cache.blocks} blocks, and this has {count}; allowed: the model that it was "
            "calibrated with"
        )
    plan = core.plan_of(target)
    assert plan is not None
    return [block for _, block in families()[plan.family].blocks_of(target)]


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


def table_of(target: nn.Module) -> bool | str:
    """Whether values are looked up in the runs of this model, or why not."""
    plan = core.plan_of(target)
    sequence = plan.choices.sequence if plan is not None else None
    if sequence is not None and not sequence.in_attention:
        return "its blocks are given a part of a batch's rows"
    return True


def checked(model: nn.Module, timesteps: Sequence[float] | Tensor) -> tuple[nn.Module, list[float]]:
    """The model inside its wrappers, and the timesteps as numbers; raises what `sampling` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: the torch.nn.Module given to accelerate")
    target = unwrap(model)
    plan = core.plan_of(target)
    if plan is None or plan.choices.sampling is None:
        raise ValueError(
            'model: it is not accelerated for sampling; allowed: opendit.accelerate(model, "sample"), or a config with '
            "sampling=True"
        )
    if target.training:
        raise ValueError("model: it is in training mode; allowed: evaluation mode. Call model.eval() first")
    if plan.compiled:
        raise ValueError(
            "model: its blocks are compiled, and look nothing up; allowed: a model accelerated without compile=True"
        )
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.flatten().tolist()
    try:
        times = [float(t) for t in timesteps]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"timesteps: got {type(timesteps).__name__}; allowed: a sequence of numbers, a tensor"
        ) from error
    if not times or not all(abs(t) < float("inf") for t in times):
        raise ValueError(f"timesteps: got {times[:8]}; allowed: at least one number, all of them finite")
    return target, times
