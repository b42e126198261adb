"""A whole transformer block with adaptive LayerNorm as one autograd function, with its backward written out.

    h_a = LN(x)·(1 + scale_a) + shift_a;   qkv = h_a·Wqkvᵀ + bqkv;   o = attention(qkv);   y_a = o·Wprojᵀ + bproj
    r   = x + gate_a·y_a
    h_m = LN(r)·(1 + scale_m) + shift_m;   p = h_m·W1ᵀ + b1;         g = GELU(p);          y_m = g·W2ᵀ + b2
    out = r + gate_m·y_m

x, r, out [B, L, D] in the residual stream's dtype; modulation [B, 6·D] = (shift, scale, gate) of attention, then of the
MLP; everything between is in the compute dtype: qkv [B, L, 3·D], p, g [B, L, F], the others [B, L, D]. B batch,
L tokens, D hidden, F hidden of the MLP, H heads.

What one function gains over its parts: bias gradients come out of passes that are made anyway; dq, dk and dv are packed
once; h_a, h_m and g need not be kept, since the backward's passes write them again on their way (``keep``); weight
gradients leave the matrix product in the parameters' own dtype; W2 is laid out as the matrix products like it; and
between two of forty launches there is next to no Python.

``keep`` is "all": 18·D values per token are saved between forward and backward; "selective": 12·D, h_a, h_m and g are
computed again; "full": D, the whole forward is computed again.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.attention import two_pass
from opendit.kernels import gate_residual as gating
from opendit.kernels import gate_residual_layernorm_modulate as fused
from opendit.kernels import gelu as activation
from opendit.kernels import layernorm_modulate as norm
from opendit.kernels import pack_qkv as packing

KEEP = ("all", "selective", "full")
# From this many tokens on, another layout of W2 saves more in the matrix products than its copy costs: on an H200 at
# 65536 tokens, D=1152, F=4608, 0.96 for 1.05 ms forward, 0.95 for 1.12 and 0.93 for 1.17 backward, for 0.02 ms.
_TRANSPOSE_FROM = 4096

# The parameters, in this order: Wqkv, bqkv, Wproj, bproj, W1, b1, W2, b2. Weights [out, in]; biases may be absent. qkv
# may be three weights and three biases, one each for q, k and v.
Parameters = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]


def cast_weights(
    qkv_w: Sequence[Tensor], qkv_b: Sequence[Tensor], others: Sequence[Tensor | None], dtype: torch.dtype, tokens: int
) -> list[Tensor | None]:
    """[Wqkv, bqkv, Wproj, bproj, W1, b1, W2ᵀ, b2] in `dtype`, W2ᵀ [F, D] being a view or a copy, whichever pays."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype)

    def joined(parts: Sequence[Tensor]) -> Tensor | None:
        if len(parts) < 2:
            return cast(parts[0]) if parts else None
        out = parts[0].new_empty((sum(len(p) for p in parts), *parts[0].shape[1:]), dtype=dtype)
        at = 0
        for part in parts:
            out[at : at + len(part)].copy_(part.detach())
            at += len(part)
        return out

    wproj, bproj, w1, b1, w2, b2 = others
    assert w2 is not None
    w2t = w2.detach().t()
    if w2.is_cuda and tokens >= _TRANSPOSE_FROM:
        w2t = torch.empty(w2t.shape, dtype=dtype, device=w2.device).copy_(w2t)
    else:
        w2t = w2t.to(dtype)
    return [joined(qkv_w), joined(qkv_b), cast(wproj), cast(bproj), cast(w1), cast(b1), w2t, cast(b2)]


def _linear(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, in] · weight_t [in, out] + bias."""
    return torch.mm(x, weight_t) if bias is None else torch.addmm(bias, x, weight_t)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`, accumulated in fp32 and rounded once."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class _Forward:
    """The forward's intermediate results, by name."""

    def __init__(
        self,
        x: Tensor,
        modulation: Tensor,
        weights: Sequence[Tensor | None],
        heads: int,
        eps: Sequence[float],
        tanh: bool,
        attention: str,
    ) -> None:
        wqkv, bqkv, wproj, bproj, w1, b1, w2t, b2 = weights
        assert wqkv is not None
        assert wproj is not None
        assert w1 is not None
        assert w2t is not None
        B, L, D = x.shape
        M, dtype = B * L, wqkv.dtype
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        h_a, self.mean_a, self.rstd_a = norm.launch_forward(x, shift_a, scale_a, None, None, eps[0], dtype)
        self.qkv = _linear(h_a.view(M, D), wqkv.t(), bqkv).view(B, L, 3, heads, -1)
        q, k, v = self.qkv.unbind(2)
        o, self.attention = two_pass.forward(q, k, v, attention)
        self.o = o.reshape(B, L, -1)
        self.y_a = _linear(self.o.view(M, -1), wproj.t(), bproj).view(B, L, D)
        self.r, h_m, self.mean_m, self.rstd_m = fused.launch_forward(
            x, self.y_a, gate_a, shift_m, scale_m, None, None, eps[1], dtype
        )
        self.p = _linear(h_m.view(M, D), w1.t(), b1)
        g = activation.launch_forward(self.p, tanh)
        self.y_m = _linear(g, w2t, b2).view(B, L, D)
        self.out = gating.launch_forward(self.r, self.y_m, gate_m)
        self.h_a, self.h_m, self.g = h_a, h_m, g

    ALWAYS = ("mean_a", "rstd_a", "qkv", "o", "y_a", "r", "mean_m", "rstd_m", "p", "y_m")
    CHEAP = ("h_a", "h_m", "g")

    def saved(self, keep: str) -> list[Tensor]:
        if keep == "full":
            return []
        names = self.ALWAYS + (self.CHEAP if keep == "all" else ())
        return [getattr(self, name) for name in names] + self.attention


def forward(
    x: Tensor,
    modulation: Tensor,
    weights: Sequence[Tensor | None],
    heads: int,
    eps: Sequence[float],
    tanh: bool,
    attention: str,
    keep: str,
) -> tuple[Tensor, list[Tensor]]:
    """(out, what the backward needs besides the inputs). `weights` as `cast_weights` gives them."""
    done = _Forward(x, modulation, weights, heads, eps, tanh, attention)
    return done.out, done.saved(keep)


def backward(
    dout: Tensor,
    x: Tensor,
    modulation: Tensor,
    weights: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    heads: int,
    eps: Sequence[float],
    tanh: bool,
    attention: str,
    keep: str,
    wants: Sequence[bool],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor | None]:
    """[dx, dmodulation, dWqkv, dbqkv, dWproj, dbproj, dW1, db1, dW2, db2], None where not wanted.

    wants: for each of these; dtypes: of the last eight, whatever the weights were cast to.
    """
    if keep == "full":
        done = _Forward(x, modulation, weights, heads, eps, tanh, attention)
        saved, keep = done.saved("all"), "all"
    names = _Forward.ALWAYS + (_Forward.CHEAP if keep == "all" else ())
    s = dict(zip(names, saved, strict=False))
    wqkv, _, wproj, _, w1, _, w2t, _ = weights
    assert wqkv is not None
    assert wproj is not None
    assert w1 is not None
    assert w2t is not None
    B, L, D = x.shape
    M = B * L
    _, want_mod, want_wqkv, want_bqkv, want_wproj, want_bproj, want_w1, want_b1, want_w2, want_b2 = wants
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    grads: list[Tensor | None] = [None] * 10

    def weight_gradient(index: int, dy: Tensor, inputs: Tensor) -> None:
        grads[index] = _product(dy.t(), inputs, dtypes[index - 2])

    # out = r + gate_m·y_m
    dout = dout.contiguous()
    dy_m = x.new_empty((B, L, D), dtype=s["y_m"].dtype)
    sums_m = x.new_empty((B, int(want_mod) + int(want_b2), D), dtype=torch.float32)
    gating.launch_backward_sums(dout, s["y_m"], gate_m, dy_m, sums_m, want_mod)
    if want_b2:
        grads[9] = (gate_m.float() * sums_m[:, -1]).sum(0).to(dtypes[7])
    # y_m = GELU(p)·W2ᵀ + b2
    dg = torch.mm(dy_m.view(M, D), w2t.t())
    g = s["g"] if keep == "all" else torch.empty_like(dg)
    dp = torch.empty_like(dg)
    total = dg.new_empty(dg.shape[1], dtype=torch.float32) if want_b1 else None
    activation.launch_backward_into(dg, s["p"], tanh, dp, None if keep == "all" else g, total)
    del dg
    if total is not None:
        grads[7] = total.to(dtypes[5])
    if want_w2:
        # As gᵀ·dy, transposed: 0.93 for 1.17 ms at 65536 tokens. A gradient has its parameter's layout.
        grads[8] = _product(g.t(), dy_m.view(M, D), dtypes[6]).t().contiguous()
    del g, dy_m
    # p = h_m·W1ᵀ + b1, h_m = LN(r)·(1 + scale_m) + shift_m, r = x + gate_a·y_a
    dh_m = torch.mm(dp, w1).view(B, L, D)
    h_m = s["h_m"] if keep == "all" else torch.empty_like(dh_m)
    dr, dy_a, sums_a = fused.launch_backward(
        dout,
        dh_m,
        s["r"],
        s["y_a"],
        gate_a,
        scale_m,
        None,
        s["mean_m"],
        s["rstd_m"],
        x.dtype,
        torch.float32,
        [True, True, want_mod, want_mod],
        want_sum=want_bproj,
        shift=shift_m,
        modulated=None if keep == "all" else h_m,
    )
    if want_bproj:
        grads[5] = (gate_a.float() * sums_a[:, -1]).sum(0).to(dtypes[3])
    if want_w1:
        weight_gradient(6, dp, h_m.view(M, D))
    del dp, h_m, dh_m
    # y_a = o·Wprojᵀ + bproj, o = attention(qkv)
    do = torch.mm(dy_a.view(M, D), wproj)
    if want_wproj:
        weight_gradient(4, dy_a.view(M, D), s["o"].view(M, -1))
    del dy_a
    per_head = (B, L, heads, -1)
    q, k, v = s["qkv"].unbind(2)
    dq, dk, dv = two_pass.backward(do.view(per_head), q, k, v, s["o"].view(per_head), saved[len(names) :], attention)
    dqkv, sums_qkv = packing.pack_qkv(dq.reshape(M, -1), dk.reshape(M, -1), dv.reshape(M, -1), want_bqkv)
    del do, dq, dk, dv
    dqkv = dqkv.view(M, -1)
    if want_bqkv:
        grads[3] = sums_qkv.to(dtypes[1])
    # qkv = h_a·Wqkvᵀ + bqkv, h_a = LN(x)·(1 + scale_a) + shift_a
    dh_a = torch.mm(dqkv, wqkv).view(B, L, D)
    h_a = s["h_a"] if keep == "all" else torch.empty_like(dh_a)
    grads[0], sums_x = norm.launch_backward(
        dh_a,
        x,
        scale_a,
        None,
        s["mean_a"],
        s["rstd_a"],
        torch.float32,
        True,
        want_mod,
        dr=dr,
        shift=shift_a,
        out=None if keep == "all" else h_a,
    )
    if want_wqkv:
        weight_gradient(2, dqkv, h_a.view(M, D))
    if want_mod:
        # (dshift_a, dscale_a, dgate_a, dshift_m, dscale_m, dgate_m)
        parts = (sums_x, sums_a[:, :1], sums_a[:, 1:3], sums_m[:, :1])
        grads[1] = torch.cat(parts, dim=1).view(B, -1).to(modulation.dtype)
    return grads


class _Block(torch.autograd.Function):
    """The eager path: x, modulation, (heads, eps, tanh, attention, keep, dtype, parts of qkv), then the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, modulation: Tensor, static: tuple[Any, ...], *parameters: Tensor | None) -> Tensor:
        heads, eps, tanh, attention, keep, dtype, parts = static
        qkv_w, qkv_b, others = split_parameters(parameters, parts)
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
            weights = cast_weights(qkv_w, qkv_b, others, dtype, x.shape[0] * x.shape[1])
            out, saved = forward(x, modulation, weights, heads, eps, tanh, attention, keep)
        ctx.static = static
        ctx.about = [None if p is None else (p.dtype, p.shape) for p in parameters]
        ctx.save_for_backward(x, modulation, *weights, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, modulation, *rest = ctx.saved_tensors
        heads, eps, tanh, attention, keep, _, parts = ctx.static
        wants, dtypes = wanted(ctx.needs_input_grad, ctx.about, parts)
        with torch.autocast(x.device.type, enabled=False):
            grads = backward(dout, x, modulation, rest[:8], rest[8:], heads, eps, tanh, attention, keep, wants, dtypes)
        return (grads[0], grads[1], None, *parameter_gradients(grads[2:], ctx.about, parts))


def split_parameters(parameters: Sequence[Any], parts: tuple[int, int]) -> tuple[Any, Any, Any]:
    """(weights of qkv, biases of qkv, the others)."""
    weights, biases = parts
    return parameters[:weights], parameters[weights : weights + biases], parameters[weights + biases :]


def wanted(needs: Sequence[bool], about: Sequence[Any], parts: tuple[int, int]) -> tuple[list[bool], list[Any]]:
    """What `backward` is to compute, from autograd's needs_input_grad, and the parameters' dtypes."""
    (need_w, need_b, need), (of_w, of_b, of) = (split_parameters(t, parts) for t in (needs[3:], about))
    wants = [True, needs[1], any(need_w), any(need_b), *need]
    dtypes = [entries[0][0] if entries else None for entries in (of_w, of_b)]
    return wants, dtypes + [None if entry is None else entry[0] for entry in of]


def parameter_gradients(grads: Sequence[Tensor | None], about: Sequence[Any], parts: tuple[int, int]) -> list[Any]:
    """`backward`'s gradients of the parameters as they were given: qkv's cut along its parts."""
    weights, biases = parts
    dw, db, *others = grads
    of_w, of_b, _ = split_parameters(about, parts)
    return [
        *((None,) * weights if dw is None else dw.split([shape[0] for _, shape in of_w])),
        *((None,) * biases if db is None else db.split([shape[0] for _, shape in of_b])),
        *others,
    ]


def adaln_block(
    x: Tensor,
    modulation: Tensor,
    parameters: Parameters,
    *,
    heads: int,
    eps: tuple[float, float],
    tanh: bool,
    attention: str,
    keep: str,
    dtype: torch.dtype,
) -> Tensor:
    """The block's output [B, L, D] in x's dtype, or what x and `dtype` promote to; Triton only.

    Args:
        x: [B, L, D]. modulation: [B, 6·D].
        parameters: the weights and biases, in any floating dtype; they are cast to `dtype`, and gradients come back in
            their own.
        heads: H. eps: of the two LayerNorms. tanh: whether GELU is the approximation.
        attention: the name of a backend of `opendit.attention`, not "auto".
        keep: what is saved for the backward, see above.
        dtype: what the matrix products and attention compute in.
    """
    qkv_w, qkv_b, others = parameters
    parts = (len(qkv_w), len(qkv_b))
    static = (heads, eps, tanh, attention, keep, dtype, parts)
    return _Block.apply(x, modulation, static, *qkv_w, *qkv_b, *others)
