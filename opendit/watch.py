"""Ends this process when another one is gone, and says which, and in which step.

Collectives that a process does not join fail or hang without a name. So every process writes a sign of life into a
store of torch's (a TCPStore in process 0) once per interval, from a thread, and reads the others':

    rank → [beats, steps done, "" | "done" | what it failed with]

A process is missing when its beats stand still for the time-out; or, once some process has failed (its collective said
that a connection is closed), for a few intervals. Where the store itself does not answer, process 0 is missing. What a
thread can see is whether a process runs, not whether its training does: that is left to the collectives' time-outs.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch.distributed as dist

_INTERVAL = 1.0
_SHORT = 5  # intervals without a beat that are enough once a process has failed


@dataclass
class Life:
    """What is known of a process: its last beat, when that was seen first, its steps, and its status."""

    beats: int = 0
    at: float = 0.0
    steps: int = 0
    status: str = ""


@dataclass
class View:
    """What one process knows of all. Times are of its own monotonic clock.

    Attributes:
        round: when the store last answered.
        failed_at: when it was first known that some process failed.
    """

    rank: int
    timeout: float
    interval: float
    lives: list[Life]
    round: float
    failed_at: float | None = None

    def waits(self, timeout: float) -> None:
        """From now on for so long."""
        self.timeout, self.interval = timeout, _interval(timeout)

    def seen(self, rank: int, beats: int, steps: int, status: str, now: float) -> None:
        life = self.lives[rank]
        if beats != life.beats:
            life.beats, life.at = beats, now
        life.steps, life.status = steps, status
        if status not in ("", "done") and self.failed_at is None:
            self.failed_at = now

    def verdict(self, now: float, steps: int) -> str | None:
        """Who is missing, in words; None while nobody is known to be.

        steps: that this process has done. It waits for the missing one in the step after them, for no optimizer's step
        is done before everyone has joined its gradients.
        """
        limit = self.timeout if self.failed_at is None else min(self.timeout, _SHORT * self.interval)
        others = [r for r, life in enumerate(self.lives) if r != self.rank and life.status != "done"]
        if not others:
            return None
        silent = [r for r in others if now - self.lives[r].at > limit]
        if now - self.round > limit:
            # Nobody's beats arrive: who was silent before, or else the store's own process.
            before = [r for r in silent if self.round - self.lives[r].at > 3 * self.interval]
            silent = before or [0]
            if self.rank == 0 and not before:
                return None
            if self.lives[silent[0]].status == "done":
                return None
        if silent:
            rank = min(silent, key=lambda r: self.lives[r].at)
            quiet = now - min(self.lives[rank].at, self.round)
            return (
                f"rank {rank} is missing in step {steps + 1}: no sign of life for {quiet:.0f} s; it was killed or "
                "stopped, or its host is gone"
            )
        if self.failed_at is not None and now - self.failed_at > limit + 2 * self.interval:
            failed = [r for r in others if self.lives[r].status]
            if failed:
                life = self.lives[failed[0]]
                return f"rank {failed[0]} failed in step {life.steps + 1}: {life.status}"
        return None


@dataclass
class Watch:
    """One process's threads, store and view."""

    store: Any  # torch's TCPStore
    view: View
    world: object
    steps: int = 0
    status: str = ""
    beats: int = 0
    closed: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=f"opendit{work.__name__}", daemon=True).start()
        atexit.register(self._at_exit, os.getpid())

    def step_done(self, *_: object) -> None:
        self.steps += 1

    def beat(self) -> None:
        """Writes this process's sign of life and reads the others'."""
        self.beats += 1
        self.store.set(str(self.view.rank), json.dumps([self.beats, self.steps, self.status]))
        values = self.store.multi_get([str(rank) for rank in range(len(self.view.lives))])
        now = time.monotonic()
        for rank, value in enumerate(values):
            beats, steps, status = json.loads(value)
            self.view.seen(rank, beats, steps, status, now)
        self.view.round = now

    def _beat(self) -> None:
        while not self.closed.wait(self.view.interval):
            with contextlib.suppress(RuntimeError, ValueError):  # no answer: `_judge` counts the time
                self.beat()

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.closed.wait(self.view.interval / 2):
            now = time.monotonic()
            if now - last > 3 * self.view.interval:
                self._was_away(now)
            last = now
            if dist.group.WORLD is not self.world:  # destroyed: nobody waits for anybody any more
                self._leave()
                return
            self.end_if(self.view.verdict(now, self.steps))

    def _leave(self) -> None:
        self.status = "done"
        with contextlib.suppress(RuntimeError, ValueError):
            self.beat()
        self.closed.set()

    def _was_away(self, now: float) -> None:
        """This process itself stood still, so it can't say anything of the others."""
        self.view.round = now
        for life in self.view.lives:
            life.at = now

    def end_if(self, verdict: str | None) -> None:
        if verdict is None or self.closed.is_set():
            return
        self.closed.set()
        rank = self.view.rank
        print(f"opendit: {verdict}. This process, rank {rank}, ends.", file=sys.stderr, flush=True)
        if rank == 0:
            time.sleep(3 * self.view.interval)  # its store tells the others the same
        os._exit(1)

    def _at_exit(self, pid: int) -> None:
        if os.getpid() != pid or self.closed.is_set() or not self._is_current():
            return
        error = getattr(sys, "last_value", None)  # set when an exception ends the script
        self.status = "done" if error is None else f"{type(error).__name__}: {error}".splitlines()[0][:300]
        wait = 2 * self.view.interval if error is None else (_SHORT + 4) * self.view.interval
        end = time.monotonic() + wait
        if error is not None and self.view.failed_at is None:
            self.view.failed_at = time.monotonic()
        while time.monotonic() < end and not self.closed.is_set():
            if all(life.status for r, life in enumerate(self.view.lives) if r != self.view.rank):
                break  # everyone ends, each saying why
            if error is None and self.view.rank != 0 and self.view.lives[self.view.rank].status == "done":
                break
            time.sleep(self.view.interval / 4)
        self.closed.set()

    def _is_current(self) -> bool:
        return _watch is self


def _interval(timeout: float) -> float:
    return min(_INTERVAL, timeout / 10)


_watch: Watch | None = None


def watch(timeout: float | None, default: float) -> Watch | None:
    """Watches the processes of the default group; every one makes this call. The same watch on later calls.

    The last `timeout` that was given counts, `default` where none was. None where there is one process only.
    """
    global _watch
    if dist.get_world_size() == 1:
        return None
    if _watch is not None:
        if _watch.world is dist.group.WORLD:
            if timeout is not None:
                _watch.view.waits(timeout)
            return _watch
        _watch.closed.set()
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else os.environ.get("MASTER_ADDR", hosts[0])
    tcp_store = cast(Any, dist).TCPStore
    store = tcp_store(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store is not None else 0]
    dist.broadcast_object_list(port, 0)
    if store is None:
        store = tcp_store(host, port[0], is_master=False, wait_for_workers=False)
    now = time.monotonic()
    limit = timeout if timeout is not None else default
    view = View(rank, limit, _interval(limit), [Life(at=now) for _ in range(world)], now)
    _watch = Watch(store, view, dist.group.WORLD)
    store.set(str(rank), json.dumps([0, 0, ""]))
    dist.barrier()
    _watch.start()
    return _watch
