"""Casts to fp32 do nothing to fp64 where models are checked in fp64, and only there."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from opendit.doubles import at_least_float, keeping_doubles


def rounded(x: torch.Tensor) -> torch.Tensor:
    return (x.float() ** 2 + x.to(torch.float32) + x.to(dtype=torch.float32)).double()


def test_casts_of_doubles_are_left_out():
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    exact = x**2 + 2 * x
    with keeping_doubles():
        kept = rounded(x)
        (grad,) = torch.autograd.grad(kept.sum(), x)
        assert x.half().dtype == torch.float16  # another cast is a cast
        assert x.detach().half().float().dtype == torch.float32
        assert torch.arange(3).float().dtype == torch.float32
    torch.testing.assert_close(kept, exact, rtol=0, atol=1e-15)
    torch.testing.assert_close(grad, 2 * x + 2, rtol=0, atol=1e-15)
    assert (rounded(x) - exact).abs().max() > 1e-9
    with keeping_doubles(False):
        assert x.float().dtype == torch.float32


def test_in_inference_too():
    with torch.inference_mode(), keeping_doubles():
        x = torch.randn(7, dtype=torch.float64)
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float64
        assert x.half().float().dtype == torch.float32


def test_what_checkpointing_computes_again_too():
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for reentrant in (False, True):
        with keeping_doubles():
            checkpoint(rounded, x, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach() + 2, rtol=0, atol=1e-15)
        x.grad = None


def test_at_least_float():
    for dtype, found in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert at_least_float(torch.zeros(1, dtype=dtype)).dtype == found
