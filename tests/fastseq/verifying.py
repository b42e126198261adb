"""Cases for `test_verify` on four processes: honest layouts, and mistakes that `verify` must catch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import opendit
from opendit import measuring
from opendit.patch.core import plan_of
from opendit.patch.spread import SpreadAttention
from tests.fastseq import alternating, going_wrong
from tests.tiny_models import TINY, UserDiT, UserLatte

_TINY = {t.name: t for t in TINY}


def diffusion_loss(model: nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As training scripts have it: noise and timesteps drawn inside."""
    noise = torch.randn(x.shape, dtype=x.dtype)
    t = torch.randint(0, 1000, t.shape)
    return F.mse_loss(model(x + noise, t, y)[:, :4], noise)


def arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 4, 6, 6, generator=generator)
    return {"model": UserDiT(), "batch": (x, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3]))}


def ema(average: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def verdict(**options: Any) -> tuple[bool, str]:
    torch.manual_seed(0)
    report = opendit.verify(**{**arguments(), "sp_size": 2, "quiet": True, "loss": diffusion_loss, **options})
    assert report.certificate["certified"] is bool(report)
    return bool(report), str(report)


def _alike(model: nn.Module, *args: Any) -> torch.Tensor:
    """The usual mistake: a seed that knows no rank."""
    torch.manual_seed(0)
    return diffusion_loss(model, *args)


def _by_rank(model: nn.Module, *args: Any) -> torch.Tensor:
    """The other one: a seed that knows every rank."""
    torch.manual_seed(dist.get_rank())
    return diffusion_loss(model, *args)


def _planted(name: str) -> tuple[bool, str]:
    method, mistake = going_wrong.MUTANTS[name]
    with mistake():
        return verdict(booster_cfg={"sequence_parallel": method})


def _video_loss(model: nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(x.shape, dtype=x.dtype)
    return F.mse_loss(model(x + noise, torch.randint(0, 1000, t.shape), y)[:, :, :4], noise)


def _videos(mistake: str | None = None, **options: Any) -> tuple[bool, str]:
    """Four videos of three frames, whose frames and tokens are spread; `mistake` of `alternating`'s."""
    x = torch.randn(4, 3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    batch = (x, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3]))
    with alternating.MUTANTS[mistake]() if mistake else contextlib.nullcontext():
        return verdict(**{"model": UserLatte(depth=4), "batch": batch, "loss": _video_loss, **options})


def _video_noise_by_rank(model: nn.Module, *args: Any) -> torch.Tensor:
    torch.manual_seed(dist.get_rank())
    return _video_loss(model, *args)


def _fails_in_one(model: nn.Module, *args: Any) -> torch.Tensor:
    """A loss that one process can't compute of the accelerated model."""
    loss = diffusion_loss(model, *args)
    if dist.get_rank() == 1 and plan_of(model) is not None:
        raise ValueError("one process fails")
    return loss


def _coarse() -> tuple[bool, str]:
    """Attention's output in bf16 with three bits less."""
    original = SpreadAttention._attend

    def wrong(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = original(self, q, k, v)
        return _LastBitsCut.apply(out) if out.dtype == torch.bfloat16 else out

    with going_wrong.planted(SpreadAttention, "_attend", wrong):
        return verdict(autocast=torch.bfloat16, booster_cfg={"sequence_parallel": "ulysses"})


def _lower_residual() -> tuple[bool, str]:
    """A residual stream in bf16, held against a plain model that has none."""
    with going_wrong.planted(measuring, "lower_residual", lambda first: None):
        return verdict(autocast=torch.bfloat16, booster_cfg={"residual": "bf16"})


class _LastBitsCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x.contiguous().view(torch.int16) & ~7).view(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
        return _LastBitsCut.forward(ctx, dx)


_PLANTED = ("first gradient scaled", "another group", "conditions of the first frames")
ADAM = functools.partial(torch.optim.AdamW, lr=1e-3)
HONEST: dict[str, Callable[[], tuple[bool, str]]] = {
    "dp 2 × sp 2, ema, AdamW": lambda: verdict(ema=ema, optimizer=ADAM),
    "sp 4, bf16": lambda: verdict(sp_size=4, autocast=torch.bfloat16, booster_cfg={"sequence_parallel": "usp"}),
    "bf16 residual": lambda: verdict(autocast=torch.bfloat16, booster_cfg={"residual": "bf16"}),
    "latte, dp 2 × sp 2": lambda: _videos(ema=ema, optimizer=ADAM),
    "latte, sp 4, bf16": lambda: _videos(sp_size=4, autocast=torch.bfloat16),
    "dp 4": lambda: verdict(sp_size=1),
}
WRONG: dict[str, Callable[[], tuple[bool, str]]] = {
    "gradient scale": lambda: _planted("gather's scale dropped"),
    "gather over another group": lambda: _planted("another group"),
    "q and k mixed up": lambda: _planted("q and k mixed up, ulysses"),
    "noise differs in a group": lambda: verdict(loss=_by_rank),
    "noise alike across groups": lambda: verdict(loss=_alike),
    **{f"latte, {name}": functools.partial(_videos, name) for name in _PLANTED},
    "latte, noise differs in a group": lambda: _videos(loss=_video_noise_by_rank),
    "one process fails": lambda: verdict(sp_size=1, loss=_fails_in_one),
    "coarse attention": _coarse,
    "residual in bf16": _lower_residual,
    "stale ema": lambda: verdict(ema=lambda average, model: None),
}


def cases(world: int) -> dict[str, Any]:
    return {**HONEST, **WRONG}
