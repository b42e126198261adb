"""The benchmark runs, and refuses to time a kernel that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
WRONG = """
import runpy, sys
import opendit.kernels.gate_residual as kernel
from dataclasses import replace
kernel.SPEC = replace(kernel.SPEC, fn=lambda x, y, gate, backend: x + gate[0] * y)
sys.argv = [sys.argv[1], "--smoke", "--kernels", "gate_residual"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytest.importorskip("triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=SCRIPT.parents[1]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_smoke() -> None:
    done = run(str(SCRIPT), "--smoke", "--kernels", "gate_residual")
    assert done.returncode == 0, done.stderr
    assert "gate_residual" in done.stdout
    assert run(str(SCRIPT)).returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_wrong_kernel_is_not_timed() -> None:
    done = run("-c", WRONG, str(SCRIPT))
    assert done.returncode != 0
    assert "nothing timed" in done.stderr, done.stderr
