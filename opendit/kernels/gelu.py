"""h = GELU(x), elementwise: x · Φ(x), or its usual approximation x · σ(2u), u = √(2/π) · (x + 0.044715 · x³).

x, h [..., N], seen as M rows of N. With dh = d(h), the backward reads dh and x once:

    dx = dh · GELU'(x);  S = Σ_M dx        S is the gradient of a bias that was added to x
    GELU' = Φ(x) + x · φ(x),  or  s + x · s · (1 − s) · 2u',  s = σ(2u),  2u' = 2·√(2/π) · (1 + 3 · 0.044715 · x²)

Where a block's backward asks for it, the same pass writes h again, so that the forward need not have kept it. The tanh
of the usual formula is written as a logistic function, 1 + tanh(u) = 2σ(2u): one exponential.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels._checks import check_tokens, compute_dtype, has_double
from opendit.kernels._rows import direct, downcast, register, sum_programs, tl, triton
from opendit.kernels.backend import INTERPRETING, resolve
from opendit.kernels.spec import KernelSpec

APPROXIMATIONS = ("none", "tanh")


def gelu_reference(x: Tensor, *, approximate: str = "tanh") -> Tensor:
    """The specification: float32 inside (float64 if x is), one downcast at the end."""
    return F.gelu(x.to(compute_dtype(x)), approximate=approximate).to(x.dtype)


@dataclass(frozen=True)
class Tile:
    """How the backward is launched: rows and columns held at once, row programs in all, warps, prefetch depth."""

    rows: int
    columns: int
    programs: int
    warps: int
    stages: int


# Elements that a forward program takes, and the backward's launch, as measured on Hopper. The interpreter's time goes
# into programs, not into elements.
FORWARD_BLOCK = 16384 if INTERPRETING else 1024
BACKWARD = Tile(64, 512, 4, 4, 1) if INTERPRETING else Tile(1, 512, 2304, 2, 2)


@triton.jit
def _share(x, TANH: tl.constexpr):
    """What part of x passes, Φ(x) or its approximation."""
    if TANH:
        twice_u = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * twice_u))
    else:
        return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)


@triton.jit
def _slope(x, s, TANH: tl.constexpr):
    """GELU'(x), where s is `_share` of x."""
    if TANH:
        return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        return s + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _gelu_fwd(x_ptr, h_ptr, elements, BLOCK: tl.constexpr, TANH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # offsets pass 2**31 elements
    live = at < elements
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, downcast(x * _share(x, TANH), h_ptr.dtype.element_ty), mask=live)


@triton.jit
def _gelu_bwd_flat(
    dh_ptr, x_ptr, dx_ptr, h_ptr, elements, BLOCK: tl.constexpr, TANH: tl.constexpr, WANT_H: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # offsets pass 2**31 elements
    live = at < elements
    dh = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    s = _share(x, TANH)
    tl.store(dx_ptr + at, downcast(dh * _slope(x, s, TANH), dx_ptr.dtype.element_ty), mask=live)
    if WANT_H:
        tl.store(h_ptr + at, downcast(x * s, h_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M", "walk"])
def _gelu_bwd_sums(
    dh_ptr,
    x_ptr,
    dx_ptr,
    h_ptr,
    part_ptr,
    M,
    walk,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    TANH: tl.constexpr,
    WANT_H: tl.constexpr,
):
    """One program takes COLUMNS columns of a run of rows, so that it can sum dx over them in registers."""
    blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    run = (tl.program_id(0) // blocks).to(tl.int64)
    first = run * walk
    last = tl.minimum(first + walk, M)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = (row < last)[:, None] & (column < N)[None, :]
        at = row[:, None] * N + column[None, :]  # 64-bit, as start is
        dh = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        s = _share(x, TANH)
        dx = dh * _slope(x, s, TANH)
        tl.store(dx_ptr + at, downcast(dx, dx_ptr.dtype.element_ty), mask=live)
        if WANT_H:
            tl.store(h_ptr + at, downcast(x * s, h_ptr.dtype.element_ty), mask=live)
        total += tl.sum(dx, 0)
    tl.store(part_ptr + run * N + column, total, mask=column < N)


def forward_fake(x: Tensor, tanh: bool) -> Tensor:
    """h, unwritten, contiguous."""
    return x.new_empty(x.shape)


def launch_forward(x: Tensor, tanh: bool, wrap: Any = direct) -> Tensor:
    """h, written."""
    h = forward_fake(x, tanh)
    if x.numel():
        grid = (-(-x.numel() // FORWARD_BLOCK),)
        wrap(_gelu_fwd)[grid](x.contiguous(), h, x.numel(), BLOCK=FORWARD_BLOCK, TANH=tanh, num_warps=4)
    return h


def backward_fake(dh: Tensor, x: Tensor, tanh: bool) -> Tensor:
    """dx, unwritten, contiguous."""
    return x.new_empty(x.shape)


def launch_backward(dh: Tensor, x: Tensor, tanh: bool, wrap: Any = direct) -> Tensor:
    """dx, written."""
    dx = backward_fake(dh, x, tanh)
    launch_backward_into(dh, x, tanh, dx, None, None, wrap)
    return dx


def launch_backward_into(
    dh: Tensor,
    x: Tensor,
    tanh: bool,
    dx: Tensor,
    h: Tensor | None,
    total: Tensor | None,
    wrap: Any = direct,
    tile: Tile = BACKWARD,
) -> None:
    """Write dx, h (the forward's output again) and total [N] (S), where given; dx and h are contiguous, shaped as x."""
    if x.numel() == 0:
        if total is not None:
            total.zero_()
        return
    dh, x = dh.contiguous(), x.contiguous()
    if total is None:
        grid = (-(-x.numel() // FORWARD_BLOCK),)
        tensors = dh, x, dx, x if h is None else h
        wrap(_gelu_bwd_flat)[grid](
            *tensors, x.numel(), BLOCK=FORWARD_BLOCK, TANH=tanh, WANT_H=h is not None, num_warps=4
        )
        return
    N = x.shape[-1]
    M = x.numel() // N
    blocks = -(-N // tile.columns)
    walk = -(-M // max(tile.programs // blocks, 1))
    P = -(-M // walk)
    partials = x.new_empty((1, P, 1, N), dtype=torch.float32)
    wrap(_gelu_bwd_sums)[(blocks * P,)](
        *(dh, x, dx, x if h is None else h, partials, M, walk),
        N=N,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STAGES=tile.stages,
        TANH=tanh,
        WANT_H=h is not None,
        num_warps=tile.warps,
    )
    sum_programs(partials, total.view(1, 1, N), wrap)


class _GELU(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        with torch.cuda.device_of(x):  # Triton launches on the current device; autograd sets it itself
            return launch_forward(x, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return launch_backward(dh, x, ctx.tanh), None


forward_op = register("gelu_forward", launch_forward, forward_fake)
backward_op = register("gelu_backward", launch_backward, backward_fake)
if forward_op is not None:

    def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.tanh = inputs[1]

    forward_op.register_autograd(
        lambda ctx, dh: (backward_op(dh, *ctx.saved_tensors, ctx.tanh), None), setup_context=_save
    )


def gelu(x: Tensor, *, approximate: str = "tanh", backend: str = "auto") -> Tensor:
    """GELU of every element.

    Args:
        x: [B, L, D], any floating dtype; a copy is made where it is not contiguous.
        approximate: "tanh" (the approximation) or "none" (exact), as in ``torch.nn.GELU``.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        x's shape and dtype, contiguous. Arithmetic is float32 (float64 for float64 inputs, which only the reference
        takes), with one rounding at the end. The gradient is bit-identical when repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    check_tokens("gelu", "x", x)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate is {approximate!r}; allowed are {', '.join(map(repr, APPROXIMATIONS))}")
    # No row is held as a whole, so its width does not matter.
    if resolve(backend, "gelu", x.device, 1, has_double(x)) == "reference":
        return gelu_reference(x, approximate=approximate)
    if torch.compiler.is_compiling():
        return forward_op(x, approximate == "tanh")
    return _GELU.apply(x, approximate == "tanh")


def _upstream(x: Tensor, *, approximate: str = "tanh") -> Tensor:
    return F.gelu(x, approximate=approximate)


SPEC = KernelSpec(
    name="gelu",
    fn=gelu,
    reference=gelu_reference,
    upstream=_upstream,
    inputs={"x": "BLD"},
    outputs=("activated",),
    backward_moves=("d_activated", "x", "d_x"),
)
