"""A small training run with everything in it that a checkpoint must bring back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import opendit
from opendit.attached import Attached, attach
from opendit.pieces import piece_of
from tests.tiny_models import UserDiT, randomise

SAMPLES = 24


class Images(Dataset):
    def __init__(self, size: int = 4, channels: int = 4):
        self.images = torch.randn(SAMPLES, channels, size, size, generator=torch.Generator().manual_seed(11))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return self.images[index], index % 5


class Counter:
    """Stands for a rule that `accelerate` attaches to a model: numbers, and a tensor by parameter name."""

    def __init__(self, model: nn.Module):
        self.taken, self.scale = 0, 2.0
        self.sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        attach(model, "rule", Attached(self._state, self._load, self._pieces))

    def _state(self, model):
        return {"taken": self.taken, "scale": self.scale}

    def _load(self, model, state):
        self.taken, self.scale = state["taken"], state["scale"]

    def _pieces(self, model):
        return {name: piece_of(value) for name, value in self.sums.items()}


class Trainer:
    """`seed` differs between the run that is saved and the one that is loaded into: nothing may be alike by chance."""

    def __init__(
        self,
        seed: int,
        *,
        dim: int = 16,
        depth: int = 1,
        accelerate: bool = False,
        attached: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ):
        seed = seed * ranks + rank  # other data and draws in each process; DDP makes the models alike
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        self.model = randomise(UserDiT(size=4, dim=dim, heads=2, depth=depth), seed)
        decayed = [p for n, p in self.model.named_parameters() if p.requires_grad and not n.endswith("bias")]
        others = [p for n, p in self.model.named_parameters() if p.requires_grad and n.endswith("bias")]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1 + seed // ranks}, {"params": others, "weight_decay": 0.0}],
            lr=1e-2 * (seed // ranks + 1),
            amsgrad=True,
        )
        if accelerate:
            self.model, self.optimizer = opendit.accelerate(self.model, optimizer=self.optimizer)
        self.net = nn.parallel.DistributedDataParallel(self.model) if ranks > 1 else self.model
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4]),
            ],
            milestones=[3],
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (seed // ranks) * 4, growth_interval=2)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.rule = Counter(self.model) if attached else None
        self.sampler = opendit.ResumableSampler(SAMPLES, 4, seed=3, rank=rank, ranks=ranks)
        self.loader = DataLoader(Images(), batch_sampler=self.sampler)
        self.losses: list[float] = []
        self.step = 0

    def train(self, until: int, after_step: Any = None) -> None:
        if self.step >= until:
            return
        for x, y in self.sampler.over(self.loader):
            noise = opendit.noise(x.shape[1:], 1, self.step, self.sampler.ids)
            t = opendit.timesteps(1000, 1, self.step, self.sampler.ids)
            # The label drop of UserDiT draws from torch; these from the others.
            x = x * (1 + 0.1 * random.random()) + float(numpy.random.randn()) * 0.1
            out = self.net(x + noise, t, y)
            loss = (out[:, :4] - noise).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()
            with torch.no_grad():
                for e, p in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                    e.lerp_(p, 0.1)
            if self.rule is not None:
                self.rule.taken += 1
                self.rule.scale *= 1.5
                for name, p in self.model.named_parameters():
                    self.rule.sums[name] += p.detach()
            self.losses.append(_mean(loss).item())
            self.step += 1
            if after_step is not None:
                after_step()
            if self.step >= until:
                return

    def parts(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "scaler": self.scaler, "sampler": self.sampler, "ema": self.ema}

    def save(self, folder: Path, **more: Any):
        extra = {"losses": self.losses}
        return opendit.save(folder, self.model, self.optimizer, step=self.step, extra=extra, **self.parts(), **more)

    def load(self, folder: Path, **more: Any) -> opendit.checkpoint.Loaded:
        parts = {name: part for name, part in self.parts().items() if name not in more.get("leave", ())}
        optimizer = None if "optimizer" in more.get("leave", ()) else self.optimizer
        loaded = opendit.load(folder, self.model, optimizer, **parts, **more)
        self.step, self.losses = loaded.step, loaded.extra["losses"]
        return loaded

    def facts(self) -> dict[str, Any]:
        """Everything that the run's future depends on, and its past, copied."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        found: dict[str, Any] = {f"model {n}": v for n, v in self.model.state_dict().items()}
        found |= {f"ema {n}": v for n, v in self.ema.state_dict().items()}
        found |= {f"optimizer {names[id(p)]} {k}": v for p, s in self.optimizer.state.items() for k, v in s.items()}
        for i, group in enumerate(self.optimizer.param_groups):
            found |= {f"group {i} {k}": v for k, v in group.items() if k != "params"}
        found |= {f"scheduler {k}": str(v) for k, v in _flat(self.scheduler.state_dict())}
        found |= {f"scaler {k}": v for k, v in self.scaler.state_dict().items()}
        found |= {"position": self.sampler.position, "losses": list(self.losses), "step": self.step}
        if self.rule is not None:
            found |= {"taken": self.rule.taken, "scale": self.rule.scale}
            found |= {f"sum {n}": v for n, v in self.rule.sums.items()}
        key, place, *gauss = numpy.random.get_state()[1:]
        found |= {"rng python": random.getstate(), "rng numpy": (key.tolist(), place, gauss)}
        found["rng torch"] = torch.get_rng_state()
        return copy.deepcopy(found)


def _mean(loss: torch.Tensor) -> torch.Tensor:
    """Over the processes: what is saved beside the model must be equal in all."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return loss


def _flat(value: Any, name: str = ""):
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _flat(v, f"{name}.{k}")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, v in enumerate(value):
            yield from _flat(v, f"{name}.{i}")
    else:
        yield name, value


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of facts that are not equal to the bit."""
    return [name for name in {**a, **b} if name not in a or name not in b or not equal(a[name], b[name])]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
