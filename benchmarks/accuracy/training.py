"""One training script, run in several ways on equal data, against the clock.

    published   fp32 weights and TF32 products, eager; AdamW and EMA as facebookresearch/DiT's script has them
    eager       bf16 autocast, fused AdamW, foreach EMA
    compile     the same under torch.compile
    opendit     opendit.accelerate with precision="bf16", ema and CUDA graphs

Step i draws the same samples, flips, timesteps, noise and dropped conditions in all of them. The clock starts after the
first steps, which compile or warm up and are counted apart (`start_up_s`), and it stands still while a snapshot of the
averaged weights is taken.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import opendit

BETAS, CLIP, WARM_UP, START_UP = (0.9, 0.99), 1.0, 200, 10


@dataclass(frozen=True)
class Way:
    """How the script is run. `plain`: optimizer and EMA parameter by parameter, as published."""

    accelerated: bool = False
    compiled: bool = False
    bf16: bool = True
    tf32: bool = False
    plain: bool = False


WAYS = {
    "published": Way(bf16=False, tf32=True, plain=True),
    "eager": Way(),
    "compile": Way(compiled=True),
    "opendit": Way(accelerated=True),
}


class Trainer:
    """A model with its optimizer and averages. `loss(net, step)` is the script's: it draws and computes."""

    def __init__(self, model: nn.Module, way: Way, loss: Callable[[nn.Module, int], Tensor], *, lr: float, ema: float):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = way.tf32
        self.model, self.way, self.loss, self.lr, self.decay = model, way, loss, lr, ema
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        fused = None if way.plain or self.device.type == "cpu" else True
        foreach = False if way.plain else None
        self.optimizer: Any = torch.optim.AdamW(
            self.parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=fused, foreach=foreach
        )
        self.net: Any = model
        self.ema: nn.Module | None = None
        if way.accelerated:
            on_gpu = self.device.type == "cuda"
            asked = {"cuda_graphs": on_gpu, "ema": opendit.EMA(decays=ema, warmup=True)}
            precision = "bf16" if way.bf16 else "fp32"
            self.net, self.optimizer = opendit.accelerate(
                model, {"precision": precision, **asked}, optimizer=self.optimizer
            )
        else:
            self.ema = copy.deepcopy(model).eval()
            if way.compiled:
                from torch._inductor import config  # seconds, which the other ways can spare

                # Compiled code must draw the same dropped conditions as eager code.
                config.fallback_random = True
                self.net = torch.compile(model)
        self.taken = 0

    def step(self) -> Tensor:
        """The loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.taken + 1) / WARM_UP)
        torch.manual_seed(self.taken)  # what is drawn inside the model
        with self._autocast():
            loss = self.loss(self.net, self.taken)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.taken += 1
        if self.ema is not None:
            self._average()
        return loss.detach()

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, on the device."""
        if self.ema is not None:
            return {name: value.clone() for name, value in self.ema.state_dict().items()}
        return {name: value.to(self.device) for name, value in opendit.ema_state_dict(self.net).items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.way.bf16 and not self.way.accelerated:  # opendit does it inside the model's forward
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @torch.no_grad()
    def _average(self) -> None:
        assert self.ema is not None
        decay = min(self.decay, (1 + self.taken) / (10 + self.taken))
        pairs = list(zip(self.ema.parameters(), self.model.parameters(), strict=True))
        if self.way.plain:
            for average, parameter in pairs:
                average.mul_(decay).add_(parameter, alpha=1 - decay)
        else:
            torch._foreach_lerp_([a for a, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)


@dataclass
class Snapshot:
    """The averaged weights after `steps` steps and `seconds` of training."""

    steps: int
    seconds: float
    weights: dict[str, Tensor]


@dataclass
class Trained:
    losses: Tensor
    snapshots: list[Snapshot]
    seconds: float
    start_up_s: float
    notes: list[str] = field(default_factory=list)

    @property
    def steps_per_s(self) -> float:
        return (len(self.losses) - START_UP) / self.seconds if self.seconds > 0 else 0.0


def train(trainer: Trainer, seconds: float, snapshots: int, max_steps: int | None = None) -> Trained:
    """Trains for `seconds`, or `max_steps` where those end first, with snapshots evenly over the time or the steps."""
    began = time.perf_counter()
    losses = [trainer.step() for _ in range(START_UP)]
    synchronize(trainer.device)
    start_up = time.perf_counter() - began
    clock, started, taken = 0.0, time.perf_counter(), []
    queued: list[torch.cuda.Event] = []
    while True:
        losses.append(trainer.step())
        hold_back(trainer.device, queued)
        now = clock + time.perf_counter() - started
        done = now >= seconds or (max_steps is not None and len(losses) >= max_steps)
        share = max(now / seconds, len(losses) / max_steps if max_steps else 0.0)
        if done or share >= (len(taken) + 1) / snapshots:
            synchronize(trainer.device)
            clock += time.perf_counter() - started
            taken.append(Snapshot(len(losses), clock, trainer.averaged()))
            synchronize(trainer.device)
            started = time.perf_counter()
        if done:
            break
    return Trained(torch.stack(losses).float().cpu(), taken, clock, start_up, notes_of(trainer))


def hold_back(device: torch.device, queued: list[torch.cuda.Event], ahead: int = 4) -> None:
    """The host may run a few steps ahead of the device, not more, or the clock would be the host's alone."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record()
    queued.append(event)
    if len(queued) > ahead:
        queued.pop(0).synchronize()


def notes_of(trainer: Trainer) -> list[str]:
    """Where opendit did less than it was asked for, and why."""
    if not trainer.way.accelerated:
        return []
    from opendit.patch import core

    return sorted({what for _, what in core.notes(trainer.model)})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Draws:
    """A step's random numbers, on the device, the same in every way of running it."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.seed = device, seed
        self.generator = torch.Generator(device)

    def at(self, step: int) -> torch.Generator:
        return self.generator.manual_seed(self.seed * 1_000_003 + step)


def smoothed(values: Tensor, width: int) -> Tensor:
    """Means over windows of `width`, at every place."""
    return values.double().unfold(0, min(width, len(values)), 1).mean(-1)


def curve(losses: Tensor, points: int = 100) -> dict[str, Any]:
    """A loss curve for the record: means over equal windows."""
    width = max(1, len(losses) // points)
    return {"every": width, "losses": losses[: len(losses) // width * width].view(-1, width).mean(1).tolist()}
