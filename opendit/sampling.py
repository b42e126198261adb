"""`opendit.sampling`: a context for a sampler's loop, in which what the model's steps share is computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from opendit.patch import core
from opendit.wrapping import unwrap

if TYPE_CHECKING:
    from opendit.patch.steps import Steps


@contextlib.contextmanager
def sampling(model: nn.Module, timesteps: Sequence[float] | Tensor) -> Iterator[Steps]:
    """Inside it the model's calls are the steps of a sampler: modulations of all of them are computed at once.

        model = opendit.accelerate(model.eval(), "sample")
        with torch.no_grad(), opendit.sampling(model, timesteps=scheduler.timesteps):
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.expand(len(x)), y), t, x).prev_sample

    At the first step, for the conditions given there, the timestep embeddings and the modulation of every block are
    computed for all timesteps by the model's own modules, on many rows at once, and then looked up: the same numbers
    within rounding. The loop may run several times, each with conditions of its own. Where that does not hold of a
    model (what conditions its blocks depends on x), or blocks have no such modulation, they compute it in each step; the
    log and `explain` say so.

    Args:
        model: accelerated with the recipe "sample", or sampling=True; in eval mode.
        timesteps: of the model's calls, in their order, as it is given them. Of a sampler that calls it twice a step,
            both. One number for all samples of a batch.

    Raises:
        ValueError: the model is not accelerated for sampling, is in training mode or has compiled blocks; or its calls
            had other timesteps than announced, or conditions that changed within a run. On GPUs that is said when the
            context ends, for nothing in it waits for the device.
        TypeError: an argument of the wrong type.
    """
    from opendit.patch import steps as running
    from opendit.patch.steps import Steps

    target, times = checked(model, timesteps)
    steps = Steps(times, table=table_of(target))
    running.enter(target, steps)
    try:
        yield steps
    finally:
        running.leave(target)
    steps.finish()


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
