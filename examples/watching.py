"""What a run says of itself while it trains: log.jsonl, TensorBoard, Weights & Biases; speed, memory and MFU.

    MFU = 3 · (FLOPs of one forward of the model) · samples/s / (the GPU's bf16 peak · GPUs)

3: a backward computes twice what a forward does. FLOPs are those of matrix products and attention, counted by torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.models.registry import build

# Dense bf16 FLOP/s of the data sheets, by a part of the name that torch gives.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def forward_flops(config: dict[str, Any], cond: dict[str, torch.Tensor]) -> int:
    """Of one sample, by running the model without numbers."""
    with torch.device("meta"):
        model = build(config).eval()
        x, t = torch.empty(1, *model.sample_shape), torch.empty(1)
    one = {name: torch.empty_like(value[:1], device="meta") for name, value in cond.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, **one)
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Watch:
    """Numbers by step, to everywhere that was asked for; only the first process writes."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, writes: bool, resumed_at: int, wandb: str | None):
        self.lines = self.board = self.wandb = None
        if not writes:
            return
        path = folder / "log.jsonl"
        kept = []
        if resumed_at and path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if 0 <= _step(line) <= resumed_at]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(beside, path)
        self.lines = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=resumed_at or None)
        except ImportError:
            pass  # log.jsonl has the same numbers
        if wandb is not None:
            try:
                import wandb as library
            except ImportError as error:
                raise ValueError("--wandb: the package wandb is not installed (pip install wandb)") from error
            self.wandb = library.init(project=wandb, name=folder.name, config=settings, dir=str(folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.lines is None:
            return
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        self.lines.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        for thing in (self.lines, self.board):
            if thing is not None:
                thing.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step(line: str) -> int:
    """The step of a line of the log; -1 where it is none, as the last one may be after a kill."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1
