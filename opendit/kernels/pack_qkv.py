"""dqkv = [dq | dk | dv], row by row, and S = Σ_M dqkv, in one pass: what a packed projection's backward needs.

dq, dk, dv [M, N] → dqkv [M, 3, N], S [3·N] in float32; M = B·L rows, N = H·K. S is the projection's bias gradient,
summed over the values as they were given. Attention backwards return three tensors, the packed projection wants one.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
from torch import Tensor

from opendit.kernels._rows import (
    backward_tile,
    dense_rows,
    direct,
    load_rows,
    programs,
    split,
    store_rows,
    store_sums,
    sum_programs,
    tl,
    triton,
)


def pack_qkv_reference(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """The specification."""
    packed = torch.stack([dq, dk, dv], dim=1)
    return packed, packed.sum(0, dtype=torch.float64 if dq.dtype == torch.float64 else torch.float32).flatten()


@triton.jit(do_not_specialize=["M", "walk"])
def _pack_qkv(
    q_ptr,
    k_ptr,
    v_ptr,
    dqkv_ptr,
    part_ptr,
    q_stride,
    k_stride,
    v_stride,
    M,
    walk,
    N: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WANT_SUM: tl.constexpr,
):
    pid = tl.program_id(0)
    first = pid * walk
    last = tl.minimum(first + walk, M)
    q0 = tl.zeros([HEAD], tl.float32)
    q1 = tl.zeros([TAIL], tl.float32)
    k0 = tl.zeros([HEAD], tl.float32)
    k1 = tl.zeros([TAIL], tl.float32)
    v0 = tl.zeros([HEAD], tl.float32)
    v1 = tl.zeros([TAIL], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < last
        row = row.to(tl.int64)  # offsets pass 2**31 elements
        q_h, q_t = load_rows(q_ptr, row * q_stride, live, N, HEAD, TAIL)
        k_h, k_t = load_rows(k_ptr, row * k_stride, live, N, HEAD, TAIL)
        v_h, v_t = load_rows(v_ptr, row * v_stride, live, N, HEAD, TAIL)
        store_rows(dqkv_ptr, row * 3 * N, live, q_h, q_t, N, HEAD, TAIL)
        store_rows(dqkv_ptr + N, row * 3 * N, live, k_h, k_t, N, HEAD, TAIL)
        store_rows(dqkv_ptr + 2 * N, row * 3 * N, live, v_h, v_t, N, HEAD, TAIL)
        if WANT_SUM:
            q0 += tl.sum(q_h, 0)
            q1 += tl.sum(q_t, 0)
            k0 += tl.sum(k_h, 0)
            k1 += tl.sum(k_t, 0)
            v0 += tl.sum(v_h, 0)
            v1 += tl.sum(v_t, 0)
    if WANT_SUM:
        part = part_ptr + pid.to(tl.int64) * 3 * N
        store_sums(part, q0, q1, N, HEAD, TAIL)
        store_sums(part + N, k0, k1, N, HEAD, TAIL)
        store_sums(part + 2 * N, v0, v1, N, HEAD, TAIL)


def pack_qkv(dq: Tensor, dk: Tensor, dv: Tensor, want_sum: bool = True) -> tuple[Tensor, Tensor]:
    """(dqkv [M, 3, N] in the inputs' dtype, S [3·N] float32; empty where not wanted); Triton only."""
    M, N = dq.shape
    dqkv = dq.new_empty((M, 3, N))
    total = dq.new_empty((3 * N if want_sum else 0,), dtype=torch.float32)
    if M == 0:
        return dqkv, total.zero_()
    dq, dk, dv = dense_rows(dq), dense_rows(dk), dense_rows(dv)
    rows = dq[None]  # as one sample
    tile = backward_tile(rows, rows, rows)
    P, walk = programs(1, M, tile)
    HEAD, TAIL = split(N)
    partials = dq.new_empty((1, P, 3, N) if want_sum else (0,), dtype=torch.float32)
    direct(_pack_qkv)[(P,)](
        *(dq, dk, dv, dqkv, partials, dq.stride(0), dk.stride(0), dv.stride(0), M, walk),
        N=N,
        HEAD=HEAD,
        TAIL=TAIL,
        ROWS=tile.rows,
        STAGES=tile.stages,
        WANT_SUM=want_sum,
        num_warps=tile.warps,
    )
    if want_sum:
        sum_programs(partials, total.view(1, 3, N), direct)
    return dqkv, total
