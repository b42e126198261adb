"""h = SiLU(a) · b of a packed x = [a | b]: what a gated MLP does between its two linears, in one pass each way.

x [..., 2·F], h [..., F], seen as M rows. SiLU(a) = a · s, s = 1 / (1 + exp(−a)). With dh = d(h), the backward reads dh
and x once and writes both halves of dx:

    da = dh · b · s · (1 + a · (1 − s));  db = dh · a · s
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels._checks import check_tokens, compute_dtype, has_double
from opendit.kernels._rows import direct, downcast, register, tl, triton
from opendit.kernels.backend import INTERPRETING, resolve
from opendit.kernels.spec import KernelSpec

# Rows and columns of h that a program takes, 1024 elements as in `gelu.py`'s forward; the interpreter's time goes into
# programs.
ROWS, COLUMNS = (64, 512) if INTERPRETING else (1, 1024)


def swiglu_reference(x: Tensor) -> Tensor:
    """The specification: float32 inside (float64 if x is), one downcast at the end."""
    a, b = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (F.silu(a) * b).to(x.dtype)


@triton.jit
def _sigmoid(a):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * a))


@triton.jit
def _place(M, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets in h [ROWS, COLUMNS], offsets of a in x, what exists); b is N further than a."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # offsets pass 2**31 elements
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < M)[:, None] & (column < N)[None, :]
    return row[:, None] * N + column[None, :], row[:, None] * (2 * N) + column[None, :], live


@triton.jit
def _load(ptr, at, live):
    return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _swiglu_fwd(x_ptr, h_ptr, M, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at, x_at, live = _place(M, N, ROWS, COLUMNS)
    a = _load(x_ptr, x_at, live)
    b = _load(x_ptr, x_at + N, live)
    tl.store(h_ptr + at, downcast(a * _sigmoid(a) * b, h_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd(dh_ptr, x_ptr, dx_ptr, M, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at, x_at, live = _place(M, N, ROWS, COLUMNS)
    a = _load(x_ptr, x_at, live)
    b = _load(x_ptr, x_at + N, live)
    dh = _load(dh_ptr, at, live)
    s = _sigmoid(a)
    da = dh * b * s * (1 + a * (1 - s))
    tl.store(dx_ptr + x_at, downcast(da, dx_ptr.dtype.element_ty), mask=live)
    tl.store(dx_ptr + x_at + N, downcast(dh * a * s, dx_ptr.dtype.element_ty), mask=live)


def _launch(kernel: Any, like: Tensor, *tensors: Tensor) -> None:
    """`kernel` over all of h, which `like` is shaped as."""
    N = like.shape[-1]
    M = like.numel() // N if N else 0
    if M:
        grid = (-(-M // ROWS), -(-N // COLUMNS))
        kernel[grid](*tensors, M, N=N, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)


def forward_fake(x: Tensor) -> Tensor:
    """h, unwritten, contiguous."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def launch_forward(x: Tensor, wrap: Any = direct) -> Tensor:
    """h, written."""
    h = forward_fake(x)
    _launch(wrap(_swiglu_fwd), h, x.contiguous(), h)
    return h


def backward_fake(dh: Tensor, x: Tensor) -> Tensor:
    """dx, unwritten, contiguous."""
    return x.new_empty(x.shape)


def launch_backward(dh: Tensor, x: Tensor, wrap: Any = direct) -> Tensor:
    """dx, written."""
    dx = backward_fake(dh, x)
    _launch(wrap(_swiglu_bwd), dh, dh.contiguous(), x.contiguous(), dx)
    return dx


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


class _SwiGLU(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch.cuda.device_of(x):  # Triton launches on the current device; autograd sets it itself
            return launch_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        return launch_backward(dh, *ctx.saved_tensors)


forward_op = register("swiglu_forward", launch_forward, forward_fake)
backward_op = register("swiglu_backward", launch_backward, backward_fake)
if forward_op is not None:
    forward_op.register_autograd(lambda ctx, dh: backward_op(dh, *ctx.saved_tensors), setup_context=_save)


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """SiLU(a) · b, where a and b are the first and the second half of x's last dimension.

    Args:
        x: [B, L, 2·F], any floating dtype; a copy is made where it is not contiguous.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        [B, L, F] in x's dtype, contiguous. Arithmetic is float32 (float64 for float64 inputs, which only the reference
        takes), with one rounding at the end. The gradient is bit-identical when repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    check_tokens("swiglu", "x", x)
    if x.shape[2] % 2:
        raise ValueError(f"swiglu: x has shape {tuple(x.shape)}; it must be [B, L, 2·F], two halves of one width")
    # No row is held as a whole, so its width does not matter.
    if resolve(backend, "swiglu", x.device, 1, has_double(x)) == "reference":
        return swiglu_reference(x)
    if torch.compiler.is_compiling():
        return forward_op(x)
    return _SwiGLU.apply(x)


def _upstream(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


SPEC = KernelSpec(
    name="swiglu",
    fn=swiglu,
    reference=swiglu_reference,
    upstream=_upstream,
    inputs={"x": "BL2D"},
    outputs=("gated",),
    backward_moves=("d_gated", "x", "d_x"),
)
