"""dqkv = [dq | dk | dv], row by row, and S = Σ_M dqkv, in one pass: what a packed projection's backward needs.

dq, dk, dv [M, N] → dqkv [M, 3, N], S [3·N] in float32; M = B·L rows, N = H·K. S is the projection's bias gradient,
summed over the values as they were given. Attention backwards return three tensors, the packed projection wants one.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
from torch import Tensor

from opendit.kernels._rows import direct, sum_programs, tl, triton
from opendit.kernels.backend import INTERPRETING

# Rows and columns held at once, row programs in all.
ROWS, COLUMNS, PROGRAMS = (64, 512, 4) if INTERPRETING else (4, 512, 128)


def pack_qkv_reference(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """The specification."""
    packed = torch.stack([dq, dk, dv], dim=1)
    return packed, packed.sum(0, dtype=torch.float64 if dq.dtype == torch.float64 else torch.float32).flatten()


@triton.jit(do_not_specialize=["M", "walk"])
def _pack_qkv(
    dq_ptr, dk_ptr, dv_ptr, dqkv_ptr, part_ptr, q_stride, k_stride, v_stride, M, walk, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WANT_SUM: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(2)
    if which == 0:
        source, stride = dq_ptr, q_stride
    elif which == 1:
        source, stride = dk_ptr, k_stride
    else:
        source, stride = dv_ptr, v_stride
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * walk
    last = tl.minimum(first + walk, M)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < last)[:, None] & (column < N)[None, :]
        value = tl.load(source + row[:, None] * stride + column[None, :], mask=live, other=0.0)
        tl.store(dqkv_ptr + (row[:, None] * 3 + which) * N + column[None, :], value, mask=live)
        if WANT_SUM:
            total += tl.sum(value.to(tl.float32), 0)
    if WANT_SUM:
        at = (tl.program_id(1).to(tl.int64) * 3 + which) * N + column
        tl.store(part_ptr + at, total, mask=column < N)


def pack_qkv(dq: Tensor, dk: Tensor, dv: Tensor, want_sum: bool = True) -> tuple[Tensor, Tensor]:
    """(dqkv [M, 3, N] in the inputs' dtype, S [3·N] float32; empty where not wanted), from dense rows; Triton only."""
    M, N = dq.shape
    dqkv = dq.new_empty((M, 3, N))
    total = dq.new_empty((3 * N if want_sum else 0,), dtype=torch.float32)
    if M == 0:
        return dqkv, total.zero_()
    walk = -(-M // PROGRAMS)
    P = -(-M // walk)
    partials = dq.new_empty((1, P, 3, N) if want_sum else (0,), dtype=torch.float32)
    direct(_pack_qkv)[(-(-N // COLUMNS), P, 3)](
        *(dq, dk, dv, dqkv, partials, dq.stride(0), dk.stride(0), dv.stride(0), M, walk),
        N=N,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        WANT_SUM=want_sum,
        num_warps=4,
    )
    if want_sum:
        sum_programs(partials, total.view(1, 3, N), direct)
    return dqkv, total
