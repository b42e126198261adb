"""Runs functions in several processes that talk through gloo: one start per number of processes, many cases in it."""

from __future__ import annotations

import datetime
import functools
import os
import shutil
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A collective that someone does not join fails after this long, so a hang is a failure.
_TIMEOUT = datetime.timedelta(seconds=45)

Outcome = Any


@functools.cache
def outcomes(module: str, world: int, limit: float = 240.0) -> list[dict[str, Outcome]]:
    """Per rank, what each case of `module` returned, or the exception it raised, as {case: value or Exception}.

    `module.cases(world)` gives the cases as {name: function without arguments}; they run in that order.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_work, args=(module, rank, world, str(folder))) for rank in range(world)]
    for process in ranks:
        process.start()
    end = time.monotonic() + limit
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    assert not hanging, f"ranks {hanging} did not end within {limit} s"
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    shutil.rmtree(folder)
    return found


def _work(module: str, rank: int, world: int, folder: str) -> None:
    import importlib

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    found: dict[str, Outcome] = {}
    for name, case in importlib.import_module(module).cases(world).items():
        try:
            torch.manual_seed(0)
            found[name] = case()
        except Exception as error:
            found[name] = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        # After a failure on some ranks only, collectives no longer pair up: stop here, and say so.
        torch.save(found, f"{folder}/{rank}.pt")
        failed = torch.tensor([isinstance(found[name], Exception)], dtype=torch.float64)
        dist.all_reduce(failed)
        if 0 < failed.item() < world:
            break
    dist.destroy_process_group()
    # Without the interpreter's shutdown: it can abort when one of gloo's threads asks for the interpreter's lock then.
    os._exit(0)


def of_every_rank(module: str, world: int, case: str, limit: float = 240.0) -> list[Outcome]:
    """What `case` returned on each rank; raises where it raised, or was not reached."""
    values = []
    for rank, found in enumerate(outcomes(module, world, limit)):
        assert case in found, f"rank {rank} stopped before {case}, after {list(found)[-1]}"
        if isinstance(found[case], Exception):
            raise AssertionError(f"rank {rank}: {found[case]}")
        values.append(found[case])
    return values
