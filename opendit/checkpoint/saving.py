"""`save`: a training run's whole state, on the disk at once or not at all.

    collect → who writes what → finite? → (copy) → own shards → rank 0: index, manifest, rename, latest, keep

In the background everything after the copy runs in a thread; writing.py has the steps.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from opendit.checkpoint import together, writing
from opendit.checkpoint.errors import CheckpointError
from opendit.checkpoint.inventory import Run
from opendit.patch.core import logger


class Saving:
    """A save that is under way, or done."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def wait(self) -> Path:
        """The checkpoint's folder, once it is on the disk; raises what went wrong while it was written."""
        self._settle()
        if self._path is None:
            raise CheckpointError("save: it failed, as was raised before")
        return self._path

    def _settle(self) -> None:
        """Waits for the thread; raises what went wrong, the first time."""
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


# The one save that may be under way in this process.
_last: list[Saving] = []


def wait() -> None:
    """Waits for a save in the background; raises what went wrong with it, once."""
    while _last:
        _last.pop()._settle()


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    ema: nn.Module | None = None,
    extra: Any = None,
    config: Any = None,
    keep: int | None = None,
    background: bool = False,
) -> Saving:
    """Saves a training run into a new folder `path`/step-(step), and makes it the latest. Every process calls it.

    Args:
        path: the folder of this run's checkpoints; made where it does not exist. All processes see it, and no other run
            writes to it.
        model: plain, accelerated, wrapped (DDP, `torch.compile`) or sharded (`fully_shard`). What `accelerate` attached
            to it, its EMA and its rule for skipped steps, is saved along.
        optimizer: the optimizer of its parameters.
        step: how many optimizer steps were tried; names the checkpoint.
        scheduler, scaler, sampler: a learning rate scheduler, a `torch.amp.GradScaler`, a `ResumableSampler`, or others
            with `state_dict` and `load_state_dict`, of plain values and tensors.
        ema: averaged weights that you keep yourself, as a module.
        extra, config: plain values (and tensors) of your own, equal in all processes; `load` gives them back.
        keep: how many checkpoints to keep, this one included; `None`: all.
        background: return once everything has been copied, and write in a thread. Training may go on at once; what goes
            wrong is raised by `wait()`, and by the next `save`, `load`, `save_weights` or `load_weights`, which wait
            for it. Call `wait()` before the process group is destroyed.

    Random states of Python, numpy, torch and the GPUs are always saved, for each process.

    Raises:
        CheckpointError: something can't be saved (it is named), is not finite, differs between processes, or can't be
            written. Every process raises it, and the folder is as before.
        ValueError, TypeError: an argument that is not allowed.
    """
    _check(step, keep)
    folder = Path(path)
    run = Run(model, optimizer, ema, scheduler, scaler, sampler)
    together.prepare()
    wait()
    job = writing.prepare(folder, run, step, extra, config)
    saving = Saving()
    if not background:
        saving._path = writing.write(job, keep)
        return saving
    job = writing.copied(job)

    def work() -> None:
        try:
            saving._path = writing.write(job, keep)
        except BaseException as error:
            saving._error = error
            logger.error("the checkpoint of step %d was not saved: %s", step, error)

    saving._thread = threading.Thread(target=work, name=f"opendit-save-{step}")
    _last.append(saving)
    saving._thread.start()
    return saving


def _check(step: object, keep: object) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step: got {step!r}; allowed: an int of at least 0")
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
        raise ValueError(f"keep: got {keep!r}; allowed: an int of at least 1, or None to keep all")
