"""Kills a training run with SIGKILL at random moments, many times, and has it continued.

    python -m tests.checkpoint.killing TRIALS RANKS SEED

Each trial starts from a folder with one checkpoint. A forked process, or one for each rank, trains and saves every
step, half of the trials in the background; it is killed at a random moment between its first step and its last. What it was
doing then is read from memory that it shares. A new process loads what is there, trains to the end, and everything
that it ends with is compared, by hash, with a run that nobody disturbed. Prints the figures as JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import opendit
from opendit.checkpoint import disk, writing
from tests.checkpoint.running import Trainer

STEPS = 8
_SAVING, _WRITING, _STARTED, _DONE = range(4)


class Ranks:
    """Forked processes that train together in `folder`, and the memory in which each says what it is doing."""

    def __init__(self, folder: Path, ranks: int, background: bool, save: bool = True):
        self.folder, self.background, self.save = folder, background, save
        self.flags = [mmap.mmap(-1, 4) for _ in range(ranks)]
        self.store = tempfile.mktemp(prefix="store")
        self.pids = [self._fork(rank, ranks) for rank in range(ranks)]

    def _fork(self, rank: int, ranks: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            self._train(rank, ranks, self.flags[rank])
            code = 0
        except BaseException:
            (self.folder.parent / f"{self.folder.name}.error{rank}").write_text(traceback.format_exc())
        os._exit(code)

    def _train(self, rank: int, ranks: int, flags: mmap.mmap) -> None:
        if ranks > 1:
            store = dist.FileStore(self.store, ranks)
            limit = datetime.timedelta(seconds=20)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
        trainer = Trainer(0, dim=8, rank=rank, ranks=ranks)
        if opendit.latest_checkpoint(self.folder) is not None:
            trainer.load(self.folder)
        write = writing.write

        def flagged(*args):
            flags[_WRITING] = 1
            try:
                return write(*args)
            finally:
                flags[_WRITING] = 0

        writing.write = flagged

        def after_step() -> None:
            flags[_STARTED] = 1
            if self.save:
                flags[_SAVING] = 1
                trainer.save(self.folder, background=self.background, keep=3)
                flags[_SAVING] = 0

        if trainer.step == 0:
            trainer.save(self.folder)
        trainer.train(STEPS, after_step)
        opendit.wait()
        found = {n: hashlib.sha256(_bytes(v)).hexdigest() for n, v in trainer.facts().items()}
        (self.folder.parent / f"{self.folder.name}.facts{rank}").write_text(json.dumps(found))
        flags[_DONE] = 1
        if ranks > 1:
            dist.barrier()

    def facts(self) -> list[dict[str, str]]:
        files = [self.folder.parent / f"{self.folder.name}.facts{rank}" for rank in range(len(self.pids))]
        return [json.loads(file.read_text()) for file in files]

    def wait(self, limit: float) -> list[int]:
        """Exit statuses; those that have not ended by then are killed, and count as -1."""
        end, found = time.monotonic() + limit, dict.fromkeys(self.pids)
        while None in found.values() and time.monotonic() < end:
            for pid in [p for p, status in found.items() if status is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    found[pid] = status
            time.sleep(0.001)
        for pid in [p for p, status in found.items() if status is None]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found[pid] = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.store)
        return list(found.values())


def _bytes(value) -> bytes:
    if isinstance(value, torch.Tensor):
        return (
            f"{value.dtype} {tuple(value.shape)}".encode()
            + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return repr(value).encode()


def trials(count: int, ranks: int, seed: int) -> dict[str, object]:
    dice = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="killing"))
    start = root / "start"
    _warm(root / "warm")
    first = Ranks(start, ranks, False, save=False)
    assert set(first.wait(60)) == {0}, _errors(root)
    expected = first.facts()
    figures = {
        "trials": 0,
        "inside a save": 0,
        "while writing": 0,
        "loadable": 0,
        "bit-exact": 0,
        "hung": 0,
        "ranks": ranks,
    }
    wrong: list[str] = []
    length = _time(root, start, ranks)
    while figures["trials"] < count:
        folder = root / f"trial{figures['trials']}"
        shutil.copytree(start, folder)
        background = bool(figures["trials"] % 2)
        run = Ranks(folder, ranks, background)
        while not run.flags[0][_STARTED] and not run.flags[0][_DONE]:
            time.sleep(0.0002)
        time.sleep(dice.uniform(0, length))
        victims = run.pids if ranks == 1 or dice.random() < 0.5 else [dice.choice(run.pids)]
        finished = any(flags[_DONE] for flags in run.flags)
        doing = [(flags[_SAVING], flags[_WRITING]) for flags in run.flags]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        # The flags of the dead are what they were: read again, for they may have moved before the signal came.
        statuses = run.wait(15)
        if len(victims) == len(run.pids):
            finished = any(flags[_DONE] for flags in run.flags)
            doing = [(flags[_SAVING], flags[_WRITING]) for flags in run.flags]
        if finished:
            shutil.rmtree(folder)
            continue
        figures["trials"] += 1
        figures["inside a save"] += any(saving or writing_ for saving, writing_ in doing)
        figures["while writing"] += any(writing_ for _, writing_ in doing)
        figures["hung"] += -1 in statuses
        names = disk.names(folder)
        again = Ranks(folder, ranks, background)
        statuses = again.wait(60)
        if set(statuses) != {0}:
            wrong.append(f"trial {figures['trials']}: of {names}: {_errors(root)}")
        else:
            figures["loadable"] += 1
            changed = [
                n for a, b in zip(again.facts(), expected, strict=True) for n in {**a, **b} if a.get(n) != b.get(n)
            ]
            figures["bit-exact"] += not changed
            wrong += [f"trial {figures['trials']}: {changed[:5]}"] if changed else []
        for path in [folder, *root.glob(f"{folder.name}.*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(root)
    return {**figures, "wrong": wrong[:5]}


def _warm(folder: Path) -> None:
    """Imports, before anything is forked, what is imported when first used; no backward, which makes threads."""
    import torch.distributed.tensor

    trainer = Trainer(0, dim=8)
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    trainer.save(folder)
    trainer.load(folder)


def _time(root: Path, start: Path, ranks: int) -> float:
    """How long a run that saves takes, from its first step on."""
    folder = root / "timed"
    shutil.copytree(start, folder)
    run = Ranks(folder, ranks, False)
    while not run.flags[0][_STARTED]:
        time.sleep(0.0002)
    begun = time.monotonic()
    assert set(run.wait(60)) == {0}, _errors(root)
    return time.monotonic() - begun


def _errors(root: Path) -> str:
    return "; ".join(path.read_text()[-1500:] for path in root.glob("*.error*"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(trials(*map(int, sys.argv[1:]))))
