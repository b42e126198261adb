"""The speed table: the same training steps by the plain model, by torch.compile and by opendit, in one process.

Every variant starts from the same weights and sees the same batches, noise and label drops, so its losses may be
compared step by step. Timing goes round the variants in turns, so that a slow minute of the machine hits them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from examples.common import Process, in_ddp

Batch = tuple[Tensor, Tensor]
Build = Callable[[], tuple[nn.Module, Optimizer]]
Step = Callable[[nn.Module, Optimizer, Batch], Tensor]

ROUNDS, STEPS_PER_ROUND, WARM_UP = 8, 3, 3


def compare(
    variants: dict[str, Build],
    step: Step,
    batches: list[Batch],
    *,
    loss_steps: int,
    process: Process,
    images_per_step: int,
) -> list[dict[str, Any]]:
    """One row per variant; the first is the baseline of `max_loss_difference`. A variant that can't run says why."""
    rows: list[dict[str, Any]] = []
    running: dict[str, tuple[nn.Module, Optimizer]] = {}
    device = process.device
    # Compiled code would otherwise draw other random numbers for the label drop than eager code does.
    with torch._inductor.config.patch(fallback_random=True):
        for name, build in variants.items():
            row: dict[str, Any] = {"variant": name}
            rows.append(row)
            try:
                running[name], first = _first_steps(build, step, batches, loss_steps, process)
                row |= first
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(ROUNDS):
            for name, (model, optimizer) in running.items():
                start = _now(device)
                for i in range(STEPS_PER_ROUND):
                    step(model, optimizer, batches[i % len(batches)])
                seconds[name].append((_now(device) - start) / STEPS_PER_ROUND)
    baseline = rows[0].get("losses", [])
    for row in rows:
        if "error" in row:
            continue
        per_step = statistics.median(seconds[row["variant"]])
        row |= {"ms_per_step": per_step * 1e3, "images_per_s": images_per_step / per_step}
        losses = row.pop("losses")
        row["max_loss_difference"] = max((abs(a - b) for a, b in zip(losses, baseline, strict=True)), default=None)
    rows[0].pop("max_loss_difference", None)
    return rows


def _first_steps(
    build: Build, step: Step, batches: list[Batch], loss_steps: int, process: Process
) -> tuple[tuple[nn.Module, Optimizer], dict[str, Any]]:
    device, on_gpu = process.device, process.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)  # held by the variants before this one, idle meanwhile
    model, optimizer = build()
    model = in_ddp(model, process)
    losses = []
    for i in range(max(loss_steps, WARM_UP)):
        torch.manual_seed(i)
        start = _now(device)
        losses.append(step(model, optimizer, batches[i % len(batches)]))
        if i == 0:
            first_step = _now(device) - start
    return (model, optimizer), {
        "losses": torch.stack(losses[:loss_steps]).tolist(),
        "first_step_s": first_step,
        "peak_memory_mib": (torch.cuda.max_memory_allocated(device) - before) / 2**20 if on_gpu else None,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def format_table(rows: list[dict[str, Any]], loss_steps: int) -> str:
    head = ["", "ms/step", "img/s", "peak memory", "first step", f"max loss difference, {loss_steps} steps"]
    lines = [head]
    for row in rows:
        if "error" in row:
            lines.append([row["variant"], f"did not run: {row['error']}", "", "", "", ""])
            continue
        memory, difference = row["peak_memory_mib"], row.get("max_loss_difference")
        lines.append(
            [
                row["variant"],
                f"{row['ms_per_step']:.2f}",
                f"{row['images_per_s']:.0f}",
                "–" if memory is None else f"{memory:.0f} MiB",
                f"{row['first_step_s']:.2f} s",
                "–" if difference is None else f"{difference:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines if not line[1].startswith("did not")) for i in range(len(head))]
    table = "\n".join(
        "  ".join([line[0].ljust(max(widths[0], 14))] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)])
        for line in lines
    )
    if any("error" not in row and row["peak_memory_mib"] is None for row in rows):
        table += (
            "\npeak memory is only measured on GPUs: on a CPU the variants share one process, whose peak never falls"
        )
    return table
