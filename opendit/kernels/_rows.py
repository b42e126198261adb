"""What the Triton kernels share: how a row is held, how programs share the rows, and how their sums are joined.

A row of D elements is held as two power-of-two pieces, HEAD = the largest power of two below D and TAIL = the rest
rounded up. One power of two would waste 44 % of the registers and lanes at D=1152; 1024 + 128 wastes none, and so it
is for every usual width (384, 768, 1024, 1152, 1536). Only the tail is ever masked.

A program walks consecutive rows of one sample, so it reads that sample's modulation once and never mixes two samples;
in the backward it keeps the sample's sums in registers and writes them once. ``sum_programs`` then adds the programs'
sums in a fixed order: no atomics, so a repeated backward is bit-identical.

Shapes: B batch, L tokens, D hidden, P programs per sample.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opendit.kernels.backend import INTERPRETING, TRITON_INSTALLED

triton: Any
tl: Any
if TRITON_INSTALLED:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
else:

    class _NoTriton:
        """Lets the kernel files be imported, for their references, where triton is not installed."""

        constexpr = None

        def jit(self, fn: Any = None, **_: Any) -> Any:
            return fn or (lambda fn: fn)

    triton = tl = _NoTriton()


UNSPECIALIZED = ["L", "P", "walk"]
"""Kernel arguments whose value must not start another compilation: token counts vary, and nothing is gained."""


def split(hidden: int) -> tuple[int, int]:
    """(HEAD, TAIL), two powers of two with HEAD + TAIL >= hidden and HEAD < hidden (1 at least)."""
    head = 1 << max(hidden - 1, 1).bit_length() - 1
    return head, 1 << max(hidden - head - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched. Plain data from a plain rule, not autotuned: a launch is the same every time.

    rows: rows a program holds at once. walk: rows a program walks in all, at least (all of L if shorter).
    most: programs wanted in all; where the samples alone give fewer, they are cut. warps: warps per program.
    stages: depth of the asynchronous copies that prefetch a program's next rows (1: none).
    """

    rows: int
    walk: int
    most: int
    warps: int
    stages: int


def forward_tile(*streams: Tensor, quantize: bool = False) -> Tile:
    """The forward kernels' launch for the [B, L, D] tensors that they read; `quantize`: they write rows in 8 bits.

    Nothing is kept between rows, so programs are short and many.
    """
    if INTERPRETING:  # its time goes into programs and loop turns, not into elements
        return Tile(rows=16, walk=64, most=1 << 20, warps=4, stages=1)
    # Half the backward's warps: with one, a row's two reductions need no trip through shared memory.
    B, L, D = streams[0].shape
    few = max(warps(D) // 2, 1)
    if len(streams) > 1:
        return Tile(rows=1, walk=4, most=1 << 20, warps=few, stages=stages(streams))
    if streams[0].element_size() <= 2 and B * L < 1 << 15 and not quantize:
        return Tile(rows=1, walk=2, most=1 << 20, warps=few, stages=3)  # too few bytes for fewer programs
    # Two rows whose largest values are found besides take all registers of a lane.
    return Tile(rows=1 if quantize else 2, walk=4, most=1 << 20, warps=few, stages=min(stages(streams), 2))


def backward_tile(*streams: Tensor) -> Tile:
    """The backward kernels' launch for the [B, L, D] tensors that they read.

    Every program leaves partial sums behind, so programs are few and long: about four for each multiprocessor, or eight
    where rows are so short in bytes that four don't keep the memory busy.
    """
    if INTERPRETING:
        return Tile(rows=16, walk=64, most=512, warps=4, stages=1)
    B, L, D = streams[0].shape
    short = sum(t.element_size() for t in streams) <= 4
    if short and B * L < 1 << 15:  # few rows too: the sums that programs leave behind weigh more
        return Tile(rows=1, walk=16, most=528, warps=max(warps(D) // 2, 1), stages=stages(streams) + 1)
    return Tile(rows=1, walk=16, most=1024 if short else 512, warps=warps(D), stages=stages(streams))


def warps(hidden: int) -> int:
    """Warps per program: 1 up to a row of 1024, 2 up to 2048, and so on to 8, about 32 elements a lane."""
    return min(1 << max((hidden - 1).bit_length() - 10, 0), 8)


def stages(streams: tuple[Tensor, ...]) -> int:
    """How deep to prefetch: 3, or what 96 KiB of shared memory hold, which every GPU since Ampere has."""
    row = sum(t.element_size() for t in streams) * streams[0].shape[-1]
    return 1 + min(2, 96 * 1024 // row)


def programs(batch: int, length: int, tile: Tile) -> tuple[int, int]:
    """(P, rows each walks): how each sample of ``length`` rows is cut."""
    wanted = min(-(-length // tile.walk), -(-tile.most // batch))
    walk = -(-length // wanted)
    return -(-length // walk), walk


@triton.jit
def tail_mask(live, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[ROWS, TAIL] of what exists; [ROWS, 1] when the row fills its two pieces, so that nothing is compared."""
    if HEAD + TAIL == D:
        return live[:, None]
    else:
        return live[:, None] & (HEAD + tl.arange(0, TAIL) < D)[None, :]


@triton.jit
def load_rows(ptr, offsets, live, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows at ``offsets`` [ROWS] (in elements) as float32 (head [ROWS, HEAD], tail [ROWS, TAIL]); 0 where masked."""
    at = ptr + offsets[:, None]
    h = tl.load(at + tl.arange(0, HEAD)[None, :], mask=live[:, None], other=0.0)
    t = tl.load(at + HEAD + tl.arange(0, TAIL)[None, :], mask=tail_mask(live, D, HEAD, TAIL), other=0.0)
    return h.to(tl.float32), t.to(tl.float32)


@triton.jit
def load_vector(ptr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """One [D] vector as float32 (head [1, HEAD], tail [1, TAIL]); 0 where masked."""
    tail = HEAD + tl.arange(0, TAIL)[None, :]
    h = tl.load(ptr + tl.arange(0, HEAD)[None, :])
    t = tl.load(ptr + tail, mask=tail < D, other=0.0)
    return h.to(tl.float32), t.to(tl.float32)


@triton.jit
def downcast(value, dtype: tl.constexpr):
    """float32 to dtype, rounding to nearest even."""
    if dtype == tl.float32:
        return value
    elif dtype == tl.float64:
        return value.to(dtype)
    else:
        return value.to(dtype, fp_downcast_rounding="rtne")


@triton.jit
def store_rows(ptr, offsets, live, h, t, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Write float32 rows at ``offsets`` in the pointer's dtype."""
    at = ptr + offsets[:, None]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(at + tl.arange(0, HEAD)[None, :], downcast(h, dtype), mask=live[:, None])
    tail = tail_mask(live, D, HEAD, TAIL)
    tl.store(at + HEAD + tl.arange(0, TAIL)[None, :], downcast(t, dtype), mask=tail)


@triton.jit
def row_scale(h, t):
    """(1/s [ROWS], s [ROWS]) of rows given as (head, tail)."""
    largest = tl.maximum(tl.max(tl.abs(h), 1), tl.max(tl.abs(t), 1))
    largest = tl.maximum(largest, 1e-30)
    return 448.0 / largest, largest * (1 / 448.0)


@triton.jit
def store_quantized(q_ptr, scale_ptr, row, live, h, t, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Write rows [ROWS] (their numbers) of a dense [M, D] in 8 bits, and their scales; see ``fp8.py``."""
    inverse, scale = row_scale(h, t)
    tl.store(scale_ptr + row, scale, mask=live)
    store_rows(q_ptr, row * D, live, h * inverse[:, None], t * inverse[:, None], D, HEAD, TAIL)


@triton.jit
def store_sums(ptr, h, t, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Write one float32 [D] vector given as (head [HEAD], tail [TAIL])."""
    tail = HEAD + tl.arange(0, TAIL)
    tl.store(ptr + tl.arange(0, HEAD), h)
    tl.store(ptr + tail, t, mask=tail < D)


@triton.jit
def row_mean(h, t, D: tl.constexpr):
    """Mean over a row's D elements, [ROWS]; masked elements must be 0."""
    return (tl.sum(h, 1) + tl.sum(t, 1)) / D


@triton.jit
def normalize(h, t, EPS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """(mean [ROWS], rstd [ROWS], normalized head, normalized tail): mean first, then variance about it."""
    mean = row_mean(h, t, D)
    h = h - mean[:, None]
    t = t - mean[:, None]
    if HEAD + TAIL != D:
        t = tl.where((HEAD + tl.arange(0, TAIL) < D)[None, :], t, 0.0)
    rstd = tl.rsqrt(row_mean(h * h, t * t, D) + EPS)
    return mean, rstd, h * rstd[:, None], t * rstd[:, None]


@triton.jit
def normalize_by_root_mean_square(h, t, EPS: tl.constexpr, D: tl.constexpr):
    """(rstd [ROWS], normalized head, normalized tail), with nothing subtracted; masked elements must be 0."""
    rstd = tl.rsqrt(row_mean(h * h, t * t, D) + EPS)
    return rstd, h * rstd[:, None], t * rstd[:, None]


@triton.jit(do_not_specialize=["count", "width"])
def _sum_programs(part_ptr, out_ptr, count, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """out[b, :] = sum over p of part[b, p, :], in the order of p."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([CHUNK, BLOCK], tl.float32)
    for first in range(0, count, CHUNK):
        p = first + tl.arange(0, CHUNK)
        at = (b * count + p[:, None]) * width + cols[None, :]
        total += tl.load(part_ptr + at, mask=(p < count)[:, None] & (cols < width)[None, :], other=0.0)
    out = downcast(tl.sum(total, 0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + b * width + cols, out, mask=cols < width)


def sum_programs(partials: Tensor, sums: Tensor, wrap: Callable[[Any], Any]) -> None:
    """Write the sum over P of partials [B, P, K, D] float32 to sums [B, K, D]."""
    B, P, K, D = partials.shape
    chunk = min(256, 1 << (P - 1).bit_length())
    block = max(16, 2048 // chunk)
    wrap(_sum_programs)[(B, -(-K * D // block))](
        *(partials, sums, P, K * D), CHUNK=chunk, BLOCK=block, num_warps=8 if chunk == 256 else 4
    )


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, which any outer strides allow; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense(vector: Tensor | None) -> Tensor | None:
    """``dense_rows`` for an optional [B, D] or [D]."""
    return None if vector is None else dense_rows(vector)


def given(vector: Tensor | None, other: Tensor) -> Tensor:
    """The vector, or a pointer that a kernel without it never reads."""
    return other if vector is None else vector


def row_stride(vector: Tensor | None) -> int:
    """Elements from one sample's row to the next; 0 for an absent vector."""
    return 0 if vector is None else vector.stride(0)


def direct(kernel: Any) -> Any:
    """The kernel as it is: how eager calls launch it."""
    return kernel


def register(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Make ``launch`` the operator ``opendit::name`` for torch.compile, with ``fake``'s signature; None without triton.

    On a GPU the compiler sees through the operator to the Triton kernel itself. The interpreter cannot be compiled,
    so there the operator is opaque and ``fake`` gives its outputs' shapes.
    """
    if not TRITON_INSTALLED:
        return None
    wrap = direct if INTERPRETING else torch.library.wrap_triton

    @functools.wraps(fake)
    def fn(*args: Any) -> Any:
        return launch(*args, wrap)

    if not INTERPRETING:
        return torch.library.triton_op(f"opendit::{name}", fn, mutates_args=())
    op = torch.library.custom_op(f"opendit::{name}", fn, mutates_args=())
    op.register_fake(fake)
    return op
