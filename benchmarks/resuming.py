"""Trainings that are cut and go on: what a benchmark's run consists of, kept with opendit's own checkpoints.

A run that goes on is the uninterrupted one to the bit, as far as its operations are: parameters, optimizer, average,
random states, and the losses so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import opendit


class Kept:
    """One run's checkpoint in `folder`; None: nothing is kept. `setting` is plain values that stay as they were."""

    def __init__(
        self,
        folder: Path | None,
        setting: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: nn.Module | None = None,
    ) -> None:
        self.folder, self.setting = folder, setting
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.steps, self.seconds = 0, 0.0

    def go_on(self) -> list[Tensor]:
        """The run as it was kept, and its losses; none where it begins. Raises `ValueError` for another setting."""
        if self.folder is None or opendit.latest_checkpoint(self.folder) is None:
            return []
        found = opendit.load(self.folder, self.model, self.optimizer, ema=self.ema)
        other = {name: found.config[name] for name in self.setting if found.config[name] != self.setting[name]}
        if other:
            raise ValueError(
                f"state: {self.folder} holds a run with {other}; allowed: {self.setting}. Name another folder, or the "
                "same options"
            )
        self.steps, self.seconds = found.step, found.extra["seconds"]
        return list(found.extra["losses"].to(next(self.model.parameters()).device))

    def keep(self, losses: Tensor, seconds: float) -> float:
        """Keeps the run after `seconds` more, with all losses [steps] on the CPU; how many there are now."""
        self.seconds += seconds
        if self.folder is not None and len(losses) > self.steps:
            extra = {"losses": losses, "seconds": self.seconds}
            saved = {"step": len(losses), "ema": self.ema, "extra": extra, "config": self.setting, "keep": 1}
            opendit.save(self.folder, self.model, self.optimizer, **saved)
        return self.seconds
