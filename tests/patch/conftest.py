import pytest


@pytest.fixture
def interpreter():
    """For tests that run Triton kernels on CPU tensors."""
    import os

    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1; the kernels are compiled for the GPU here")
