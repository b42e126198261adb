"""Runs a model over dp × sp processes and, as one device would, alone; in fp64, every parameter.

The reference does not go through anything distributed: one process, the plain model, each share of the batch in turn
with that share's random state, gradients averaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendit
from opendit.fastseq import methods
from opendit.fastseq.mesh import groups
from opendit.patch.core import Choices, plan_of
from opendit.patch.spread import SpreadAttention
from tests import tiny_models
from tests.comparing import Results, exactly, worst
from tests.tiny_models import Tiny


def step(model: nn.Module, tiny: Tiny, share: int, micro: int, scale: float) -> float:
    """Loss of one micro-batch, its gradients added up; noise and label drops by the share's random state."""
    opendit.fastseq.seed.set_everywhere(1000 * share + micro)
    (x, *rest), kwargs = tiny.inputs(torch.float64, torch.device("cpu"))
    x = x + torch.randn(x.shape, dtype=torch.float64)
    target = torch.randn(1, dtype=torch.float64)
    with exactly(tiny):
        loss = ((tiny.output(model(x, *rest, **kwargs)) - target) ** 2).mean()
        (loss * scale).backward()
    return loss.item()


def gradients(model: nn.Module) -> Results:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module, tiny: Tiny, dp: int, micros: int) -> tuple[float, Results]:
    model.zero_grad(set_to_none=True)
    losses = [step(model, tiny, share, m, 1 / (dp * micros)) for share in range(dp) for m in range(micros)]
    return sum(losses) / len(losses), gradients(model)


def together(model: nn.Module, tiny: Tiny, micros: int, *, averaged: bool = False) -> tuple[float, Results]:
    """The same by everyone; the mean over the world as DDP takes it. averaged: DDP has done it."""
    model.zero_grad(set_to_none=True)
    share = opendit.data_parallel_rank(model)
    losses = [step(model, tiny, share, m, 1 / micros) for m in range(micros)]
    loss = torch.tensor(sum(losses) / micros, dtype=torch.float64)
    dist.all_reduce(loss)
    found = gradients(model)
    if not averaged:
        for grad in found.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return loss.item() / dist.get_world_size(), {name.removeprefix("module."): g for name, g in found.items()}


def errors(found: tuple[float, Results], expected: tuple[float, Results]) -> tuple[float, float, str]:
    """(relative error of the loss, the worst relative error of a gradient, whose)."""
    error, name = worst(found[1], expected[1])
    return abs(found[0] - expected[0]) / abs(expected[0]), error, name


def with_method(model: nn.Module, method: str) -> nn.Module:
    """A spread model with another method: its plan, applied again.

    "fastseq-overlapped" overlaps whatever the size, "-regather" gathers the input again in the backward.
    """
    plan = plan_of(model)
    assert plan is not None
    name, size = method.split("-")[0], plan.choices.sequence.size
    heads = next(m.num_heads if hasattr(m, "num_heads") else m.heads for m in model.modules() if is_attention(m))
    sequence = dataclasses.replace(
        plan.choices.sequence,
        method=name,
        ring=methods()[name].layout(size, heads),
        overlap="-overlapped" in method,
        regather="-regather" in method,
    )
    groups(size, sequence.ring)
    opendit.restore(model)
    choices: Choices = dataclasses.replace(plan.choices, sequence=sequence)
    opendit.patch.core.apply(model, dataclasses.replace(plan, choices=choices))
    return model


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, SpreadAttention)


@contextlib.contextmanager
def checkpointing(model: nn.Module, kind: str) -> Iterator[None]:
    """Every block of `model` checkpointed: "no", "reentrant" or "non-reentrant"."""
    reentrant = kind == "reentrant"

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=reentrant)

    if hasattr(model, "enable_gradient_checkpointing"):
        if kind != "no":
            model.enable_gradient_checkpointing(run)
        yield
        model.disable_gradient_checkpointing()
        return
    before, tiny_models.checkpoint = tiny_models.checkpoint, run
    model.checkpointing = kind != "no"
    yield
    model.checkpointing, tiny_models.checkpoint = False, before
