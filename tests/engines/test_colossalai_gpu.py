"""ColossalAI's plugins on GPUs: one, or two where there are two. HybridAdam is compiled at first use, in minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engines.test_colossalai import installed

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.gpu, installed]


def _train(plugin: str, processes: int, sp: int) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.engines.colossalai_on_gpu", plugin, str(sp)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("plugin", ["ddp", "zero1", "zero2", "gemini"])
@pytest.mark.parametrize(("processes", "sp"), [(1, 1), (2, 1), (2, 2)])
def test_as_alone(plugin: str, processes: int, sp: int):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices")
    found = _train(plugin, processes, sp)
    low = plugin == "gemini"
    assert found["losses"] < (0.05 if low else 1e-4)
    assert found["norms"] < (0.05 if low else 1e-4)
    assert found["gradients"] < (0.06 if low else 1e-3)
    assert found["parameters"] < (0.01 if low else 1e-4)
