"""Which implementation runs where."""

import pytest
import torch

from opendit.kernels import backend

CUDA = torch.device("cuda")


@pytest.mark.skipif(not backend.TRITON_INSTALLED, reason="needs triton")
def test_auto_leaves_torch_func_to_the_reference():
    taken = []

    def function(x):
        taken.append(backend.resolve("auto", "gate_residual", CUDA, 64, double=False))
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 3))
    assert taken == ["triton", "reference", "reference"]


@pytest.mark.parametrize(("hidden", "double", "wanted"), [(8192, False, "triton"), (8193, False, "reference")])
@pytest.mark.skipif(not backend.TRITON_INSTALLED, reason="needs triton")
def test_auto_goes_by_what_the_kernels_can_hold(hidden, double, wanted):
    assert backend.resolve("auto", "layernorm", CUDA, hidden, double) == wanted
    assert backend.resolve("auto", "layernorm", CUDA, 64, double=True) == "reference"
