"""The interpreter's conversions as the tests patch them: a test of the tests."""

from __future__ import annotations

import pytest
import torch

from opendit.kernels._rows import downcast, tl, triton
from opendit.kernels.backend import INTERPRETING


@pytest.mark.skipif(not INTERPRETING, reason="for the interpreter")
def test_bfloat16_is_rounded_to_nearest_even() -> None:
    @triton.jit
    def cast(x_ptr, low_ptr, back_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        low = downcast(tl.load(x_ptr + at), low_ptr.dtype.element_ty)
        tl.store(low_ptr + at, low)
        tl.store(back_ptr + at, low.to(tl.float32))

    special = [0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, -1e-45]
    x = torch.cat([torch.tensor(special), torch.randn(1024 - len(special)) * 10 ** torch.randn(1024 - len(special))])
    low, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    cast[(1,)](x, low, back, N=1024)
    assert torch.equal(low, x.bfloat16())
    assert torch.equal(back, x.bfloat16().float())
    x.fill_(float("nan"))
    cast[(1,)](x, low, back, N=1024)
    assert low.isnan().all()
    assert back.isnan().all()
