"""Trains a model on an engine and, as one device would, alone; in fp64, every parameter and moment.

The optimizer is built before `accelerate`, with two groups of different options and a scheduler on it. A step is two
micro-batches, then clipping that bites; in every other step the first micro-batch is inside `no_sync`.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import opendit
import opendit.fastseq.seed
from tests.comparing import Results, build, twin, worst
from tests.fastseq import parity
from tests.tiny_models import TINY, Tiny

PLUGINS = ("ddp", "zero1", "zero2", "zero3", "gemini")
STEPS, MICROS, NORM = 3, 2, 0.05


@functools.cache
def tiny_of(name: str) -> tuple[Tiny, nn.Module]:
    tiny = next(t for t in TINY if t.name == name)
    return tiny, build(tiny, torch.float64)


def adamw(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with biases in a group of their own, and a scheduler on it. Frozen parameters are in it as well."""
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    groups = [{"params": rest}, {"params": biases, "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().double().clone()


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


@dataclass
class History:
    """What came out of each step; `moments` of the last."""

    losses: list[float] = field(default_factory=list)
    gradients: list[Results] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parameters: list[Results] = field(default_factory=list)
    moments: Results = field(default_factory=dict)
    rates: list[list[float]] = field(default_factory=list)


def train(
    model: nn.Module, optimizer: Any, scheduler: Any, tiny: Tiny, shares: list[int], mid_step: Any = None
) -> History:
    """shares: of the batch, that this process computes; `alone` is all of them."""
    history = History()
    for step in range(STEPS):
        for share in shares:
            for micro in range(MICROS):
                last = share == shares[-1] and micro + 1 == MICROS
                adding = opendit.no_sync(model) if not last and step % 2 == 0 else contextlib.nullcontext()
                with adding:
                    scale = 1 / (MICROS * len(shares))
                    history.losses.append(parity.step(model, tiny, share, 10 * step + micro, scale))
        parameters = named(model)
        history.gradients.append({n: whole(p.grad) for n, p in parameters.items() if p.grad is not None})
        history.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), NORM)))
        if mid_step is not None:
            mid_step(model)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        history.parameters.append({n: whole(p) for n, p in parameters.items()})
        history.rates.append([group["lr"] for group in optimizer.param_groups])
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            history.moments[f"{key} of {name}"] = whole(value)
    return history


@functools.cache
def expected(name: str, dp: int) -> History:
    tiny, model = tiny_of(name)
    model = twin(model)
    return train(model, *adamw(model), tiny, list(range(dp)))


def on(plugin: str, name: str, sp: int, **config: Any) -> tuple[nn.Module, Any, Any]:
    """(model, optimizer, scheduler) placed by `plugin`."""
    model = twin(tiny_of(name)[1])
    optimizer, scheduler = adamw(model)
    cfg = {"plugin": plugin, "kernels": "reference", **config}
    placed, same = opendit.accelerate(model, cfg, optimizer=optimizer, sp_size=sp)
    assert same is optimizer
    return placed, optimizer, scheduler


def compare(found: History, reference: History, share: int) -> dict[str, Any]:
    """Relative errors, the worst of all steps."""
    losses = [reference.losses[i] for i in range(len(reference.losses)) if i // MICROS % _dp(found, reference) == share]
    steps = range(STEPS)
    gradients = [worst(found.gradients[i], reference.gradients[i]) for i in steps]
    parameters = [worst(found.parameters[i], reference.parameters[i]) for i in steps]
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(found.losses, losses, strict=True)),
        "gradients": max(gradients),
        "norm": max(abs(a / b - 1) for a, b in zip(found.norms, reference.norms, strict=True)),
        "clipped": all(norm > 2 * NORM for norm in found.norms),
        "parameters": max(parameters),
        "moments": worst(found.moments, reference.moments),
        "rates": found.rates == reference.rates,
    }


def _dp(found: History, reference: History) -> int:
    return len(reference.losses) // len(found.losses)


def case(plugin: str, name: str, sp: int, mid_step: Any = None, **config: Any) -> dict[str, Any]:
    """Errors of a model trained on an engine, against the model trained alone."""
    model, optimizer, scheduler = on(plugin, name, sp, **config)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    share, dp = opendit.data_parallel_rank(model), opendit.data_parallel_size(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    errors = {"held": held == {id(p) for p in model.parameters()}, "rate": options[1]["lr"] == 3e-3}
    return errors | compare(
        train(model, optimizer, scheduler, tiny_of(name)[0], [share], mid_step), expected(name, dp), share
    )


def check(errors: dict[str, Any], limit: float = 1e-8) -> None:
    assert errors["held"]
    assert errors["rate"]
    assert errors["rates"]
    assert errors["clipped"]
    assert errors["loss"] <= limit / 100
    assert errors["norm"] <= limit / 100
    for what in ("gradients", "parameters", "moments"):
        assert errors[what][0] <= limit, f"{what}: {errors[what][1]}"
