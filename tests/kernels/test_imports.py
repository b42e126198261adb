"""The package and its references need torch alone."""

import subprocess
import sys

WITHOUT_TRITON = """
import sys
for name in ("triton", "apex"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from opendit.kernels.spec import discover
for spec in discover().values():
    inputs = {k: torch.randn(spec.shape(k, 2, 3, 8)).requires_grad_() for k in spec.inputs if k not in spec.optional()}
    out = spec.fn(**inputs)
    (out if isinstance(out, torch.Tensor) else out[1]).sum().backward()
    try:
        spec.fn(**inputs, backend="triton")
    except ValueError as error:
        assert "not installed" in str(error)
    else:
        raise AssertionError("triton ran")
"""

EAGER_IMPORTS = """
import sys
import opendit, opendit.kernels, opendit.kernels.backend
assert "triton" not in sys.modules, "importing the package imports triton"
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_references_work_without_triton() -> None:
    run(WITHOUT_TRITON)


def test_importing_the_package_leaves_triton_alone() -> None:
    run(EAGER_IMPORTS)
