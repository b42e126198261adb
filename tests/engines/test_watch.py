"""A process that is killed, stopped, or fails: the others end in time, and say who was lost in which step."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opendit.watch import Life, View

ROOT = Path(__file__).parents[2]


def view(rank: int = 1, world: int = 3) -> View:
    """At time 0 everyone was just seen; a time-out of 30 s."""
    return View(rank, 30.0, 1.0, [Life(beats=1) for _ in range(world)], 0.0)


def beat(seen: View, now: float, *ranks: int, status: str = "") -> None:
    for rank in ranks:
        seen.seen(rank, seen.lives[rank].beats + 1, int(now), status, now)
    seen.round = now


def test_nobody_is_missed_while_all_beat():
    seen = view()
    for now in range(1, 100):
        beat(seen, now, 0, 1, 2)
        assert seen.verdict(now + 0.5, 7) is None


def test_one_that_stands_still_is_named_with_its_step_after_the_timeout():
    seen = view()
    for now in range(1, 40):
        beat(seen, now, 0, 1, *([2] if now <= 5 else []))
        assert (seen.verdict(now, 7) is None) == (now <= 35)
    assert seen.verdict(39, 7).startswith("rank 2 is missing in step 8: no sign of life for 34 s;")


def test_it_takes_less_once_another_has_failed():
    seen = view()
    beat(seen, 5, 0, 1, 2)
    beat(seen, 6, 0, status="RuntimeError: Connection closed by peer")
    for now in range(7, 12):
        beat(seen, now, 0, 1, status="RuntimeError: Connection closed by peer")
    assert seen.verdict(10, 7) is None
    assert "rank 2 is missing" in seen.verdict(10.5, 7)


def test_another_timeout_holds_from_then_on():
    seen = view()
    beat(seen, 1, 0, 1, 2)
    seen.waits(4)
    assert (seen.timeout, seen.interval) == (4, 0.4)
    for now in range(2, 6):
        beat(seen, now, 0, 1)
        assert seen.verdict(now, 7) is None
    assert "rank 2 is missing in step 8: no sign of life for 5 s" in seen.verdict(6, 7)


def test_one_that_failed_is_named_where_all_are_alive():
    seen = view()
    for now in range(1, 20):
        beat(seen, now, 0, 1)
        beat(seen, now, 2, status="" if now < 5 else "KeyError: 'x'")
    assert seen.verdict(11.5, 7) is None
    assert seen.verdict(19, 7) == "rank 2 failed in step 20: KeyError: 'x'"


def test_a_store_that_does_not_answer_is_the_first_process():
    seen = view()
    beat(seen, 5, 0, 1, 2)
    assert seen.verdict(34, 7) is None
    assert "rank 0 is missing" in seen.verdict(36, 7)


def test_who_was_silent_before_the_store_is_named_instead():
    seen = view()
    for now in range(1, 20):
        beat(seen, now, 0, 1, *([2] if now <= 5 else []))
    assert "rank 2 is missing" in seen.verdict(51, 7)


def test_those_who_are_done_are_not_missed():
    seen = view()
    beat(seen, 5, 1)
    beat(seen, 5, 0, 2, status="done")
    assert seen.verdict(500, 7) is None


def start(world: int, *args: object, lost: int = 0) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": str(ROOT), "LOST": str(lost), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.engines.losing", *map(str, args)]
    return [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]


def wait_for(process: subprocess.Popen, line: str) -> None:
    for said in process.stdout:
        if said.strip() == line:
            return
    raise AssertionError(process.stderr.read())


TIMEOUT = 8


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["ddp", "zero3"])
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_others_end_in_time_naming_rank_and_step(plugin, lost, how):
    processes = start(3, plugin, TIMEOUT, 100000, 0)
    try:
        wait_for(processes[lost], "step 5")
        os.kill(processes[lost].pid, getattr(signal, how))
        began = time.monotonic()
        for rank, process in enumerate(processes):
            if rank != lost:
                out, said = process.communicate(timeout=TIMEOUT + 10 - (time.monotonic() - began))
                assert process.returncode not in (0, None)
                found = re.search(rf"opendit: rank {lost} is missing in step (\d+): no sign of life", said)
                assert found, said
                done = [int(line.split()[1]) for line in out.splitlines() if line.startswith("step ")]
                assert int(found[1]) == done[-1] + 1 >= 5
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("where", [[], [2]], ids=["between steps", "while others wait for its tokens"])
def test_a_mistake_on_one_process_is_named_by_the_others(where):
    processes = start(2, "ddp", 60, 100000, 5, *where, lost=1)
    try:
        wait_for(processes[1], "step 5")
        said = processes[0].communicate(timeout=30)[1]
        assert processes[0].returncode
        assert "rank 1 failed in step 6: KeyError: 'a mistake in the script'" in said
        assert processes[1].wait(20)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_an_ordinary_end_is_none():
    for process in start(2, "zero2", 60, 5, 0):
        out, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert "step 5" in out
        assert "opendit: rank" not in said
