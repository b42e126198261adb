"""How long a save in the background holds training up, for benchmarks/engines.py.

    stall_s          seconds that `opendit.save(..., background=True)` takes, of two saves: the first also allocates the
                     host memory that copies go to
    written_s        from the first call to its checkpoint on the disk, nothing else going on
    ms_meanwhile     a training step while the second is being written
    gib              of the checkpoint, of all processes

Everything that was launched before has ended when the clock starts. Values are the slowest process's.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

import opendit
from benchmarks.common import agreed, synchronize, time_steps
from opendit.checkpoint import Saving


def save_twice(folder: Path, training: Any, step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Saves `training.model` and `training.optimizer` twice, the second time while `steps` steps go on.

    Every process calls it. `folder` must not exist, and is removed afterwards.
    """
    if folder.exists():
        raise ValueError(f"folder: got {folder}, which exists; allowed: one that can be made and removed")
    dist.barrier()
    try:
        first, saving, began = _stall(folder, training, 1)
        saved = saving.wait()
        written = agreed(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in saved.iterdir()) / 2**30
        second, saving, _ = _stall(folder, training, 2)
        meanwhile = agreed(statistics.median(time_steps(step, steps, 1)))
        saving.wait()
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return {"stall_s": [first, second], "written_s": written, "ms_meanwhile": meanwhile, "gib": size}


def _stall(folder: Path, training: Any, number: int) -> tuple[float, Saving, float]:
    """(seconds of the slowest process, the save under way, when it began)."""
    synchronize()
    dist.barrier()
    began = time.perf_counter()
    saving = opendit.save(folder, training.model, training.optimizer, step=number, keep=1, background=True)
    return agreed(time.perf_counter() - began), saving, began
