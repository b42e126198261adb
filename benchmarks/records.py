"""Reads benchmarks/results/: which files there are, which of them counts, and what its rows say.

Of several files for one configuration the newest counts that has both a torch.compile baseline and the recipe; what
was measured beside what stays together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

Row = dict[str, Any]

THEMES = (
    "train_step",
    "sampling",
    "step_cache",
    "ablation",
    "largest_batch",
    "loss_curves",
    "kernels",
    "attention",
    "engines",
    "sequence_parallel",
    "timeline",
    "peers",
    "video",
)
LABELS = {
    "as published": "as published (fp32 + TF32)",
    "eager": "eager, bf16 autocast",
    "torch.compile": "`torch.compile`, bf16 autocast",
    "torch.compile bf16 weights": "`torch.compile`, bf16 weights and fp32 masters",
    "opendit": '**`accelerate(model, "train")`**',
    "opendit compiled": '`torch.compile(accelerate(model, "train"))`',
    "opendit fp8": '`"train"` with `precision="fp8"`',
    "opendit fp8, bf16 residual": '`"train"` with `precision="fp8"`, `residual="bf16"`',
}
SAMPLING_LABELS = {
    "torch.compile": "`torch.compile`",
    "torch.compile CUDA graphs": '`torch.compile(mode="reduce-overhead")`',
    "opendit step by step": '`accelerate(model, "sample")`',
    "opendit": '`accelerate(model, "sample")` and `opendit.sampling`',
}
# Before there were recipes with more than one ingredient, "opendit" was accelerate(model).
OLD_LABELS = LABELS | {
    "opendit": "`accelerate(model)` with the adaLN kernels alone",
    "opendit blocks": '`accelerate(model, {"compile": True})`, likewise',
}


@dataclass(frozen=True)
class Record:
    path: Path
    data: dict[str, Any]

    @property
    def theme(self) -> str:
        return next((t for t in THEMES if self.data["theme"].startswith(t)), self.data["theme"])

    @property
    def rows(self) -> list[Row]:
        return self.data["results"]

    @property
    def gpu(self) -> str:
        return str(self.data["hardware"].get("gpu", "CPU"))

    @property
    def age(self) -> tuple[str, int]:
        """Sorts old before new; files of one day are numbered."""
        number = re.search(r"\d{4}-\d\d-\d\d_(\d+)$", self.path.stem)
        return self.data["date"], int(number[1]) if number else 1

    @cached_property
    def configuration(self) -> tuple[Any, ...]:
        """What a newer file must have in common with this one to take its place."""
        row = self.rows[0] if self.rows else {}
        common = self.theme, self.gpu, row.get("model"), row.get("image_size")
        if self.theme == "engines":
            return *common, row.get("batch"), row.get("processes"), row.get("cap_gib")
        return *common, row.get("batch") if self.is_step else None

    @property
    def is_step(self) -> bool:
        return self.theme in ("train_step", "ablation", "sampling")

    @property
    def complete(self) -> bool:
        timed = {r["variant"] for r in self.rows if "ms" in r} if self.is_step else set()
        ours = any(name.startswith("opendit") for name in timed) or self.theme == "ablation"
        return not self.is_step or (baseline(self.rows) is not None and ours)

    def label(self, row: Row) -> str:
        if self.theme == "sampling":
            return SAMPLING_LABELS.get(row["variant"], row["variant"])
        labels = LABELS if "booster" in row else OLD_LABELS
        return labels.get(row["variant"], row["variant"])


def load(folder: Path = RESULTS) -> list[Record]:
    """All records, old before new."""
    found = [Record(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: record.age)


def newest(records: Sequence[Record], theme: str) -> list[Record]:
    """The record that counts for each configuration of a theme, large models and batches first."""
    best: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record.theme == theme and record.rows:
            old = best.get(record.configuration)
            if old is None or record.complete or not old.complete:
                best[record.configuration] = record
    return sorted(best.values(), key=_order)


def of_kernels(records: Sequence[Record]) -> tuple[list[Row], list[Record]]:
    """(the newest rows of each kernel on the GPU that was measured last, the records that they are from)."""
    found = [record for record in records if record.theme == "kernels" and record.rows]
    by_kernel = {row["kernel"]: record for record in found if record.gpu == found[-1].gpu for row in record.rows}
    rows = [row for name in sorted(by_kernel) for row in by_kernel[name].rows if row["kernel"] == name]
    return rows, [record for record in found if record in by_kernel.values()]


def left_out(record: Record) -> set[str]:
    """The variants of an ablation's record that are no rungs: other arithmetic, and "opendit" where "+ CUDA graphs",
    which is the same, was measured too.
    """
    same = {"opendit"} if any(row["variant"] == "+ CUDA graphs" for row in record.rows) else set()
    return {"opendit compiled", "as published"} | same | {r["variant"] for r in record.rows if _is_fp8(r)}


def _is_fp8(row: Row) -> bool:
    booster = row.get("booster")
    return isinstance(booster, dict) and booster.get("precision") == "fp8"


def _order(record: Record) -> tuple[Any, ...]:
    _, gpu, model, size, batch, *more = record.configuration
    sizes = ["XL", "L", "B", "S"]
    rank = next((i for i, s in enumerate(sizes) if f"-{s}/" in str(model)), len(sizes))
    return rank, str(model), size or 0, -(batch or 0), gpu, *(-(number or 0) for number in more)


def baseline(rows: Sequence[Row]) -> Row | None:
    """The fastest row of torch.compile alone."""
    timed = [r for r in rows if r["variant"].startswith("torch.compile") and "ms" in r]
    return min(timed, key=lambda r: r["ms"], default=None)


def recipe(rows: Sequence[Row]) -> Row | None:
    """The row of `accelerate(model, "train")`, if there is a speed in it."""
    return next((r for r in rows if r["variant"] == "opendit" and "booster" in r and "ms" in r), None)


def ratio(rows: Sequence[Row], row: Row) -> float | None:
    best = baseline(rows)
    return best["ms"] / row["ms"] if best and "ms" in row else None
