"""q and k normalised head by head and rotated by their tokens' positions, both in one pass.

    n = x · rstd           norm="rms":    rstd = 1 / √(mean_K(x²) + eps)
        (x − mean) · rstd  norm="layer":  rstd = 1 / √(mean_K((x − mean)²) + eps)
        x                  norm=None
    y = n · weight + bias
    out = y · cos + turned(y) · sin        where there is a table

Pairs (a, b) of a head's elements turn together: (0, 1), (2, 3), … if interleaved, else (0, K/2), (1, K/2 + 1), ….
turned((a, b)) = (−b, a). Nothing is asked of the table: a and b may have values of their own.

q, k [B, L, H, K]; weight, bias [K], one of each for q and for k; cos, sin [L, K]. B batch, L tokens, H heads, K head
dim. The statistics of a row are short sums, so the backward takes them anew instead of reading them. With d = d(out):

    g_a = d_a · cos_a + d_b · sin_b;  g_b = d_b · cos_b − d_a · sin_a;  u = g · weight
    dx = rstd · (u − n · mean_K(u · n))                 "layer": less rstd · mean_K(u)
    dweight = Σ g · n;  dbias = Σ g                     over B, L and H
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels._checks import check_eps, check_out_dtype, check_vectors, compute_dtype, has_double
from opendit.kernels._rows import (
    Tile,
    dense,
    dense_rows,
    direct,
    downcast,
    given,
    programs,
    register,
    sum_programs,
    tl,
    triton,
)
from opendit.kernels.backend import INTERPRETING, resolve
from opendit.kernels.rmsnorm_modulate import root_mean_square_norm
from opendit.kernels.spec import KernelSpec

NORMS = (None, "rms", "layer")
"""Their numbers here are what the kernels are told."""


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """(−b, a) for each pair (a, b) of the last dimension."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-b, a), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: tuple[Tensor, Tensor] | None,
    norm: str | None,
    eps: float,
    interleaved: bool,
) -> Tensor:
    if norm == "rms":
        x = root_mean_square_norm(x, weight, eps)
        x = x if bias is None else x + bias
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if table is None:
        return x
    cos, sin = (t.unsqueeze(1) for t in table)
    return x * cos + turned(x, interleaved) * sin


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    interleaved: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 if any input is), one downcast at the end."""
    vectors = (q_weight, q_bias, k_weight, k_bias, cos, sin)
    dtype = compute_dtype(q, k, *vectors)
    qw, qb, kw, kb, c, s = (None if v is None else v.to(dtype) for v in vectors)
    table = None if c is None or s is None else (c, s)
    return (
        _reference(q.to(dtype), qw, qb, table, norm, eps, interleaved).to(out_dtype or q.dtype),
        _reference(k.to(dtype), kw, kb, table, norm, eps, interleaved).to(out_dtype or k.dtype),
    )


@triton.jit
def _load_pairs(ptr, at, live, K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b) [ROWS, HALF] float32 of the rows at ``at`` [ROWS]; 0 where masked."""
    if INTERLEAVED:  # read as rows lie in memory, then told apart in registers
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(ptr + at[:, None] + column, mask=live[:, None] & (column < K), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    else:
        column = tl.arange(0, HALF)[None, :]
        here = live[:, None] & (column < K // 2)
        a = tl.load(ptr + at[:, None] + column, mask=here, other=0.0).to(tl.float32)
        b = tl.load(ptr + at[:, None] + K // 2 + column, mask=here, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(ptr, at, live, a, b, K: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = downcast(tl.interleave(a, b), dtype)
        tl.store(ptr + at[:, None] + column, x, mask=live[:, None] & (column < K))
    else:
        column = tl.arange(0, HALF)[None, :]
        here = live[:, None] & (column < K // 2)
        tl.store(ptr + at[:, None] + column, downcast(a, dtype), mask=here)
        tl.store(ptr + at[:, None] + K // 2 + column, downcast(b, dtype), mask=here)


@triton.jit
def _vector(ptr, K: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b) [1, HALF] of one [K]."""
    zero = tl.arange(0, 1)
    return _load_pairs(ptr, zero, zero == 0, K, 1, HALF, INTERLEAVED)


@triton.jit
def _normalized(a, b, EPS: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr):
    """(rstd [ROWS, 1], n's a, n's b)."""
    if NORM == 2:
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / K)[:, None]
        there = (tl.arange(0, HALF) < K // 2)[None, :]
        a = tl.where(there, a - mean, 0.0)
        b = tl.where(there, b - mean, 0.0)
    rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / K + EPS)[:, None]
    return rstd, a * rstd, b * rstd


@triton.jit
def _forward_of_one(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_at, out_at, live, cos_a, cos_b, sin_a, sin_b,
    K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    a, b = _load_pairs(x_ptr, x_at, live, K, ROWS, HALF, INTERLEAVED)
    if NORM > 0:
        _, a, b = _normalized(a, b, EPS, NORM, K, HALF)
    if HAS_WEIGHT:
        weight_a, weight_b = _vector(weight_ptr, K, HALF, INTERLEAVED)
        a, b = a * weight_a, b * weight_b
    if HAS_BIAS:
        bias_a, bias_b = _vector(bias_ptr, K, HALF, INTERLEAVED)
        a, b = a + bias_a, b + bias_b
    if ROTATE:
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store_pairs(out_ptr, out_at, live, a, b, K, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["L", "P", "walk"])
def _qk_norm_rope_fwd(
    q_ptr, k_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, L, P, walk,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    INTERLEAVED: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr,
    K_WEIGHT: tl.constexpr, K_BIAS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """A program walks rows of one sample; row r is head r % H of token r // H, and q's and k's share its table."""
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)  # the sample, not the program
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L * H)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < last
        token = (row // H).to(tl.int64)  # offsets pass 2**31 elements
        head = row % H
        out_at = (b * L * H + row) * K
        cos_a, cos_b, sin_a, sin_b = 1.0, 1.0, 0.0, 0.0
        if ROTATE:
            cos_a, cos_b = _load_pairs(cos_ptr, token * K, live, K, ROWS, HALF, INTERLEAVED)
            sin_a, sin_b = _load_pairs(sin_ptr, token * K, live, K, ROWS, HALF, INTERLEAVED)
        q_at = b * q_stride_b + token * q_stride_l + head * q_stride_h
        _forward_of_one(
            q_ptr, q_weight_ptr, q_bias_ptr, q_out_ptr, q_at, out_at, live, cos_a, cos_b, sin_a, sin_b,
            K, ROWS, HALF, INTERLEAVED, EPS, NORM, Q_WEIGHT, Q_BIAS, ROTATE,
        )  # fmt: skip
        k_at = b * k_stride_b + token * k_stride_l + head * k_stride_h
        _forward_of_one(
            k_ptr, k_weight_ptr, k_bias_ptr, k_out_ptr, k_at, out_at, live, cos_a, cos_b, sin_a, sin_b,
            K, ROWS, HALF, INTERLEAVED, EPS, NORM, K_WEIGHT, K_BIAS, ROTATE,
        )  # fmt: skip


@triton.jit
def _backward_of_one(
    d_ptr, x_ptr, weight_ptr, dx_ptr, d_at, x_at, out_at, live, cos_a, cos_b, sin_a, sin_b,
    K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Writes dx; (g·n, g) of the rows, each as (a, b) [ROWS, HALF]."""
    g_a, g_b = _load_pairs(d_ptr, d_at, live, K, ROWS, HALF, INTERLEAVED)
    if ROTATE:
        g_a, g_b = g_a * cos_a + g_b * sin_b, g_b * cos_b - g_a * sin_a
    n_a, n_b = g_a, g_b
    u_a, u_b = g_a, g_b
    if NORM > 0:
        x_a, x_b = _load_pairs(x_ptr, x_at, live, K, ROWS, HALF, INTERLEAVED)
        rstd, n_a, n_b = _normalized(x_a, x_b, EPS, NORM, K, HALF)
        if HAS_WEIGHT:
            weight_a, weight_b = _vector(weight_ptr, K, HALF, INTERLEAVED)
            u_a, u_b = g_a * weight_a, g_b * weight_b
        un = ((tl.sum(u_a * n_a, 1) + tl.sum(u_b * n_b, 1)) / K)[:, None]
        u = ((tl.sum(u_a, 1) + tl.sum(u_b, 1)) / K)[:, None] if NORM == 2 else 0.0
        u_a, u_b = rstd * (u_a - u - n_a * un), rstd * (u_b - u - n_b * un)
    _store_pairs(dx_ptr, out_at, live, u_a, u_b, K, HALF, INTERLEAVED)
    return g_a * n_a, g_b * n_b, g_a, g_b


@triton.jit
def _store_sums(ptr, a, b, K: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Write the sum over rows, one float32 [K], of what is given as (a, b) [ROWS, HALF]."""
    a, b = tl.sum(a, 0), tl.sum(b, 0)
    column = tl.arange(0, HALF)
    here = column < K // 2
    at = 2 * column if INTERLEAVED else column
    tl.store(ptr + at, a, mask=here)
    tl.store(ptr + at + (1 if INTERLEAVED else K // 2), b, mask=here)


@triton.jit(do_not_specialize=["L", "P", "walk"])
def _qk_norm_rope_bwd(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, part_ptr,
    dq_stride_b, dq_stride_l, dq_stride_h, dk_stride_b, dk_stride_l, dk_stride_h,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, L, P, walk,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    INTERLEAVED: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr, WANT_SUMS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L * H)
    # Summed over rows once, behind the loop: a sum among warps costs more than a turn's arithmetic.
    q1_a = tl.zeros([ROWS, HALF], tl.float32)
    q1_b = tl.zeros([ROWS, HALF], tl.float32)
    q0_a = tl.zeros([ROWS, HALF], tl.float32)
    q0_b = tl.zeros([ROWS, HALF], tl.float32)
    k1_a = tl.zeros([ROWS, HALF], tl.float32)
    k1_b = tl.zeros([ROWS, HALF], tl.float32)
    k0_a = tl.zeros([ROWS, HALF], tl.float32)
    k0_b = tl.zeros([ROWS, HALF], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < last
        token = (row // H).to(tl.int64)  # offsets pass 2**31 elements
        head = row % H
        out_at = (b * L * H + row) * K
        cos_a, cos_b, sin_a, sin_b = 1.0, 1.0, 0.0, 0.0
        if ROTATE:
            cos_a, cos_b = _load_pairs(cos_ptr, token * K, live, K, ROWS, HALF, INTERLEAVED)
            sin_a, sin_b = _load_pairs(sin_ptr, token * K, live, K, ROWS, HALF, INTERLEAVED)
        d_at = b * dq_stride_b + token * dq_stride_l + head * dq_stride_h
        x_at = b * q_stride_b + token * q_stride_l + head * q_stride_h
        s1_a, s1_b, s0_a, s0_b = _backward_of_one(
            dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, d_at, x_at, out_at, live, cos_a, cos_b, sin_a, sin_b,
            K, ROWS, HALF, INTERLEAVED, EPS, NORM, Q_WEIGHT, ROTATE,
        )  # fmt: skip
        if WANT_SUMS:
            q1_a += s1_a
            q1_b += s1_b
            q0_a += s0_a
            q0_b += s0_b
        d_at = b * dk_stride_b + token * dk_stride_l + head * dk_stride_h
        x_at = b * k_stride_b + token * k_stride_l + head * k_stride_h
        s1_a, s1_b, s0_a, s0_b = _backward_of_one(
            dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, d_at, x_at, out_at, live, cos_a, cos_b, sin_a, sin_b,
            K, ROWS, HALF, INTERLEAVED, EPS, NORM, K_WEIGHT, ROTATE,
        )  # fmt: skip
        if WANT_SUMS:
            k1_a += s1_a
            k1_b += s1_b
            k0_a += s0_a
            k0_b += s0_b
    if WANT_SUMS:
        part = part_ptr + pid.to(tl.int64) * 4 * K
        _store_sums(part, q1_a, q1_b, K, HALF, INTERLEAVED)
        _store_sums(part + K, q0_a, q0_b, K, HALF, INTERLEAVED)
        _store_sums(part + 2 * K, k1_a, k1_b, K, HALF, INTERLEAVED)
        _store_sums(part + 3 * K, k0_a, k0_b, K, HALF, INTERLEAVED)


def _half(head_dim: int) -> int:
    """The power of two that holds one element of each pair."""
    return 1 << max(head_dim // 2 - 1, 0).bit_length()


def forward_tile(head_dim: int) -> Tile:
    """About 16 elements of q, then of k, for each lane. Nothing is kept between rows, so programs are short."""
    if INTERPRETING:  # its time goes into programs and loop turns, not into elements
        rows = max(1 << 13 >> _half(head_dim).bit_length(), 1)
        return Tile(rows=rows, walk=4 * rows, most=1 << 20, warps=4, stages=1)
    rows = max(1024 // _half(head_dim), 1)
    return Tile(rows=rows, walk=rows, most=1 << 20, warps=4, stages=1)


def backward_tile(head_dim: int) -> Tile:
    """Every program leaves partial sums behind, so programs are few and long, as in ``_rows.backward_tile``."""
    if INTERPRETING:
        return forward_tile(head_dim)
    rows = max(512 // _half(head_dim), 1)
    return Tile(rows=rows, walk=4 * rows, most=1024, warps=4, stages=2)


def forward_fake(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: int,
    eps: float,
    interleaved: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The forward's outputs, unwritten: q and k [B, L, H, K]. norm: its number in NORMS."""
    return q.new_empty(q.shape, dtype=q_dtype), k.new_empty(k.shape, dtype=k_dtype)


def launch_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: int,
    eps: float,
    interleaved: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    wrap: Any = direct,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """``forward_fake``'s outputs, written."""
    outputs = q.new_empty(q.shape, dtype=q_dtype), k.new_empty(k.shape, dtype=k_dtype)
    if q.numel() == 0:
        return outputs
    q, k = dense_rows(q), dense_rows(k)
    vectors = [dense(v) for v in (q_weight, q_bias, k_weight, k_bias)]
    B, L, H, K = q.shape
    tile = tile or forward_tile(K)
    P, walk = programs(B, L * H, tile)
    wrap(_qk_norm_rope_fwd)[(B * P,)](
        *(q, k, *(given(v, q) for v in vectors), *_table(cos, sin, q), *outputs),
        *(*q.stride()[:3], *k.stride()[:3], L, P, walk),
        H=H,
        K=K,
        HALF=_half(K),
        ROWS=tile.rows,
        STAGES=tile.stages,
        INTERLEAVED=interleaved,
        EPS=eps,
        NORM=norm,
        Q_WEIGHT=q_weight is not None,
        Q_BIAS=q_bias is not None,
        K_WEIGHT=k_weight is not None,
        K_BIAS=k_bias is not None,
        ROTATE=cos is not None,
        num_warps=tile.warps,
    )
    return outputs


def _table(cos: Tensor | None, sin: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows one after the other, or pointers that are never read."""
    return (other, other) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())


def backward_fake(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: int,
    eps: float,
    interleaved: bool,
    want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward's outputs, unwritten: dq, dk [B, L, H, K]; sums [4, K] float32: dweight, dbias of q, then of k."""
    sums = q.new_empty((4 if want_sums else 0, q.shape[-1]), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), sums


def launch_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: int,
    eps: float,
    interleaved: bool,
    want_sums: bool,
    wrap: Any = direct,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward_fake``'s outputs, written."""
    outputs = dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, norm, eps, interleaved, want_sums
    dq, dk, sums = backward_fake(*outputs)
    if q.numel() == 0:
        return dq, dk, sums.zero_()
    dq_out, dk_out, q, k = map(dense_rows, (dq_out, dk_out, q, k))
    weights = [dense(v) for v in (q_weight, k_weight)]
    B, L, H, K = q.shape
    tile = tile or (backward_tile(K) if want_sums else forward_tile(K))  # without sums nothing is kept between rows
    P, walk = programs(B, L * H, tile)
    partials = q.new_empty((1, B * P, 4, K) if want_sums else (0,), dtype=torch.float32)
    wrap(_qk_norm_rope_bwd)[(B * P,)](
        *(dq_out, dk_out, q, k, *(given(v, q) for v in weights), *_table(cos, sin, q), dq, dk, partials),
        *(*dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], L, P, walk),
        H=H,
        K=K,
        HALF=_half(K),
        ROWS=tile.rows,
        STAGES=tile.stages,
        INTERLEAVED=interleaved,
        EPS=eps,
        NORM=norm,
        Q_WEIGHT=q_weight is not None,
        K_WEIGHT=k_weight is not None,
        ROTATE=cos is not None,
        WANT_SUMS=want_sums,
        num_warps=tile.warps,
    )
    if want_sums:
        sum_programs(partials, sums.unsqueeze(0), wrap)
    return dq, dk, sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:11]


def _gradients(ctx: Any, dq_out: Tensor, dk_out: Tensor, launch: Any) -> tuple[Tensor | None, ...]:
    q, k, q_weight, q_bias, k_weight, k_bias, cos, sin = ctx.saved_tensors
    vectors = (q_weight, q_bias, k_weight, k_bias)
    needs = ctx.needs_input_grad
    dq, dk, sums = launch(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, *ctx.options, any(needs[2:6]))
    small = [sums[i].to(v.dtype) if need else None for i, (v, need) in enumerate(zip(vectors, needs[2:6], strict=True))]
    return (dq if needs[0] else None, dk if needs[1] else None, *small, *(None,) * 7)


class _QKNormRope(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _save(ctx, inputs, (inputs[0], inputs[1]))
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device; autograd sets it itself
            return launch_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dq_out, dk_out, launch_backward)


forward_op = register("qk_norm_rope_forward", launch_forward, forward_fake)
backward_op = register("qk_norm_rope_backward", launch_backward, backward_fake)
if forward_op is not None:
    forward_op.register_autograd(lambda ctx, dq, dk: _gradients(ctx, dq, dk, backward_op), setup_context=_save)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    interleaved: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k, each head normalised and turned by its token's angles.

    Args:
        q, k: [B, L, H, K], any floating dtypes, K even. Outer strides may be anything, so they may be parts of one
            packed projection; a last stride other than 1 costs a copy, of an incoming gradient too.
        q_weight, q_bias, k_weight, k_bias: [K], the norms' own, as far as they have them.
        cos, sin: [L, K], a row for each token, together or not at all. They are constants: no gradient.
        norm: "rms", "layer" or None.
        eps: added to the mean of the squares (to the variance).
        interleaved: whether pairs are neighbours, (0, 1), (2, 3), …, or lie half a head apart, (0, K/2), ….
        out_dtype: both results' dtype; by default each keeps its own.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``. What torch.compile traces for
            gradients of q or k is left to it by "auto".

    Returns:
        q and k [B, L, H, K], contiguous. Arithmetic is float32 (float64 for float64 inputs, which only the reference
        takes), with one rounding at the end. Gradients have their input's dtype and shape and are bit-identical when
        repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "qk_norm_rope"
    _check_heads(name, "q", q)
    _check_heads(name, "k", k, q)
    _, L, _, K = q.shape
    check_vectors(
        name, q, (K,), "[K], the head dim", q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias
    )
    check_vectors(name, q, (L, K), "[L, K], one row per token", cos=cos, sin=sin)
    vectors = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    if norm not in NORMS:
        raise ValueError(f"{name}: norm is {norm!r}; allowed are {', '.join(map(repr, NORMS))}")
    unused = [label for label, vector in vectors.items() if norm is None and vector is not None]
    if unused:
        raise ValueError(f"{name}: {unused[0]} is given with norm=None, which has no weights; leave it out")
    if (cos is None) != (sin is None):
        raise ValueError(f"{name}: {'cos' if sin is None else 'sin'} is given alone; pass cos and sin, or neither")
    for label, table in (("cos", cos), ("sin", sin)):
        if table is not None and table.requires_grad:
            raise ValueError(f"{name}: {label} requires a gradient, and tables get none; pass {label}.detach()")
    check_eps(name, eps)
    check_out_dtype(name, out_dtype)
    chosen = resolve(backend, name, q.device, K, has_double(q, k, *vectors.values(), cos, sin))
    compiling = torch.compiler.is_compiling()
    # Timed on an H200, the kernels are 1.9 times as fast as Inductor's forward and 0.3 times as fast as its backward,
    # before that was written anew; eager PyTorch takes 4 to 19 times as long as they did.
    left_to_compiler = (
        backend == "auto" and compiling and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    )
    if chosen == "reference" or left_to_compiler:
        return qk_norm_rope_reference(
            q, k, **vectors, cos=cos, sin=sin, norm=norm, eps=eps, interleaved=interleaved, out_dtype=out_dtype
        )
    dtypes = (out_dtype or q.dtype, out_dtype or k.dtype)
    inputs = (q, k, *vectors.values(), cos, sin, NORMS.index(norm), eps, interleaved, *dtypes)
    if compiling:
        q, k = forward_op(*inputs)
        return q, k
    return _QKNormRope.apply(*inputs)


def _check_heads(name: str, label: str, x: Any, like: Tensor | None = None) -> None:
    """Require a floating [B, L, H, K] with an even K, and ``like``'s shape and device when given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {label} is a {type(x).__name__}; pass a floating-point tensor [B, L, H, K]")
    if not x.is_floating_point():
        raise TypeError(f"{name}: {label} has dtype {x.dtype}; convert it to a floating-point dtype")
    if x.ndim != 4 or x.shape[3] == 0 or x.shape[3] % 2:
        raise ValueError(f"{name}: {label} has shape {tuple(x.shape)}; it must be [B, L, H, K] with K even")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name}: {label} has shape {tuple(x.shape)}; it must be {tuple(like.shape)}, the shape of q")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: {label} is on {x.device} and q on {like.device}; move it there")


def _upstream(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """As models of Llama's descent write it: the norm in float32, rounded before its weight."""

    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if norm == "rms":
            n = root_mean_square_norm(x.float(), None, eps).type_as(x)
            n = n if weight is None else n * weight
            y = n if bias is None else n + bias
        else:
            y = x if norm is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        if cos is not None and sin is not None:
            y = y * cos.unsqueeze(1) + turned(y, interleaved) * sin.unsqueeze(1)
        return y.to(x.dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


SPEC = KernelSpec(
    name="qk_norm_rope",
    fn=qk_norm_rope,
    reference=qk_norm_rope_reference,
    upstream=_upstream,
    inputs={
        "q": "BLHK",
        "k": "BLHK",
        "q_weight": "K?",
        "q_bias": "K?",
        "k_weight": "K?",
        "k_bias": "K?",
        "cos": "LK?",
        "sin": "LK?",
    },
    outputs=("q_out", "k_out"),
    backward_moves=("d_q_out", "d_k_out", "q", "k", "d_q", "d_k"),
    usual=("q_weight", "k_weight", "cos", "sin"),
    constants=("cos", "sin"),
)
