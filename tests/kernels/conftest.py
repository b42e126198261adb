"""Kernel tests read what kernels wrote, so memory starts as NaN: an element nobody wrote then shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty, empty_like and new_empty return with NaN."""

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.is_floating_point():  # what a compiler traces is not memory
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def device(device: torch.device) -> torch.device:
    """The shared fixture's, less the CPU on a machine with a GPU: there triton compiles and does not interpret."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("runs on the GPU here")
    return device
