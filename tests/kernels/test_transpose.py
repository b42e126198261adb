"""The transposing copy: every element in its place, whatever the sizes, strides and dtypes."""

import pytest
import torch

from opendit.kernels.transpose import transpose_into

pytest.importorskip("triton")


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (65, 130), (1, 200), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_in_its_place(shape, dtype, device) -> None:
    x = torch.randn(shape, device=device)
    out = torch.full(shape[::-1], torch.nan, dtype=dtype, device=device)
    assert transpose_into(x, out) is out
    assert torch.equal(out, x.t().to(dtype))


def test_rows_may_lie_apart(device) -> None:
    x, out = torch.randn(70, 50, device=device)[:, :33], torch.zeros(33, 100, device=device)
    transpose_into(x, out[:, :70])
    assert torch.equal(out[:, :70], x.t())
    assert not out[:, 70:].any()
