"""Triton kernels of packed attention, and how they are launched. ``packed_attention`` says what they compute.

A head of K elements is held as two power-of-two pieces, HEAD + TAIL >= K, each 16 wide at least because the matrix
unit takes no less: 72 is 64 + 16, of which 8 are masked, where one power of two would be 128. TAIL is 0 when K is a
power of two; then the tail names the head again and nobody reads it. A product over K is two dots into one
accumulator; a product over tokens is one dot for each piece of the result.

Offsets between blocks are 64-bit scalars, for tensors pass 2**31 elements; within a block they are 32-bit, which
saves registers and needs token strides below ``STRIDE_LIMIT``.

Shapes: B batch, L tokens, H heads, K head dim; a program holds QUERIES query rows or KEYS key rows, or both.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from dataclasses import dataclass, replace

from opendit.kernels._rows import downcast, tl, triton
from opendit.kernels.backend import INTERPRETING, TRITON_INSTALLED

INTERPRETED = tl.constexpr(INTERPRETING) if TRITON_INSTALLED else None  # kernels read only such globals
LOG2E = tl.constexpr(1.4426950408889634) if TRITON_INSTALLED else None  # exp2 costs one instruction, exp two
LN2 = tl.constexpr(0.6931471805599453) if TRITON_INSTALLED else None
STRIDE_LIMIT = 1 << 23  # of 256 rows at most
VARIANTS = ("split", "joint", "atomic")
JOINT_LIMIT = 2048
"""Longest L that the joint backward takes: its scratch grows with L and is only fast while the L2 cache holds it."""


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
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True)
class Backward:
    """How the backward is launched.

    variant: "split" finds dq in one kernel and dk, dv in another, 7 products for every pair of blocks and nothing
    shared; "joint" has one program work through a whole head with 5, its dq in float32 scratch between key blocks;
    "atomic" has 5 for any length, and adds up dq in whatever order programs come, so repeats differ in the last bits.
    keys: the launch of the kernel that finds dk and dv. queries: of the one that finds dq, for "split".
    programs: of "joint", how many share the heads; each has scratch of its own.
    """

    variant: str
    keys: Launch
    queries: Launch
    programs: int = 132


def forward_launch(length: int, head_dim: int, itemsize: int) -> Launch:
    """The forward kernel's launch."""
    if INTERPRETING:
        return Launch(queries=32, keys=16, warps=4, stages=1)
    if itemsize > 2:  # for tests: no matrix unit, so blocks that fit are enough
        return Launch(queries=32, keys=32, warps=4, stages=1)
    if head_dim <= 96:  # three programs fit a multiprocessor, so that one's exponentials hide another's products
        return Launch(queries=64, keys=64, warps=4, stages=2)
    return Launch(queries=128, keys=64, warps=8, stages=2)


def backward_launch(length: int, head_dim: int, itemsize: int, variant: str | None = None) -> Backward:
    """The backward kernels' launch; ``variant`` overrides the rule's."""
    if INTERPRETING:
        tile = Launch(queries=16, keys=32, warps=4, stages=1)
        return Backward(variant or "split", keys=tile, queries=replace(tile, queries=32, keys=16), programs=3)
    if itemsize > 2:
        tile = Launch(queries=32, keys=32, warps=4, stages=1)
        return Backward(variant or "split", keys=tile, queries=tile)
    queries = Launch(queries=64, keys=64 if head_dim <= 96 else 32, warps=4, stages=2)
    keys = Launch(queries=32, keys=64, warps=4, stages=2)
    if variant in ("joint", "atomic"):  # 64 queries at least: the matrix unit takes no fewer rows of dq
        keys = Launch(queries=64, keys=128, warps=8, stages=2)
    return Backward(variant or "split", keys=keys, queries=queries)


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
def attention_forward(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    stride_b,
    stride_l,
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
    """One block of queries of one head: out and lse, keys streamed past it."""
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)  # offsets pass 2**31 elements
    h = bh % H
    b = bh // H
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    q_ptr = qkv_ptr + b * stride_b + h * K
    k_ptr = q_ptr + H * K
    v_ptr = k_ptr + H * K
    rows = tl.arange(0, QUERIES)
    first = (pid % blocks).to(tl.int64) * QUERIES
    live = first + rows < L
    q_h, q_t = _load(q_ptr + first * stride_l, rows * stride_l, live, K, HEAD, TAIL, EVEN)

    to_log2 = scale * LOG2E
    cols = tl.arange(0, KEYS)
    offsets = cols * stride_l
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc_h, acc_t = _zeros(QUERIES, HEAD, TAIL)
    for start in tl.range(0, L, KEYS, num_stages=STAGES):
        shift = tl.cast(start, tl.int64) * stride_l
        exists = start + cols < L
        k_h, k_t = _load(k_ptr + shift, offsets, exists, K, HEAD, TAIL, EVEN)
        s = _over_k(q_h, q_t, k_h, k_t, TAIL)
        if not EVEN:
            s = tl.where(exists[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(p, 1)
        acc_h = acc_h * shrink[:, None]
        if TAIL > 0:
            acc_t = acc_t * shrink[:, None]
        v_h, v_t = _load(v_ptr + shift, offsets, exists, K, HEAD, TAIL, EVEN)
        acc_h, acc_t = _add_over_rows(downcast(p, dtype), v_h, v_t, acc_h, acc_t, TAIL)

    tl.store(lse_ptr + bh * L + first + rows, (top + tl.log2(total)) * LN2, mask=live)
    inverse = (1.0 / total)[:, None]
    out_ptr += ((b * L + first) * H + h) * K
    _store(out_ptr, rows * (H * K), live, acc_h * inverse, acc_t * inverse, K, HEAD, TAIL)


@triton.jit(do_not_specialize=["L", "blocks"])
def attention_backward_queries(
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
    WANT_DQ: tl.constexpr,
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

    if WANT_DQ:
        q_ptr = qkv_ptr + b * stride_b + h * K
        k_ptr = q_ptr + H * K
        v_ptr = k_ptr + H * K
        q_h, q_t = _load(q_ptr + first * stride_l, rows * stride_l, live, K, HEAD, TAIL, EVEN)
        to_log2 = scale * LOG2E
        # An infinite lse makes the rows that do not exist all 0.
        lse = tl.load(lse_ptr + bh * L + first + rows, mask=live, other=float("inf")) * LOG2E
        cols = tl.arange(0, KEYS)
        offsets = cols * stride_l
        dq_h, dq_t = _zeros(QUERIES, HEAD, TAIL)
        for start in tl.range(0, L, KEYS, num_stages=STAGES):
            shift = tl.cast(start, tl.int64) * stride_l
            exists = start + cols < L
            k_h, k_t = _load(k_ptr + shift, offsets, exists, K, HEAD, TAIL, EVEN)
            v_h, v_t = _load(v_ptr + shift, offsets, exists, K, HEAD, TAIL, EVEN)
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


@triton.jit
def _key_block(
    qkv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    dq_ptr,
    part_q_ptr,
    part_kv_ptr,
    stride_b,
    stride_l,
    dout_stride_b,
    dout_stride_l,
    L,
    scale,
    b,
    h,
    block,
    blocks,
    H: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    DQ: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WANT_SUMS: tl.constexpr,
):
    """One block of keys of one head: dk and dv with queries streamed past it, and its share of dq if DQ says so.

    DQ is "none", "atomic" (added to dq_ptr [B, L, H, K]) or "scratch" (dq_ptr [L rounded up, HEAD + TAIL], which
    FIRST begins and LAST turns into the result). Every product is transposed, [KEYS, QUERIES], so that only dq's
    left factor must be turned.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    q_ptr = qkv_ptr + b * stride_b + h * K
    k_ptr = q_ptr + H * K
    v_ptr = k_ptr + H * K
    do_ptr = dout_ptr + b * dout_stride_b + h * K
    lse_ptr += (b * H + h) * L
    delta_ptr += (b * H + h) * L
    cols = tl.arange(0, KEYS)
    first = tl.cast(block, tl.int64) * KEYS
    exists = first + cols < L
    k_h, k_t = _load(k_ptr + first * stride_l, cols * stride_l, exists, K, HEAD, TAIL, EVEN)
    v_h, v_t = _load(v_ptr + first * stride_l, cols * stride_l, exists, K, HEAD, TAIL, EVEN)

    to_log2 = scale * LOG2E
    rows = tl.arange(0, QUERIES)
    q_offsets = rows * stride_l
    do_offsets = rows * dout_stride_l
    dk_h, dk_t = _zeros(KEYS, HEAD, TAIL)
    dv_h, dv_t = _zeros(KEYS, HEAD, TAIL)
    for start in tl.range(0, L, QUERIES, num_stages=STAGES):
        token = start + rows
        live = token < L
        wide = tl.cast(start, tl.int64)
        q_h, q_t = _load(q_ptr + wide * stride_l, q_offsets, live, K, HEAD, TAIL, EVEN)
        do_h, do_t = _load(do_ptr + wide * dout_stride_l, do_offsets, live, K, HEAD, TAIL, EVEN)
        if EVEN:
            lse = tl.load(lse_ptr + token)
            delta = tl.load(delta_ptr + token)
        else:  # an infinite lse makes the rows that do not exist all 0
            lse = tl.load(lse_ptr + token, mask=live, other=float("inf"))
            delta = tl.load(delta_ptr + token, mask=live, other=0.0)
        s = _over_k(k_h, k_t, q_h, q_t, TAIL)
        p = tl.exp2(s * to_log2 - (lse * LOG2E)[None, :])
        if not EVEN:  # exp2(-lse) may be infinite
            p = tl.where(exists[:, None], p, 0.0)
        dp = _over_k(v_h, v_t, do_h, do_t, TAIL)
        dv_h, dv_t = _add_over_rows(downcast(p, dtype), do_h, do_t, dv_h, dv_t, TAIL)
        ds = downcast(p * (dp - delta[None, :]), dtype)
        dk_h, dk_t = _add_over_rows(ds, q_h, q_t, dk_h, dk_t, TAIL)

        if DQ != "none":
            dq_h, dq_t = _zeros(QUERIES, HEAD, TAIL)
            if DQ == "scratch":  # rows and columns that do not exist have their place in it: no masks
                at = dq_ptr + wide * (HEAD + TAIL) + (rows * (HEAD + TAIL))[:, None]
                if not FIRST:
                    dq_h = tl.load(at + tl.arange(0, HEAD)[None, :])
                    if TAIL > 0:
                        dq_t = tl.load(at + HEAD + tl.arange(0, TAIL)[None, :])
            dq_h, dq_t = _add_over_rows(tl.trans(ds), k_h, k_t, dq_h, dq_t, TAIL)
            if DQ == "atomic":
                at = dq_ptr + ((b * L + wide) * H + h) * K + (rows * (H * K))[:, None]
                mask = _columns(K, 0, HEAD, live)
                tl.atomic_add(at + tl.arange(0, HEAD)[None, :], dq_h, mask=mask, sem="relaxed")
                if TAIL > 0:
                    mask = _columns(K, HEAD, TAIL, live)
                    tl.atomic_add(at + HEAD + tl.arange(0, TAIL)[None, :], dq_t, mask=mask, sem="relaxed")
            else:
                if LAST:
                    dq_h, dq_t = dq_h * scale, dq_t * scale
                    dq = dqkv_ptr + (b * L + wide) * (3 * H * K) + h * K
                    _store(dq, rows * (3 * H * K), live, dq_h, dq_t, K, HEAD, TAIL)
                    if WANT_SUMS:
                        part = (b * tl.cdiv(L, QUERIES) + start // QUERIES) * H + h
                        _store_sums(part_q_ptr + part * K, dq_h, dq_t, K, HEAD, TAIL)
                else:
                    tl.store(at + tl.arange(0, HEAD)[None, :], dq_h)
                    if TAIL > 0:
                        tl.store(at + HEAD + tl.arange(0, TAIL)[None, :], dq_t)

    dk_h, dk_t = dk_h * scale, dk_t * scale
    dk_ptr = dqkv_ptr + (b * L + first) * (3 * H * K) + H * K + h * K
    _store(dk_ptr, cols * (3 * H * K), exists, dk_h, dk_t, K, HEAD, TAIL)
    _store(dk_ptr + H * K, cols * (3 * H * K), exists, dv_h, dv_t, K, HEAD, TAIL)
    if WANT_SUMS:
        part = part_kv_ptr + (((b * blocks + block) * 2) * H + h) * K
        _store_sums(part, dk_h, dk_t, K, HEAD, TAIL)
        _store_sums(part + H * K, dv_h, dv_t, K, HEAD, TAIL)


@triton.jit(do_not_specialize=["L", "blocks"])
def attention_backward_keys(
    qkv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    dq_ptr,
    part_kv_ptr,
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
    ATOMIC: tl.constexpr,
    WANT_SUMS: tl.constexpr,
):
    """One block of keys of one head. ATOMIC: dq is added to dq_ptr as well."""
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    DQ: tl.constexpr = "atomic" if ATOMIC else "none"
    _key_block(
        qkv_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        dqkv_ptr,
        dq_ptr,
        part_kv_ptr,
        part_kv_ptr,
        stride_b,
        stride_l,
        dout_stride_b,
        dout_stride_l,
        L,
        scale,
        bh // H,
        bh % H,
        pid % blocks,
        blocks,
        H,
        K,
        HEAD,
        TAIL,
        QUERIES,
        KEYS,
        STAGES,
        EVEN,
        DQ,
        True,
        True,
        WANT_SUMS,
    )


@triton.jit(do_not_specialize=["L", "heads", "programs"])
def attention_backward_joint(
    qkv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    scratch_ptr,
    part_q_ptr,
    part_kv_ptr,
    stride_b,
    stride_l,
    dout_stride_b,
    dout_stride_l,
    L,
    heads,
    programs,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WANT_SUMS: tl.constexpr,
):
    """All of dq, dk and dv of one head after another: of all B·H, every ``programs``-th.

    What one thread leaves in memory for another (delta, dq's scratch) is behind a barrier.
    """
    rows = tl.arange(0, QUERIES)
    pid = tl.program_id(0).to(tl.int64)
    scratch_ptr += pid * (tl.cdiv(L, QUERIES) * QUERIES * (HEAD + TAIL))
    for bh in range(tl.program_id(0), heads, programs):
        bh = tl.cast(bh, tl.int64)
        h = bh % H
        b = bh // H
        for start in tl.range(0, L, QUERIES, num_stages=1):
            first = tl.cast(start, tl.int64)
            live = first + rows < L
            do_ptr = dout_ptr + b * dout_stride_b + first * dout_stride_l + h * K
            do_h, do_t = _load(do_ptr, rows * dout_stride_l, live, K, HEAD, TAIL, EVEN)
            o_h, o_t = _load(out_ptr + ((b * L + first) * H + h) * K, rows * (H * K), live, K, HEAD, TAIL, EVEN)
            tl.store(delta_ptr + bh * L + first + rows, _row_products(do_h, do_t, o_h, o_t, TAIL), mask=live)
        tl.debug_barrier()
        _key_block(
            qkv_ptr,
            dout_ptr,
            lse_ptr,
            delta_ptr,
            dqkv_ptr,
            scratch_ptr,
            part_q_ptr,
            part_kv_ptr,
            stride_b,
            stride_l,
            dout_stride_b,
            dout_stride_l,
            L,
            scale,
            b,
            h,
            0,
            BLOCKS,
            H,
            K,
            HEAD,
            TAIL,
            QUERIES,
            KEYS,
            STAGES,
            EVEN,
            "scratch",
            True,
            BLOCKS == 1,
            WANT_SUMS,
        )
        if BLOCKS > 2:
            for block in range(1, BLOCKS - 1):
                tl.debug_barrier()
                _key_block(
                    qkv_ptr,
                    dout_ptr,
                    lse_ptr,
                    delta_ptr,
                    dqkv_ptr,
                    scratch_ptr,
                    part_q_ptr,
                    part_kv_ptr,
                    stride_b,
                    stride_l,
                    dout_stride_b,
                    dout_stride_l,
                    L,
                    scale,
                    b,
                    h,
                    block,
                    BLOCKS,
                    H,
                    K,
                    HEAD,
                    TAIL,
                    QUERIES,
                    KEYS,
                    STAGES,
                    EVEN,
                    "scratch",
                    False,
                    False,
                    WANT_SUMS,
                )
        if BLOCKS > 1:
            tl.debug_barrier()
            _key_block(
                qkv_ptr,
                dout_ptr,
                lse_ptr,
                delta_ptr,
                dqkv_ptr,
                scratch_ptr,
                part_q_ptr,
                part_kv_ptr,
                stride_b,
                stride_l,
                dout_stride_b,
                dout_stride_l,
                L,
                scale,
                b,
                h,
                BLOCKS - 1,
                BLOCKS,
                H,
                K,
                HEAD,
                TAIL,
                QUERIES,
                KEYS,
                STAGES,
                EVEN,
                "scratch",
                False,
                True,
                WANT_SUMS,
            )
        tl.debug_barrier()


@triton.jit(do_not_specialize=["L", "blocks"])
def attention_backward_finish(
    dq_ptr,
    dqkv_ptr,
    part_ptr,
    L,
    blocks,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    WANT_SUMS: tl.constexpr,
):
    """One block of queries of one head: scale, round and pack the dq that was added up atomically."""
    pid = tl.program_id(0)
    block = pid % blocks
    bh = (pid // blocks).to(tl.int64)
    h = bh % H
    b = bh // H
    rows = tl.arange(0, QUERIES)
    first = block.to(tl.int64) * QUERIES
    live = first + rows < L
    row = b * L + first
    dq_h, dq_t = _load(dq_ptr + (row * H + h) * K, rows * (H * K), live, K, HEAD, TAIL, False)
    dq_h, dq_t = dq_h * scale, dq_t * scale
    _store(dqkv_ptr + (row * 3 * H + h) * K, rows * (3 * H * K), live, dq_h, dq_t, K, HEAD, TAIL)
    if WANT_SUMS:
        _store_sums(part_ptr + ((b * blocks + block) * H + h) * K, dq_h, dq_t, K, HEAD, TAIL)
