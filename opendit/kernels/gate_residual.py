"""residual = x + gate_b · y, for every token of sample b.

x, y, residual [B, L, D]; gate [B, D]; B batch, L tokens, D hidden. With dr = d(residual), the backward is

    dx = dr;  dy = gate · dr;  dgate = Σ_L dr · y,  S = Σ_L dr        per sample

Σ_B gate · S is the gradient of a bias that was added to y.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels._checks import check_out_dtype, check_tokens, check_vectors, compute_dtype, has_double, promote
from opendit.kernels._rows import (
    UNSPECIALIZED,
    Tile,
    backward_tile,
    dense_rows,
    direct,
    downcast,
    load_rows,
    load_vector,
    programs,
    register,
    split,
    store_rows,
    store_sums,
    sum_programs,
    tl,
    triton,
)
from opendit.kernels.backend import INTERPRETING, resolve
from opendit.kernels.spec import KernelSpec


def forward_block(itemsize: int) -> tuple[int, int]:
    """(elements, warps) of a forward program where x has ``itemsize`` bytes an element: 8 elements a lane."""
    if INTERPRETING:  # its time goes into programs, not into elements
        return 16384, 4
    return (1024, 4) if itemsize > 2 else (2048, 8)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor, *, residual_dtype: torch.dtype | None = None) -> Tensor:
    """The specification: float32 inside (float64 if any input is), one downcast at the end."""
    dtype = compute_dtype(x, y, gate)
    out = torch.addcmul(x.to(dtype), gate.to(dtype).unsqueeze(1), y.to(dtype))
    return out.to(residual_dtype or promote(x, y, gate))


@triton.jit(do_not_specialize=["P"])  # a mask on a count of unknown divisibility would split the 16-byte accesses
def _gate_residual_fwd(
    x_ptr,
    y_ptr,
    gate_ptr,
    residual_ptr,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride,
    elements,
    P,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
):
    """No row is needed as a whole, so a sample is cut into equal runs of its L·D elements, wherever rows end."""
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)  # the sample, not the program
    start = (pid % P).to(tl.int64) * BLOCK  # offsets pass 2**31 elements
    live = start + tl.arange(0, BLOCK) < elements
    first = (start % D).to(tl.int32) + tl.arange(0, BLOCK)
    column = first % D
    if DENSE:
        x_at = b * x_stride_b + start + tl.arange(0, BLOCK)
        y_at = b * y_stride_b + start + tl.arange(0, BLOCK)
    else:
        row = start // D + first // D
        x_at = b * x_stride_b + row * x_stride_l + column
        y_at = b * y_stride_b + row * y_stride_l + column
    x = tl.load(x_ptr + x_at, mask=live, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + y_at, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_stride + column).to(tl.float32)
    residual = downcast(x + gate * y, residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + b * elements + start + tl.arange(0, BLOCK), residual, mask=live)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gate_residual_bwd(
    dr_ptr,
    y_ptr,
    gate_ptr,
    dy_ptr,
    part_ptr,
    dr_stride_b,
    dr_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride,
    L,
    P,
    walk,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WANT_DY: tl.constexpr,
    WANT_DGATE: tl.constexpr,
    WANT_SUM: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L)
    gate_h, gate_t = load_vector(gate_ptr + b * gate_stride, D, HEAD, TAIL)
    dgate_h = tl.zeros([HEAD], tl.float32)
    dgate_t = tl.zeros([TAIL], tl.float32)
    sum_h = tl.zeros([HEAD], tl.float32)
    sum_t = tl.zeros([TAIL], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        live = token < last
        token = token.to(tl.int64)  # offsets pass 2**31 elements
        dr_h, dr_t = load_rows(dr_ptr, b * dr_stride_b + token * dr_stride_l, live, D, HEAD, TAIL)
        if WANT_DGATE:
            y_h, y_t = load_rows(y_ptr, b * y_stride_b + token * y_stride_l, live, D, HEAD, TAIL)
            dgate_h += tl.sum(dr_h * y_h, 0)
            dgate_t += tl.sum(dr_t * y_t, 0)
        if WANT_DY:
            store_rows(dy_ptr, (b * L + token) * D, live, gate_h * dr_h, gate_t * dr_t, D, HEAD, TAIL)
        if WANT_SUM:
            sum_h += tl.sum(dr_h, 0)
            sum_t += tl.sum(dr_t, 0)
    part = part_ptr + pid.to(tl.int64) * (WANT_DGATE + WANT_SUM) * D
    if WANT_DGATE:
        store_sums(part, dgate_h, dgate_t, D, HEAD, TAIL)
        part += D
    if WANT_SUM:
        store_sums(part, sum_h, sum_t, D, HEAD, TAIL)


def forward_fake(x: Tensor, y: Tensor, gate: Tensor, residual_dtype: torch.dtype | None) -> Tensor:
    """The residual [B, L, D], unwritten."""
    return x.new_empty(x.shape, dtype=residual_dtype or promote(x, y, gate))


def launch_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    residual_dtype: torch.dtype | None = None,
    wrap: Any = direct,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """The residual, written, to memory that is given or new."""
    residual = forward_fake(x, y, gate, residual_dtype) if residual is None else residual
    if x.numel() == 0:
        return residual
    x, y, gate = dense_rows(x), dense_rows(y), dense_rows(gate)
    B, L, D = x.shape
    block, warps = forward_block(x.element_size())
    P = -(-L * D // block)
    wrap(_gate_residual_fwd)[(B * P,)](
        *(x, y, gate, residual),
        *(x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), L * D, P),
        D=D,
        BLOCK=block,
        DENSE=x.stride(1) == D and y.stride(1) == D,
        num_warps=warps,
    )
    return residual


def backward_fake(dr: Tensor, y: Tensor, gate: Tensor, want_dy: bool, want_dgate: bool) -> tuple[Tensor, Tensor]:
    """The backward's outputs, unwritten: dy [B, L, D]; dgate [B, D]. What is not wanted is empty."""
    return y.new_empty(y.shape if want_dy else (0,)), gate.new_empty(gate.shape if want_dgate else (0,))


def launch_backward(
    dr: Tensor, y: Tensor, gate: Tensor, want_dy: bool, want_dgate: bool, wrap: Any = direct, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """``backward_fake``'s outputs, written."""
    dy, dgate = backward_fake(dr, y, gate, want_dy, want_dgate)
    sums = dgate.unsqueeze(1) if want_dgate else dgate.new_empty((len(dr), 0, dr.shape[2]))
    launch_backward_sums(dr, y, gate, dy, sums, want_dgate, wrap, tile)
    return dy, dgate


def launch_backward_sums(
    dr: Tensor,
    y: Tensor,
    gate: Tensor,
    dy: Tensor,
    sums: Tensor,
    want_dgate: bool,
    wrap: Any = direct,
    tile: Tile | None = None,
) -> None:
    """Write dy, unless it is empty, and sums [B, K, D] = (dgate if wanted, S if K has room for it)."""
    if dr.numel() == 0:
        sums.zero_()
        return
    dr, y, gate = dense_rows(dr), dense_rows(y), dense_rows(gate)
    B, L, D = dr.shape
    tile = tile or backward_tile(dr, y)
    P, walk = programs(B, L, tile)
    HEAD, TAIL = split(D)
    K = sums.shape[1]
    partials = dr.new_empty((B, P, K, D), dtype=torch.float32)
    wrap(_gate_residual_bwd)[(B * P,)](
        *(dr, y, gate, dy, partials),
        *(dr.stride(0), dr.stride(1), y.stride(0), y.stride(1), gate.stride(0), L, P, walk),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        ROWS=tile.rows,
        STAGES=tile.stages,
        WANT_DY=dy.numel() > 0,
        WANT_DGATE=want_dgate,
        WANT_SUM=want_dgate < K,
        num_warps=tile.warps,
    )
    if K:
        sum_programs(partials, sums, wrap)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gate, _ = inputs
    ctx.save_for_backward(y, gate)
    ctx.x_dtype = x.dtype


def _gradients(ctx: Any, dr: Tensor, launch: Any) -> tuple[Tensor | None, ...]:
    y, gate = ctx.saved_tensors
    want_dx, want_dy, want_dgate, _ = ctx.needs_input_grad
    dx = dr.to(ctx.x_dtype) if want_dx else None
    if not (want_dy or want_dgate):
        return dx, None, None, None
    dy, dgate = launch(dr, y, gate, want_dy, want_dgate)
    return dx, dy if want_dy else None, dgate if want_dgate else None, None


class _GateResidual(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device; autograd sets it itself
            residual = launch_forward(*inputs)
        _save(ctx, inputs, residual)
        return residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dr: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dr, launch_backward)


forward_op = register("gate_residual_forward", launch_forward, forward_fake)
backward_op = register("gate_residual_backward", launch_backward, backward_fake)
if forward_op is not None:
    forward_op.register_autograd(lambda ctx, dr: _gradients(ctx, dr, backward_op), setup_context=_save)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor, *, residual_dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """x + gate · y, each sample with its own row of gate.

    Args:
        x, y: [B, L, D], any floating dtypes. Outer strides may be anything; a last stride other than 1 costs a copy.
        gate: [B, D], any floating dtype, read in place (a chunk of a [B, 6·D] tensor, or expanded).
        residual_dtype: the result's dtype; by default what the three promote to.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        [B, L, D], contiguous; by default a float32 x with bfloat16 y and gate stays float32. Arithmetic is float32
        (float64 for float64 inputs, which only the reference takes), with one rounding at the end. Gradients have their
        input's dtype and shape and are bit-identical when repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "gate_residual"
    check_tokens(name, "x", x)
    check_tokens(name, "y", y, like=x)
    B, _, D = x.shape
    check_vectors(name, x, (B, D), required=True, gate=gate)
    check_out_dtype(name, residual_dtype, "residual_dtype")
    if resolve(backend, name, x.device, D, has_double(x, y, gate)) == "reference":
        return gate_residual_reference(x, y, gate, residual_dtype=residual_dtype)
    if torch.compiler.is_compiling():
        return forward_op(x, y, gate, residual_dtype)
    return _GateResidual.apply(x, y, gate, residual_dtype)


def _upstream(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * y


SPEC = KernelSpec(
    name="gate_residual",
    fn=gate_residual,
    reference=gate_residual_reference,
    upstream=_upstream,
    inputs={"x": "BLD", "y": "BLD", "gate": "BD"},
    outputs=("residual",),
    backward_moves=("d_residual", "y", "d_y"),
)
