"""The benchmark of engines, on the CPU with a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def smoke(*launcher: str, variants: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> list[str]:
    command = [sys.executable, *launcher, "benchmarks/engines.py", "--smoke", *more]
    command += ["--variants", *variants] if variants else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "img/s" in line]


def test_smoke():
    assert len(smoke(variants=("fsdp2 by hand", "zero2"))) == 2


def test_averages_and_saves_are_measured(tmp_path):
    plain, averaged = smoke(variants=("ddp", "zero2 ema saving"), more=("--folder", str(tmp_path / "checkpoints")))
    assert "averages 0.00" in plain
    assert "a save holds it up" in averaged
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_smoke_of_all_on_two_processes():
    assert len(smoke("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")) == 7
