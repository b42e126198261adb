"""Rows in 8 bits, each with a scale of its own, out of the passes that make them: what fp8 matrix products take.

    s_i = max_k |x_ik| / 448;   q_ik = x_ik / s_i, rounded to e4m3;   x_ik ≈ s_i · q_ik

    quantize_rows      x [M, K]            → q [M, K], s [M, 1]
    quantize_columns   x [R, C]            → q [C, R], s [C, 1]: the rows of xᵀ, without xᵀ
    gelu_rows          p [M, N]            → q, s of GELU(p)
    gelu_backward_rows dg, p [M, N]        → dp = dg · GELU'(p), its q and s, GELU(p) again, and Σ_M dp

A product of two such operands, both by rows of what is summed over, is Σ_k q_ik·w_jk · s_i · t_j (`scaled_product`). A
row's scale costs a maximum over values that a pass has in registers; one for the whole tensor would cost a pass.
Scales are float32; 448 is the largest e4m3. What is not finite in a row is not finite in its product: nothing is hidden
from who would skip such a step.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
from torch import Tensor

from opendit.kernels._rows import (
    dense_rows,
    direct,
    downcast,
    load_rows,
    split,
    store_quantized,
    store_rows,
    store_sums,
    sum_programs,
    tl,
    triton,
)
from opendit.kernels.backend import INTERPRETING
from opendit.kernels.gelu import _share, _slope

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# Below this, a row's largest value counts as this: its inverse must stay finite.
SMALLEST = 1e-30


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The specification."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number over a tensor would be rounded twice
    return (x.float() * inverse).to(E4M3), largest * (1 / LARGEST)


@triton.jit(do_not_specialize=["M", "walk"])
def _quantize_rows(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    M,
    walk,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * walk
    last = tl.minimum(first + walk, M)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)  # 64-bit, as start is
        live = row < last
        h, t = load_rows(x_ptr, row * x_stride, live, D, HEAD, TAIL)
        store_quantized(q_ptr, scale_ptr, row, live, h, t, D, HEAD, TAIL)


@triton.jit
def _quantize_columns(x_ptr, q_ptr, scale_ptr, R, C, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program takes COLUMNS columns of all rows, twice: for their largest values, then to write them turned."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < C
    largest = tl.full([COLUMNS], 1e-30, tl.float32)
    for start in range(0, R, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * x_stride + column[None, :]
        x = tl.load(x_ptr + at, mask=(row < R)[:, None] & exists[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    tl.store(scale_ptr + column, largest * (1 / 448.0), mask=exists)
    inverse = 448.0 / largest
    for start in range(0, R, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * x_stride + column[None, :]
        x = tl.load(x_ptr + at, mask=(row < R)[:, None] & exists[None, :], other=0.0).to(tl.float32)
        q = downcast(tl.trans(x * inverse[None, :]), q_ptr.dtype.element_ty)
        tl.store(q_ptr + column[:, None] * R + row[None, :], q, mask=exists[:, None] & (row < R)[None, :])


@triton.jit(do_not_specialize=["M", "walk"])
def _gelu_rows(
    p_ptr,
    q_ptr,
    scale_ptr,
    M,
    walk,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TANH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * walk
    last = tl.minimum(first + walk, M)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < last
        h, t = load_rows(p_ptr, row * D, live, D, HEAD, TAIL)
        store_quantized(q_ptr, scale_ptr, row, live, h * _share(h, TANH), t * _share(t, TANH), D, HEAD, TAIL)


@triton.jit(do_not_specialize=["M", "walk"])
def _gelu_backward_rows(
    dg_ptr,
    p_ptr,
    dp_ptr,
    q_ptr,
    scale_ptr,
    g_ptr,
    part_ptr,
    M,
    walk,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TANH: tl.constexpr,
    WANT_SUM: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * walk
    last = tl.minimum(first + walk, M)
    sum_h = tl.zeros([HEAD], tl.float32)
    sum_t = tl.zeros([TAIL], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < last
        p_h, p_t = load_rows(p_ptr, row * D, live, D, HEAD, TAIL)
        dg_h, dg_t = load_rows(dg_ptr, row * D, live, D, HEAD, TAIL)
        s_h, s_t = _share(p_h, TANH), _share(p_t, TANH)
        store_rows(g_ptr, row * D, live, p_h * s_h, p_t * s_t, D, HEAD, TAIL)
        dp_h, dp_t = dg_h * _slope(p_h, s_h, TANH), dg_t * _slope(p_t, s_t, TANH)
        store_rows(dp_ptr, row * D, live, dp_h, dp_t, D, HEAD, TAIL)
        store_quantized(q_ptr, scale_ptr, row, live, dp_h, dp_t, D, HEAD, TAIL)
        if WANT_SUM:
            sum_h += tl.sum(dp_h, 0)
            sum_t += tl.sum(dp_t, 0)
    if WANT_SUM:
        store_sums(part_ptr + tl.program_id(0).to(tl.int64) * D, sum_h, sum_t, D, HEAD, TAIL)


def _warps(width: int) -> int:
    """Warps for a row: up to 18 elements a lane and array, so that two programs fit beside each other at 4608."""
    return min(max(1 << max((width - 1).bit_length() - 10, 0), 1), 8)


def _launch(width: int, rows: int, *, sums: bool) -> tuple[dict[str, int], int]:
    """(a launch's options, rows that a program walks): few and long programs where each leaves sums behind."""
    HEAD, TAIL = split(width)
    most = (2 if INTERPRETING else 1024) if sums else -(-rows // 4)
    options = {"D": width, "HEAD": HEAD, "TAIL": TAIL, "ROWS": 16 if INTERPRETING else 1, "STAGES": 2}
    return {**options, "num_warps": _warps(width)}, max(-(-rows // max(most, 1)), 64 if INTERPRETING else 1)


def _empty(x: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((rows, width), dtype=E4M3), x.new_empty((rows, 1), dtype=torch.float32)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q [M, K] e4m3, s [M, 1] float32) of x [M, K]; Triton only, as all below."""
    x = dense_rows(x)
    M, K = x.shape
    q, scale = _empty(x, M, K)
    if x.numel():
        options, walk = _launch(K, M, sums=False)
        direct(_quantize_rows)[(-(-M // walk),)](x, q, scale, x.stride(0), M, walk, **options)
    return q, scale


def quantize_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows`'s outputs, unwritten."""
    return _empty(x, *x.shape)


def quantize_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q [C, R] e4m3, s [C, 1] float32) of x [R, C]: what `quantize_rows` gives for xᵀ."""
    x = dense_rows(x)
    R, C = x.shape
    q, scale = _empty(x, C, R)
    if x.numel():
        columns = 64 if INTERPRETING else 8  # enough programs for a weight of 1152 columns, still whole sectors
        direct(_quantize_columns)[(-(-C // columns),)](
            x, q, scale, R, C, x.stride(0), ROWS=128, COLUMNS=columns, num_warps=4
        )
    return q, scale


def gelu_rows(p: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """(q [M, N], s [M, 1]) of GELU(p), p [M, N] contiguous."""
    M, N = p.shape
    q, scale = _empty(p, M, N)
    if p.numel():
        options, walk = _launch(N, M, sums=False)
        direct(_gelu_rows)[(-(-M // walk),)](p, q, scale, M, walk, TANH=tanh, **options)
    return q, scale


def gelu_rows_fake(p: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """`gelu_rows`'s outputs, unwritten."""
    return _empty(p, *p.shape)


def gelu_backward_rows(
    dg: Tensor, p: Tensor, tanh: bool, want_sum: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None]:
    """(dp [M, N] in p's dtype, its (q, s), GELU(p) [M, N], Σ_M dp [N] float32 where wanted); inputs contiguous."""
    M, N = p.shape
    dp, g = torch.empty_like(p), torch.empty_like(p)
    q, scale = _empty(p, M, N)
    total = p.new_zeros(N, dtype=torch.float32) if want_sum else None
    if p.numel():
        options, walk = _launch(N, M, sums=True)
        P = -(-M // walk)
        partials = p.new_empty((1, P, 1, N) if want_sum else (0,), dtype=torch.float32)
        direct(_gelu_backward_rows)[(P,)](
            *(dg, p, dp, q, scale, g, partials, M, walk), TANH=tanh, WANT_SUM=want_sum, **options
        )
        if total is not None:
            sum_programs(partials, total.view(1, 1, N), direct)
    return dp, (q, scale), g, total


Quantized = tuple[Tensor, Tensor]


def scaled_product(
    a: Quantized, b: Quantized, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """Σ_k a_ik·b_jk [M, N] in `dtype`, a [M, K] and b [N, K] by rows, + bias [N] in `dtype`.

    torch's own product of scaled rows; the inner sizes are multiples of 16. fast: accumulated with the tensor cores'
    own precision, which on Hopper is below float32's, as is usual for outputs; gradients are accumulated in float32.
    """
    return torch._scaled_mm(
        a[0], b[0].t(), scale_a=a[1], scale_b=b[1].t(), bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def unavailable(device: torch.device, widths: tuple[int, ...] = ()) -> str | None:
    """Why 8-bit products can't be computed there, or None."""
    if any(width % 16 for width in widths):
        return f"widths must be multiples of 16, not {', '.join(str(w) for w in widths if w % 16)}"
    if device.type == "cpu" and INTERPRETING:
        return None
    if device.type != "cuda":
        return f"they run on GPUs of compute capability 9.0 (Hopper) or later, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        return f"scaled rows need compute capability 9.0 (Hopper) or later; this GPU has {major}.{minor}"
    return None


def cast(x: Quantized) -> Tensor:
    """The float32 values that (q, s) stand for; for comparisons."""
    return x[0].float() * x[1]
