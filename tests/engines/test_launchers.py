"""One script, started alone, by torchrun, and by torchrun on two nodes (of one machine, told apart by torchrun)."""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import opendit
from tests.tiny_models import UserDiT

ROOT = Path(__file__).parents[2]


def start(*launcher: str, plugin: str, sp_size: int = 1, **environment: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "tests.engines.plain_script", plugin, str(sp_size)]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    env = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(*processes: subprocess.Popen) -> tuple[int, str, float]:
    """(size of the world, placements, sum of parameters) from the one line that is printed."""
    texts = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        texts.append(out)
    found = re.search(r"world (\d+), (.*), ([\d.]+)$", "".join(texts), re.M)
    assert found, texts
    return int(found[1]), found[2], float(found[3])


@functools.cache
def alone(plugin: str) -> tuple[int, str, float]:
    return said(start(plugin=plugin))


def test_without_a_launcher_it_is_a_world_of_one():
    world, placements, _ = alone("zero3")
    assert world == 1
    assert placements == "(Shard(dim=0),)"


def test_several_processes_of_another_launcher_are_not_left_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    model = UserDiT()
    with pytest.raises(ValueError, match=r"plugin: got 'ddp', but .* SLURM_NTASKS says that .* start with `torchrun"):
        opendit.accelerate(model, {"plugin": "ddp"})
    assert opendit.patch.core.plan_of(model) is None


@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "sp_size"), [("ddp", 1), ("zero2", 2), ("gemini", 1)])
def test_torchrun(plugin, sp_size):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    world, _, parameters = said(start(*launcher, plugin=plugin, sp_size=sp_size))
    assert world == 2
    assert parameters == pytest.approx(alone("zero3")[2], rel=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "sp_size"), [("ddp", 2), ("zero3", 1), ("zero3", 2)])
def test_torchrun_on_two_nodes(plugin, sp_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d")
    launcher += ("--rdzv-id=test", f"--rdzv-endpoint=127.0.0.1:{port}")
    world, placements, parameters = said(*(start(*launcher, plugin=plugin, sp_size=sp_size) for _ in range(2)))
    assert world == 4
    assert placements == ("whole" if plugin == "ddp" else "(Replicate(), Shard(dim=0))")
    assert parameters == pytest.approx(alone("zero3")[2], rel=1e-11)
