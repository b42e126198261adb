"""What the ranks of test_colossalai run: see tests/launch.py."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import opendit
from tests.comparing import build
from tests.tiny_models import TINY

TINY_DIT = next(t for t in TINY if t.name == "sit-odd")  # 3 heads of 20, no parameter's size divides by 4
STEPS = 3


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with options of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors, rest = [p for p in trained if p.dim() < 2], [p for p in trained if p.dim() > 1]
    return [{"params": vectors, "weight_decay": 0.0}, {"params": rest, "lr": 2e-3, "weight_decay": 0.1}]


def batch(step: int, micro: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """4 samples, the same on every process."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    x = torch.randn(4, 4, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.randint(1000, (4,), generator=generator)
    y = torch.randint(5, (4,), generator=generator)
    return x, t, y, torch.randn(4, 4, 6, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, step: int, micro: int, share: slice, dtype: torch.dtype) -> torch.Tensor:
    x, t, y, target = (part[share] for part in batch(step, micro, dtype))
    return (model(x, t, y) - target).square().mean()


def whole(grad: torch.Tensor) -> torch.Tensor:
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()


def train(plugin: str | None, sp_size: int = 1, *, clip: float | None = 0.05, micros: int = 2, hold: bool = False,
          dtype: torch.dtype = torch.float64, scheduler_first: bool = False, **cfg: Any) -> dict[str, Any]:
    """The plain loop: its losses, norms, gradients of the last step, parameters; `plugin` None: in one process."""
    model = build(TINY_DIT, dtype).train()
    model.y_embedder.dropout = 0.0  # no label is dropped by chance
    optimizer: Any = torch.optim.AdamW(groups_of(model), lr=1e-3, betas=(0.8, 0.95))
    schedule = functools.partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    given = optimizer
    if scheduler_first:
        scheduler = schedule(optimizer)
    share = slice(None)
    if plugin is not None:
        options = {"plugin": plugin, "engine": "colossalai", **cfg}
        model, optimizer = opendit.accelerate(model, options, optimizer=optimizer, sp_size=sp_size)
        size, rank = opendit.data_parallel_size(model), opendit.data_parallel_rank(model)
        share = slice(4 // size * rank, 4 // size * (rank + 1))
    if not scheduler_first:
        scheduler = schedule(optimizer)
    losses, norms, grads = [], [], {}
    names = dict(opendit.wrapping.unwrap(model).named_parameters())
    for step in range(STEPS):
        for micro in range(micros):
            spare = hold and plugin is not None and micro + 1 < micros
            with opendit.no_sync(model) if spare else contextlib.nullcontext():
                loss = loss_of(model, step, micro, share, dtype) / micros
                loss.backward()
            losses.append(loss.item())
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        if step == STEPS - 1:
            grads = {name: whole(p.grad) for name, p in names.items() if p.grad is not None}
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in names.values())
    if plugin is not None:
        mean = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(mean)
        losses = (mean / dist.get_world_size()).tolist()
    return {
        "losses": losses,
        "norms": norms,
        "grads": grads,
        "parameters": {} if plugin == "gemini" else {name: p.detach().clone() for name, p in names.items()},
        "lrs": [group["lr"] for group in given.param_groups],
        "same_optimizer": given is optimizer,
    }


def cases(world: int) -> dict[str, Any]:
    found = {}
    for plugin in ("ddp", "zero1", "zero2"):
        for sp_size in (1, 2):
            found[f"{plugin} sp{sp_size}"] = functools.partial(train, plugin, sp_size)
    return found
