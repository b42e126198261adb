"""The kernels that a block launches, in plain torch: contiguous outputs, each rounded once; float64 where it comes in.

With them, what is left of a block is its own algebra and wiring, at a hundredth of the interpreter's time.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype).contiguous() for t in tensors]


def unmodulated(x: Tensor, *vectors: Tensor | None) -> list[Tensor]:
    return [x.new_zeros(len(x), x.shape[2]) if v is None else v for v in vectors]


def norm(x, shift, scale, weight, bias, eps, out_dtype, center=True):
    assert weight is bias is None
    assert center
    x, shift, scale = wide(x, *unmodulated(x, shift, scale))
    rstd = (x.var(-1, correction=0) + eps).rsqrt()
    n = (x - x.mean(-1, keepdim=True)) * rstd[..., None]
    return (n * (1 + scale[:, None]) + shift[:, None]).to(out_dtype), x.mean(-1), rstd


def norm_backward(
    dout, x, scale, weight, mean, rstd, sums_dtype, want_dx, want_sums, *_, dr=None, shift=None, out=None, dx=None
):
    assert weight is None
    dtype = x.dtype
    dout, x, scale = wide(dout, x, *unmodulated(x, scale))
    n = (x - mean[..., None]) * rstd[..., None]
    g = dout * (1 + scale[:, None])
    into = dx
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    if out is not None:
        out.copy_(n * (1 + scale[:, None]) + shift[:, None])
    sums = torch.stack([dout.sum(1), (dout * n).sum(1)], 1) if want_sums else dx.new_empty(0)
    dx = (dx if dr is None else dx + dr).to(dtype)
    return dx if into is None else into.copy_(dx), sums.to(sums_dtype)


def fused(x, y, gate, shift, scale, weight, bias, eps, out_dtype, center=True, residual_dtype=None):
    residual = gate_residual(x, y, gate, residual_dtype)
    return residual, *norm(residual, shift, scale, weight, bias, eps, out_dtype, center)


def fused_backward(
    dr,
    dm,
    residual,
    y,
    gate,
    scale,
    weight,
    mean,
    rstd,
    x_dtype,
    sums_dtype,
    want,
    *_,
    want_sum=False,
    shift=None,
    modulated=None,
):
    r, g, dm, wide_y = wide(residual, gate, dm, y)
    d, s = norm_backward(dm, r, scale, weight, mean, rstd, r.dtype, True, True, dr=dr, shift=shift, out=modulated)
    sums = [(d * wide_y).sum(1, keepdim=True)] * want[2] + [s] * want[3] + [d.sum(1, keepdim=True)] * want_sum
    return (
        d.to(x_dtype),
        (g[:, None] * d).to(y.dtype),
        torch.cat(sums, 1).to(sums_dtype) if sums else d.new_empty(len(d), 0, d.shape[2]),
    )


def gate_residual(x, y, gate, residual_dtype=None, *, residual=None):
    wide_x, wide_y, wide_gate = wide(x, y, gate)
    out = wide_x + wide_gate[:, None] * wide_y
    out = out.to(residual_dtype or torch.promote_types(x.dtype, y.dtype))
    return out if residual is None else residual.copy_(out)


def gate_backward(dr, y, gate, dy, sums, want_dgate, *_):
    dr, y, gate = wide(dr, y, gate)
    if dy.numel():
        dy.copy_(gate[:, None] * dr)
    rows = [(dr * y).sum(1)] * want_dgate + [dr.sum(1)] * (sums.shape[1] - want_dgate)
    if rows:
        sums.copy_(torch.stack(rows, 1))


def gelu(p, tanh):
    return F.gelu(wide(p)[0], approximate="tanh" if tanh else "none").to(p.dtype)


def gelu_backward(dg, p, tanh, dp, h, total, *_):
    exact = torch.ops.aten.gelu_backward(*wide(dg, p), approximate="tanh" if tanh else "none")
    dp.copy_(exact)
    if h is not None:
        h.copy_(gelu(p, tanh))
    if total is not None:
        total.copy_(exact.flatten(0, -2).sum(0))


def pack(dq, dk, dv, want_sum=True):
    packed = torch.stack([dq, dk, dv], 1)
    return packed, wide(packed)[0].sum(0).flatten() if want_sum else packed.new_empty(0)


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch, block: ModuleType) -> None:
    """For `block`, opendit/patch/block.py or a copy of it, and for blocks in parts."""
    forwards = {"norm": norm, "fused": fused, "gelu": gelu, "gate": gate_residual}
    for name, module in (("norm", "norm"), ("fused", "fused"), ("gelu", "activation"), ("gate", "gating")):
        monkeypatch.setattr(block._Launch, name, staticmethod(forwards[name]))
        monkeypatch.setattr(getattr(block, module), "launch_forward", forwards[name])
    monkeypatch.setattr(block.norm, "launch_backward", norm_backward)
    monkeypatch.setattr(block.fused, "launch_backward", fused_backward)
    monkeypatch.setattr(block.gating, "launch_backward_sums", gate_backward)
    monkeypatch.setattr(block.activation, "launch_backward_into", gelu_backward)
    monkeypatch.setattr(block.packing, "pack_qkv", pack)
    monkeypatch.setattr(block, "transpose_into", lambda x, out: out.copy_(x.t()))
