"""Attention of one block of keys: alone it is attention; blocks merged by their denominators are, too; gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opendit.attention import blockwise
from opendit.fastseq.ring import _merge


def whole(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def tensors(device, dtype, head_dim, queries=37, keys=53):
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(2, queries, 3, head_dim), (2, keys, 3, head_dim), (2, keys, 3, head_dim), (2, queries, 3, head_dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def in_blocks(q, k, v, dout, cut):
    """out, dq, dk, dv from two blocks of keys, as ring attention puts them together."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros(q.shape, dtype=wide, device=q.device), None
    for part in (slice(0, cut), slice(cut, None)):
        found, found_lse = blockwise.forward(q, k[:, part], v[:, part])
        assert found.dtype == q.dtype
        out, lse = _merge(out, lse, found, found_lse.to(wide))
    out = out.to(q.dtype)
    grads = [blockwise.backward(dout, q, k[:, p], v[:, p], out, lse) for p in (slice(0, cut), slice(cut, None))]
    (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = grads
    return [out, dq_a.to(wide) + dq_b, torch.cat((dk_a, dk_b), 1), torch.cat((dv_a, dv_b), 1)]


def by_autograd(q, k, v, dout):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = whole(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def errors(found, expected):
    return [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("head_dim", [1, 20, 64])
@pytest.mark.parametrize("cut", [1, 20, 52])
def test_fp64(device, head_dim, cut):
    given = tensors(device, torch.float64, head_dim)
    assert max(errors(in_blocks(*given, cut), by_autograd(*given))) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [20, 64, 72, 128])
def test_as_exact_as_torchs_own(device, dtype, head_dim):
    given = tensors(device, dtype, head_dim, 128, 192)
    truth = by_autograd(*(t.double() for t in given))
    ours, theirs = errors(in_blocks(*given, 100), truth), errors(by_autograd(*given), truth)
    assert all(mine <= 2 * own + 1e-7 for mine, own in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize(
    ("head_dim", "capability", "expected"),
    [(64, (8, 0), True), (256, (9, 0), True), (264, (9, 0), False), (64, (7, 5), False)],
)
def test_torchs_kernel_only_where_it_runs(monkeypatch, head_dim, capability, expected):
    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = torch.empty(1, 2, 1, head_dim, dtype=torch.bfloat16).as_subclass(OnGPU)
    assert blockwise._flash(q) == expected
