import pytest

from opendit.kernels.backend import INTERPRETING


@pytest.fixture
def interpreter():
    """For tests that run Triton kernels on CPU tensors."""
    if not INTERPRETING:
        pytest.skip("needs TRITON_INTERPRET=1 and triton; on a GPU machine the kernels are compiled")
