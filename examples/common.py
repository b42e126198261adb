"""What every example script needs around the model: one-line errors, the process group, EMA."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class OneLineParser(argparse.ArgumentParser):
    """A mistake on the command line costs one line and exit code 2; `--help` has the rest. Flags are not shortened."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Most mistakes are every process's: rank 0 speaks first, and torchrun ends the others before they do too.
            # What only this process sees, such as a GPU that is not there, is said a little later.
            time.sleep(2)
            message = f"rank {rank}: {message}"
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(2)

    @contextlib.contextmanager
    def explain_mistakes(self) -> Iterator[None]:
        """For the set-up, where a wrong value or path comes from the user; a training step's error keeps its trace."""
        try:
            yield
        except (ValueError, NotImplementedError, OSError) as error:
            self.error(str(error))


def positive_int(text: str, limit: int = 10**9) -> int:
    if (number := whole_number(text, limit)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def whole_number(text: str, limit: int = 10**9) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if len(text) > 100 or int(text) > limit:  # int() itself refuses thousands of digits
        raise argparse.ArgumentTypeError(f"{text[:100]} is more than {limit}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up to below 1")
    return value


def named_path(text: str) -> Path:
    """For Path("") is the current folder, which nobody asked for."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def check_writable(path: Path) -> None:
    """An OSError now rather than after the work; leaves no file that was not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink(missing_ok=True)  # another process may look at the same time


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (or alone), and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(device: str = "auto") -> torch.device:
    """This process's GPU if there is one, else the CPU; `device` may insist on cpu or cuda."""
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise ValueError("--device cuda: torch sees no CUDA device here")
    if gpus == 0 or device == "cpu":
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(f"torchrun started more processes than there are GPUs ({gpus}); lower --nproc_per_node")
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def start_process(device: str = "auto") -> Process:
    """Under torchrun, one process per GPU, joined in a group; else this process alone."""
    place = pick_device(device)
    if "RANK" not in os.environ:
        return Process(0, 1, place)
    on_gpu = place.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None)
    return Process(dist.get_rank(), dist.get_world_size(), place)


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


def mean_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def stop_if_any(problem: str) -> None:
    """When any process has a problem, all end with exit code 1, and rank 0 says it. DDP models are dropped by now."""
    if problems := gather_lists([problem] if problem else []):
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(problems[0], file=sys.stderr, flush=True)  # before torchrun sees another process end
        stop_process()
        sys.exit(1)


class Ema:
    """Running mean of a model's weights without opendit: average ← decay·average + (1 − decay)·weight."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.model, self.module = model, copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        # The first updates count for more, or a short run would average in its random start.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(self.model.parameters()), 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def in_model(self) -> Iterator[None]:
        """Inside the `with` block the model has the averaged weights."""
        own = [p.clone() for p in self.model.parameters()]
        try:
            torch._foreach_copy_(list(self.model.parameters()), list(self.module.parameters()))
            yield
        finally:
            torch._foreach_copy_(list(self.model.parameters()), own)
