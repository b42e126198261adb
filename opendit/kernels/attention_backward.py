"""The backward of softmax attention on a packed projection, for short sequences.

qkv, dqkv [B, L, 3, H, K]; out, dout [B, L, H, K]; lse [B, H, L] float32; B batch, L tokens, H heads, K head dim; no
mask.

With s = scale · q·kᵀ, lse = log Σ_keys exp(s), p = exp(s − lse) and do = d(out):

    delta = Σ_K do · out                    per query and head
    ds    = p · (do·vᵀ − delta)
    dq    = scale · ds · k;  dk = scale · dsᵀ · q;  dv = pᵀ · do

One kernel finds delta and dq, one dk and dv: 7 products for every pair of blocks where 5 would do, but nothing is
shared, so repeats are bit-identical. dq, dk and dv go straight into dqkv, so that nothing is stacked afterwards.

Of the gradient of the projection's bias, their sums over all tokens, only dq's has to be summed. A softmax's row sums
to 1 whatever the scores are, so Σ_keys p = 1 and Σ_keys ds = 0: the sum of dk is 0, and that of dv is that of do.

A head of K elements is held as two power-of-two pieces, HEAD + TAIL >= K, each 16 wide at least because the matrix
unit takes no less: 72 is 64 + 16, of which 8 are masked, where one power of two would be 128. TAIL is 0 when K is a
power of two; then the tail names the head again and nobody reads it. A product over K is two dots into one
accumulator; a product over tokens is one dot for each piece of the result.

What is streamed past a program's own rows comes through the tensor memory unit, where the device has one (compute
capability 9.0), blocks fit the tokens exactly, and samples lie one after another: threads need no addresses and wait
for no copies then. Its boxes are of whole pieces, so a tail holds columns of the next head; they meet zeros in a
program's own rows, or columns that are not stored.

Offsets between blocks are 64-bit scalars, for tensors pass 2**31 elements; within a block they are 32-bit, which
saves registers and needs token strides below ``STRIDE_LIMIT``. A program holds QUERIES query rows or KEYS key rows.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opendit.kernels._rows import direct, downcast, sum_programs, tl, triton
from opendit.kernels.backend import INTERPRETING, TRITON_INSTALLED

INTERPRETED = tl.constexpr(INTERPRETING) if TRITON_INSTALLED else None  # kernels read only such globals
LOG2E = tl.constexpr(1.4426950408889634) if TRITON_INSTALLED else None  # exp2 costs one instruction, exp two
STRIDE_LIMIT = 1 << 23  # of 256 rows at most
TensorDescriptor: Any = (
    importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor if TRITON_INSTALLED else None
)


def pieces(head_dim: int) -> tuple[int, int]:
    """(HEAD, TAIL) of a head of ``head_dim`` elements."""
    if head_dim <= 16 or head_dim & head_dim - 1 == 0:
        return max(head_dim, 16), 0
    head = 1 << head_dim.bit_length() - 1
    return head, max(16, 1 << (head_dim - head - 1).bit_length())


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched. Plain data from a plain rule, not autotuned: a launch is the same every time.

    queries, keys: rows of either that a program holds at once. warps: warps per program. stages: depth of the
    asynchronous copies. registers: cap for each thread, 0 for the compiler's own choice; eager calls only.
    boxes: whether the tensor memory unit is used where it can be.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    boxes: bool = True

    def even(self, length: int) -> bool:
        """Whether blocks fit the tokens exactly, so that nothing is masked."""
        return length % self.queries == 0 and length % self.keys == 0


@dataclass(frozen=True)
class Tiles:
    """How the backward's two kernels are launched: the one that finds dq, and the one that finds dk and dv."""

    queries: Launch
    keys: Launch


def tiles(head_dim: int, itemsize: int) -> Tiles:
    """The backward kernels' launch, as measured on Hopper at head_dim 72."""
    if INTERPRETING:
        return Tiles(queries=Launch(32, 16, 4, 1), keys=Launch(16, 32, 4, 1))
    if itemsize > 2:
        return Tiles(queries=Launch(32, 32, 4, 1), keys=Launch(32, 32, 4, 1))
    if head_dim <= 96:
        return Tiles(queries=Launch(64, 32, 4, 3), keys=Launch(32, 64, 4, 3, registers=168))
    return Tiles(queries=Launch(64, 32, 4, 2), keys=Launch(32, 64, 4, 2))


@triton.jit
def _columns(K: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, live):
    """Mask [ROWS, WIDTH] of the piece that begins at FIRST, or [ROWS, 1] where all its columns exist."""
    if FIRST + WIDTH > K:
        return live[:, None] & (FIRST + tl.arange(0, WIDTH) < K)[None, :]
    else:
        return live[:, None]


@triton.jit
def _load_piece(at, live, K: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """[ROWS, WIDTH] of the rows that begin at ``at`` [ROWS, 1], 0 where masked."""
    at = at + FIRST + tl.arange(0, WIDTH)[None, :]
    if not EVEN:
        return tl.load(at, mask=_columns(K, FIRST, WIDTH, live), other=0.0)
    elif FIRST + WIDTH > K:  # rows need no mask: a mask of columns alone is the same for every row
        return tl.load(at, mask=(FIRST + tl.arange(0, WIDTH) < K)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _load(ptr, offsets, live, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr):
    """(head [ROWS, HEAD], tail [ROWS, TAIL]) of the rows at ``offsets`` [ROWS]. EVEN: every row exists."""
    at = ptr + offsets[:, None]
    head = _load_piece(at, live, K, 0, HEAD, EVEN)
    tail = head
    if TAIL > 0:
        tail = _load_piece(at, live, K, HEAD, TAIL, EVEN)
    return head, tail


@triton.jit
def _stream(
    box_head,
    box_tail,
    row,
    column,
    ptr,
    offsets,
    live,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``_load``, or the boxes at (row, column), whose tail's masked columns hold something else."""
    if box_head is None:
        head, tail = _load(ptr, offsets, live, K, HEAD, TAIL, EVEN)
    else:
        head = box_head.load([row, column])
        tail = head
        if TAIL > 0:
            tail = box_tail.load([row, column + HEAD])
    return head, tail


@triton.jit
def _store(ptr, offsets, live, head, tail, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Write float32 rows in the pointer's dtype."""
    at = ptr + offsets[:, None]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(at + tl.arange(0, HEAD)[None, :], downcast(head, dtype), mask=_columns(K, 0, HEAD, live))
    if TAIL > 0:
        at = at + HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(at, downcast(tail, dtype), mask=_columns(K, HEAD, TAIL, live))


@triton.jit
def _store_sums(ptr, head, tail, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Write the sums over rows as one [K] vector."""
    cols = tl.arange(0, HEAD)
    tl.store(ptr + cols, tl.sum(head, 0), mask=cols < K)
    if TAIL > 0:
        cols = HEAD + tl.arange(0, TAIL)
        tl.store(ptr + cols, tl.sum(tail, 0), mask=cols < K)


@triton.jit
def _dot(a, b, acc):
    """acc + a · b in float32, without tf32. The interpreter would multiply the bits of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _over_k(a_head, a_tail, b_head, b_tail, TAIL: tl.constexpr):
    """a · bᵀ over both pieces of K."""
    product = _dot(a_head, tl.trans(b_head), None)
    if TAIL > 0:
        product = _dot(a_tail, tl.trans(b_tail), product)
    return product


@triton.jit
def _add_over_rows(a, b_head, b_tail, head, tail, TAIL: tl.constexpr):
    """(head, tail) + a · b for both pieces of b's columns."""
    head = _dot(a, b_head, head)
    if TAIL > 0:
        tail = _dot(a, b_tail, tail)
    return head, tail


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Two float32 accumulators."""
    head = tl.zeros([ROWS, HEAD], tl.float32)
    tail = head
    if TAIL > 0:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return head, tail


@triton.jit
def _row_products(a_head, a_tail, b_head, b_tail, TAIL: tl.constexpr):
    """The sum of a·b over K in float32, [ROWS]."""
    total = tl.sum(a_head.to(tl.float32) * b_head.to(tl.float32), 1)
    if TAIL > 0:
        total += tl.sum(a_tail.to(tl.float32) * b_tail.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["L", "blocks"])
def _queries_bwd(
    qkv_head,
    qkv_tail,
    qkv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    part_ptr,
    stride_b,
    stride_l,
    dout_stride_b,
    dout_stride_l,
    L,
    blocks,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    WANT_SUMS: tl.constexpr,
):
    """One block of queries of one head: delta, and dq with keys streamed past it."""
    pid = tl.program_id(0)
    block = pid % blocks
    bh = (pid // blocks).to(tl.int64)
    h = bh % H
    b = bh // H
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    rows = tl.arange(0, QUERIES)
    first = block.to(tl.int64) * QUERIES
    live = first + rows < L
    dout_ptr += b * dout_stride_b + first * dout_stride_l + h * K
    do_h, do_t = _load(dout_ptr, rows * dout_stride_l, live, K, HEAD, TAIL, EVEN)
    out_ptr += ((b * L + first) * H + h) * K
    o_h, o_t = _load(out_ptr, rows * (H * K), live, K, HEAD, TAIL, EVEN)
    delta = _row_products(do_h, do_t, o_h, o_t, TAIL)
    tl.store(delta_ptr + bh * L + first + rows, delta, mask=live)

    q_ptr = qkv_ptr + b * stride_b + h * K
    k_ptr = q_ptr + H * K
    v_ptr = k_ptr + H * K
    q_h, q_t = _load(q_ptr + first * stride_l, rows * stride_l, live, K, HEAD, TAIL, EVEN)
    to_log2 = scale * LOG2E
    # An infinite lse makes the rows that do not exist all 0.
    lse = tl.load(lse_ptr + bh * L + first + rows, mask=live, other=float("inf")) * LOG2E
    cols = tl.arange(0, KEYS)
    offsets = cols * stride_l
    column = (h * K).to(tl.int32)
    dq_h, dq_t = _zeros(QUERIES, HEAD, TAIL)
    for start in tl.range(0, L, KEYS, num_stages=STAGES):
        shift = tl.cast(start, tl.int64) * stride_l
        exists = start + cols < L
        row = (b * L + start).to(tl.int32)
        k_h, k_t = _stream(qkv_head, qkv_tail, row, H * K + column, k_ptr + shift, offsets, exists, K, HEAD, TAIL, EVEN)
        v_h, v_t = _stream(
            qkv_head, qkv_tail, row, 2 * H * K + column, v_ptr + shift, offsets, exists, K, HEAD, TAIL, EVEN
        )
        s = _over_k(q_h, q_t, k_h, k_t, TAIL)
        dp = _over_k(do_h, do_t, v_h, v_t, TAIL)
        p = tl.exp2(s * to_log2 - lse[:, None])
        if not EVEN:  # exp2(-lse) may be infinite
            p = tl.where(exists[None, :], p, 0.0)
        ds = downcast(p * (dp - delta[:, None]), dtype)
        dq_h, dq_t = _add_over_rows(ds, k_h, k_t, dq_h, dq_t, TAIL)
    dq_h, dq_t = dq_h * scale, dq_t * scale
    dqkv_ptr += (b * L + first) * (3 * H * K) + h * K
    _store(dqkv_ptr, rows * (3 * H * K), live, dq_h, dq_t, K, HEAD, TAIL)
    if WANT_SUMS:
        _store_sums(part_ptr + ((b * blocks + block) * H + h) * K, dq_h, dq_t, K, HEAD, TAIL)


@triton.jit(do_not_specialize=["L", "blocks"])
def _keys_bwd(
    qkv_head,
    qkv_tail,
    dout_head,
    dout_tail,
    qkv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    stride_b,
    stride_l,
    dout_stride_b,
    dout_stride_l,
    L,
    blocks,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One block of keys of one head: dk and dv with queries streamed past it. Every product is [KEYS, QUERIES]."""
    pid = tl.program_id(0)
    block = pid % blocks
    bh = (pid // blocks).to(tl.int64)
    h = bh % H
    b = bh // H
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    q_ptr = qkv_ptr + b * stride_b + h * K
    k_ptr = q_ptr + H * K
    v_ptr = k_ptr + H * K
    do_ptr = dout_ptr + b * dout_stride_b + h * K
    lse_ptr += (b * H + h) * L
    delta_ptr += (b * H + h) * L
    cols = tl.arange(0, KEYS)
    first = block.to(tl.int64) * KEYS
    exists = first + cols < L
    k_h, k_t = _load(k_ptr + first * stride_l, cols * stride_l, exists, K, HEAD, TAIL, EVEN)
    v_h, v_t = _load(v_ptr + first * stride_l, cols * stride_l, exists, K, HEAD, TAIL, EVEN)

    to_log2 = scale * LOG2E
    rows = tl.arange(0, QUERIES)
    q_offsets = rows * stride_l
    do_offsets = rows * dout_stride_l
    column = (h * K).to(tl.int32)
    dk_h, dk_t = _zeros(KEYS, HEAD, TAIL)
    dv_h, dv_t = _zeros(KEYS, HEAD, TAIL)
    for start in tl.range(0, L, QUERIES, num_stages=STAGES):
        token = start + rows
        live = token < L
        wide = tl.cast(start, tl.int64)
        row = (b * L + start).to(tl.int32)
        q_h, q_t = _stream(
            qkv_head, qkv_tail, row, column, q_ptr + wide * stride_l, q_offsets, live, K, HEAD, TAIL, EVEN
        )
        do_h, do_t = _stream(
            dout_head, dout_tail, row, column, do_ptr + wide * dout_stride_l, do_offsets, live, K, HEAD, TAIL, EVEN
        )
        if EVEN:
            lse = tl.load(lse_ptr + token)
            delta = tl.load(delta_ptr + token)
        else:  # an infinite lse makes the rows that do not exist all 0
            lse = tl.load(lse_ptr + token, mask=live, other=float("inf"))
            delta = tl.load(delta_ptr + token, mask=live, other=0.0)
        s = _over_k(k_h, k_t, q_h, q_t, TAIL)
        p = tl.exp2(s * to_log2 - (lse * LOG2E)[None, :])
        dp = _over_k(v_h, v_t, do_h, do_t, TAIL)
        dv_h, dv_t = _add_over_rows(downcast(p, dtype), do_h, do_t, dv_h, dv_t, TAIL)
        ds = downcast(p * (dp - delta[None, :]), dtype)
        dk_h, dk_t = _add_over_rows(ds, q_h, q_t, dk_h, dk_t, TAIL)

    dk_h, dk_t = dk_h * scale, dk_t * scale
    dk_ptr = dqkv_ptr + (b * L + first) * (3 * H * K) + H * K + h * K
    _store(dk_ptr, cols * (3 * H * K), exists, dk_h, dk_t, K, HEAD, TAIL)
    _store(dk_ptr + H * K, cols * (3 * H * K), exists, dv_h, dv_t, K, HEAD, TAIL)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor itself if each token's elements lie together, whatever B's stride and almost any of L; else a copy."""
    dense = 1
    if tensor.stride(1) >= STRIDE_LIMIT:
        return tensor.contiguous()
    for size, stride in zip(tensor.shape[:1:-1], tensor.stride()[:1:-1], strict=True):
        if size != 1 and stride != dense:
            return tensor.contiguous()
        dense *= size
    return tensor


def _options(launch: Launch) -> dict[str, int]:
    """Triton's own launch arguments."""
    return {"num_warps": launch.warps, **({"maxnreg": launch.registers} if launch.registers else {})}


def _tile(launch: Launch, length: int) -> dict[str, Any]:
    """A kernel's compile-time block sizes."""
    return {
        "QUERIES": launch.queries,
        "KEYS": launch.keys,
        "STAGES": launch.stages,
        "EVEN": launch.even(length),
    }


def _boxes(tensor: Tensor, launch: Launch, rows: int, head: int, tail: int) -> tuple[Any, Any]:
    """(head, tail), descriptions of ``rows`` tokens' pieces of [B, L, ..., K] for the tensor memory unit, tail None if
    it is empty; (None, None) where the unit is not there or can't be used.
    """
    B, L, *rest = tensor.shape
    stride, width = tensor.stride(1), math.prod(rest)
    usable = (
        launch.boxes
        and launch.even(L)
        and (B == 1 or tensor.stride(0) == L * stride)
        and stride >= width  # rows of an expanded tensor overlap
        and stride * tensor.element_size() % 16 == 0  # the unit's own rule
        and tensor.data_ptr() % 16 == 0
        and (INTERPRETING or torch.cuda.get_device_capability(tensor.device) >= (9, 0))
    )
    if not usable:
        return None, None

    def box(columns: int) -> Any:
        return TensorDescriptor(tensor, [B * L, width], [stride, 1], [rows, columns])

    return box(head), box(tail) if tail else None


def fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels take this."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and head_dim % 8 == 0 and head_dim <= 128


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
    *,
    query_sums: bool = False,
    launch: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(dqkv [B, L, 3, H, K], contiguous; dq's sums over B and L [H·K] float32, empty where not asked for).

    Args:
        dout, out: [B, L, H, K] in qkv's dtype, which `fits` must accept. qkv: [B, L, 3, H, K]. Strides of B and L may
            be anything; others that are not dense cost a copy.
        lse: [B, H, L] float32: the natural logarithm of the softmax's denominator.
        scale: what q·kᵀ was multiplied by; 1/√K by default.
        query_sums: whether dq's sums are wanted; they are of the float32 values, before they are rounded into dqkv.
            dk's are 0, and dv's those of dout.
    """
    B, L, _, H, K = qkv.shape
    scale = K**-0.5 if scale is None else scale
    dqkv = qkv.new_empty(qkv.shape)
    sums = qkv.new_empty((H * K if query_sums else 0,), dtype=torch.float32)
    if qkv.numel() == 0:
        return dqkv, sums.zero_()
    dout, qkv, out, lse = _packed(dout), _packed(qkv), out.contiguous(), lse.contiguous()
    HEAD, TAIL = pieces(K)
    launch = launch or tiles(K, qkv.element_size())
    of_queries, of_keys = launch.queries, launch.keys
    q_blocks, k_blocks = -(-L // of_queries.queries), -(-L // of_keys.keys)
    delta = torch.empty_like(lse)
    partials = qkv.new_empty((1, B * q_blocks, 1, H * K) if query_sums else (0,), dtype=torch.float32)
    strides = (qkv.stride(0), qkv.stride(1), dout.stride(0), dout.stride(1))
    shape = {"H": H, "K": K, "HEAD": HEAD, "TAIL": TAIL}
    _queries_bwd[(B * H * q_blocks,)](  # finds delta, which the other reads
        *_boxes(qkv, of_queries, of_queries.keys, HEAD, TAIL),
        *(qkv, dout, out, lse, delta, dqkv, partials, *strides, L, q_blocks, scale),
        **shape,
        WANT_SUMS=query_sums,
        **_tile(of_queries, L),
        **_options(of_queries),
    )
    _keys_bwd[(B * H * k_blocks,)](
        *_boxes(qkv, of_keys, of_keys.queries, HEAD, TAIL),
        *_boxes(dout, of_keys, of_keys.queries, HEAD, TAIL),
        *(qkv, dout, lse, delta, dqkv, *strides, L, k_blocks, scale),
        **shape,
        **_tile(of_keys, L),
        **_options(of_keys),
    )
    if query_sums:
        sum_programs(partials, sums.view(1, 1, H * K), direct)
    return dqkv, sums


def attention_backward_reference(
    dout: Tensor, qkv: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, dqkv, sums of dq): the specification, by autograd, in qkv's own dtype."""
    leaf = qkv.detach().requires_grad_()
    q, k, v = leaf.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.mT) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    (dqkv,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), scores.detach().logsumexp(-1), dqkv, dqkv[:, :, 0].sum((0, 1)).flatten()
