"""Shared fixtures. Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Before any import of opendit's kernels: triton decides when a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Tiny tensors: waking a second thread costs a hundred times what it computes.
    torch.set_num_threads(1)

import pytest

from tests.interpreting import patch_interpreter

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_interpreter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; CUDA under the marker ``gpu``."""
    return torch.device(request.param)
