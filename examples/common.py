"""What every example script needs around the model: one-line errors, the process group, EMA."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


class OneLineParser(argparse.ArgumentParser):
    """A mistake on the command line costs one line and exit code 2; `--help` has the rest."""

    def error(self, message: str):
        # Under torchrun every process sees the same mistake; one says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    @contextlib.contextmanager
    def explain_mistakes(self) -> Iterator[None]:
        """For the set-up, where a wrong value or path comes from the user; a training step's error keeps its trace."""
        try:
            yield
        except (ValueError, NotImplementedError, OSError) as error:
            self.error(str(error))


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (or alone), and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_process(device: str = "auto") -> Process:
    """One process per GPU under torchrun, else one process; `device` may insist on cpu or cuda."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise ValueError("--device cuda: torch sees no CUDA device here")
    use_gpu = gpus > 0 and device != "cpu"
    if use_gpu and local_rank >= gpus:
        raise ValueError(f"torchrun started more processes than there are GPUs ({gpus}); lower --nproc_per_node")
    place = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if use_gpu else "gloo", device_id=place if use_gpu else None)
    return Process(rank, world, place)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def in_ddp(model: nn.Module, process: Process) -> nn.Module:
    """Under torchrun, gradients are averaged over the processes; alone, the model stays as it is."""
    if not dist.is_initialized():
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def stop_process() -> None:
    """Leaves the process group. The caller has dropped its DDP models.

    Were one of them the group's last owner, its destructor would wait for the group's threads with the interpreter's
    lock in hand, while one of those waits for that lock: now and then, a hang at exit (seen with gloo, torch 2.13).
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def gather_lists(mine: list[str]) -> list[str]:
    """Every process's list, joined, without repeats."""
    if not dist.is_initialized():
        return mine
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted(set().union(*everyone))


class Ema:
    """Running mean of a model's weights: shadow ← decay·shadow + (1 − decay)·weight, one foreach call per step."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.weights = [p.detach() for p in model.parameters()]
        self.shadow = [w.clone() for w in self.weights]
        self.names = [name for name, _ in model.named_parameters()]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        # The first updates count for more, or a short run would average in its random start.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.shadow, strict=True))
