"""The measured rows, as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import torch

import opendit
from opendit.bench.jobs import Job
from opendit.bench.measuring import STEPS, Row


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def table(job: Job, rows: Sequence[Row], precision: str) -> str:
    """Speeds are relative to `torch.compile` where it ran: eager code is easily beaten."""
    lines = [
        f"{job.name}, {job.setting}, {precision}; {device_name(job.device)}, torch {torch.__version__}, "
        f"opendit {opendit.__version__}"
    ]
    head = ["", "ms", "samples/s", "speed", "GiB", "first s", "off by"]
    body = [head]
    for step, name in STEPS.items():
        mine = [row for row in rows if row.step == step]
        if mine:
            body.append([name, *[""] * (len(head) - 1)])
            body += [_cells(row, _baseline(mine)) for row in mine]
    widths = [max(len(line[i]) for line in body if len(line) > 2) for i in range(len(head))]
    for line in body:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=False))]
        lines.append("  ".join(cells if len(line) > 2 else [line[0].ljust(widths[0]), line[1]]).rstrip())
    lines.append(
        "speed: relative to torch.compile where it ran, else to plain. off by: gradients or outputs, against the plain "
        "model in a higher precision."
    )
    if job.device.type == "cpu":
        lines.append("On a CPU opendit's kernels run as PyTorch code: its row is there to be checked, not for speed.")
    return "\n".join(lines)


def as_json(job: Job, rows: Sequence[Row], precision: str) -> dict[str, Any]:
    return {
        "model": job.name,
        "setting": job.setting,
        "precision": precision,
        "device": device_name(job.device),
        "versions": {
            "torch": str(torch.__version__),
            "opendit": opendit.__version__,
            "python": platform.python_version(),
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _baseline(rows: Sequence[Row]) -> float | None:
    ms = {row.variant: row.ms for row in rows}
    return ms.get("torch.compile") or ms.get("plain")


def _cells(row: Row, baseline: float | None) -> list[str]:
    if row.ms is None or row.per_s is None:
        return [f"  {row.variant}", row.refused or ""]
    off = row.errors.get("gradients", row.errors.get("output", 0.0))
    return [
        f"  {row.variant}",
        f"{row.ms:.2f}",
        f"{row.per_s:.0f}" if row.per_s >= 10 else f"{row.per_s:.2f}",
        f"{baseline / row.ms:.2f}×" if baseline else "–",
        f"{row.memory_gib:.1f}" if row.memory_gib is not None else "–",
        f"{row.first_s:.1f}",
        f"{off:.1e}",
    ]
