"""residual = x + gate_b · y;  modulated = LayerNorm(residual) · (1 + scale_b) + shift_b, for every token of sample b.

x, y, residual, modulated [B, L, D]; gate, shift, scale [B, D]; weight, bias [D] (the LayerNorm's own, optional);
B batch, L tokens, D hidden. The LayerNorm sees the residual as it is returned, after rounding to its dtype, so this is
exactly ``gate_residual`` followed by ``layernorm_modulate``, in one pass over memory.

With n = (residual − mean) · rstd, a = weight · (1 + scale_b) and dm = d(modulated), the backward is one pass too:

    g  = a · dm
    dr = d(residual) + rstd · (g − mean_D(g) − n · mean_D(g · n))
    dx = dr;  dy = gate · dr;  dgate = Σ_L dr · y;  S0 = Σ_L dm;  S1 = Σ_L dm · n        the sums per sample

Without a mean, these are the kernels of ``gate_residual_rmsnorm_modulate`` too: mean and mean_D(g) are 0 then.

Where a block's backward asks for it, the same pass also gives S = Σ_L dr (Σ_B gate · S is the gradient of a bias that
was added to y), and writes ``modulated`` again, so that the forward need not have kept it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels import gate_residual as gating
from opendit.kernels._checks import (
    check_eps,
    check_out_dtype,
    check_tokens,
    check_vectors,
    has_double,
    promote,
)
from opendit.kernels._rows import (
    UNSPECIALIZED,
    Tile,
    backward_tile,
    dense,
    dense_rows,
    direct,
    downcast,
    forward_tile,
    given,
    load_rows,
    load_vector,
    normalize,
    normalize_by_root_mean_square,
    programs,
    register,
    row_mean,
    row_stride,
    split,
    store_quantized,
    store_rows,
    store_sums,
    sum_programs,
    tl,
    triton,
)
from opendit.kernels.backend import resolve
from opendit.kernels.layernorm_modulate import (
    layernorm_modulate_reference,
    modulation_gradients,
    sums_dtype,
)
from opendit.kernels.spec import KernelSpec


def gate_residual_layernorm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: the two references one after the other."""
    residual = gating.gate_residual_reference(x, y, gate, residual_dtype=residual_dtype)
    out_dtype = out_dtype or promote(x, y, gate, shift, scale)
    return residual, layernorm_modulate_reference(
        residual, shift, scale, weight=weight, bias=bias, eps=eps, out_dtype=out_dtype
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _fused_fwd(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    scale8_ptr,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride,
    shift_stride,
    scale_stride,
    L,
    P,
    walk,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)  # the sample, not the program
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L)

    gate_h, gate_t = load_vector(gate_ptr + b * gate_stride, D, HEAD, TAIL)
    scale_h, scale_t = load_vector(scale_ptr + b * scale_stride, D, HEAD, TAIL)
    c_h, c_t = load_vector(shift_ptr + b * shift_stride, D, HEAD, TAIL)
    a_h, a_t = 1 + scale_h, 1 + scale_t
    if HAS_BIAS:
        bias_h, bias_t = load_vector(bias_ptr, D, HEAD, TAIL)
        c_h, c_t = bias_h * a_h + c_h, bias_t * a_t + c_t
    if HAS_WEIGHT:
        weight_h, weight_t = load_vector(weight_ptr, D, HEAD, TAIL)
        a_h, a_t = weight_h * a_h, weight_t * a_t

    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        live = token < last
        token = token.to(tl.int64)  # offsets pass 2**31 elements
        x_h, x_t = load_rows(x_ptr, b * x_stride_b + token * x_stride_l, live, D, HEAD, TAIL)
        y_h, y_t = load_rows(y_ptr, b * y_stride_b + token * y_stride_l, live, D, HEAD, TAIL)
        row = b * L + token
        dtype: tl.constexpr = residual_ptr.dtype.element_ty
        r_h = downcast(x_h + gate_h * y_h, dtype).to(tl.float32)
        r_t = downcast(x_t + gate_t * y_t, dtype).to(tl.float32)
        store_rows(residual_ptr, row * D, live, r_h, r_t, D, HEAD, TAIL)
        if CENTER:
            mean, rstd, n_h, n_t = normalize(r_h, r_t, EPS, D, HEAD, TAIL)
            tl.store(mean_ptr + row, mean, mask=live)
        else:
            rstd, n_h, n_t = normalize_by_root_mean_square(r_h, r_t, EPS, D)
        tl.store(rstd_ptr + row, rstd, mask=live)
        if QUANTIZE:
            store_quantized(out_ptr, scale8_ptr, row, live, n_h * a_h + c_h, n_t * a_t + c_t, D, HEAD, TAIL)
        else:
            store_rows(out_ptr, row * D, live, n_h * a_h + c_h, n_t * a_t + c_t, D, HEAD, TAIL)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _fused_bwd(
    dr_ptr,
    dm_ptr,
    residual_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    shift_ptr,
    dx_ptr,
    dy_ptr,
    modulated_ptr,
    part_ptr,
    dr_stride_b,
    dr_stride_l,
    dm_stride_b,
    dm_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride,
    scale_stride,
    shift_stride,
    L,
    P,
    walk,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_DR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DY: tl.constexpr,
    WANT_DGATE: tl.constexpr,
    WANT_SUMS: tl.constexpr,
    WANT_SUM: tl.constexpr,
    WANT_MODULATED: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L)

    scale_h, scale_t = load_vector(scale_ptr + b * scale_stride, D, HEAD, TAIL)
    a_h, a_t = 1 + scale_h, 1 + scale_t
    if HAS_WEIGHT:
        weight_h, weight_t = load_vector(weight_ptr, D, HEAD, TAIL)
        a_h, a_t = weight_h * a_h, weight_t * a_t
    gate_h, gate_t = load_vector(gate_ptr + b * gate_stride, D, HEAD, TAIL)
    if WANT_MODULATED:
        shift_h, shift_t = load_vector(shift_ptr + b * shift_stride, D, HEAD, TAIL)

    s0_h = tl.zeros([HEAD], tl.float32)
    s0_t = tl.zeros([TAIL], tl.float32)
    s1_h = tl.zeros([HEAD], tl.float32)
    s1_t = tl.zeros([TAIL], tl.float32)
    dgate_h = tl.zeros([HEAD], tl.float32)
    dgate_t = tl.zeros([TAIL], tl.float32)
    sum_h = tl.zeros([HEAD], tl.float32)
    sum_t = tl.zeros([TAIL], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        live = token < last
        token = token.to(tl.int64)  # offsets pass 2**31 elements
        row = b * L + token
        dm_h, dm_t = load_rows(dm_ptr, b * dm_stride_b + token * dm_stride_l, live, D, HEAD, TAIL)
        r_h, r_t = load_rows(residual_ptr, row * D, live, D, HEAD, TAIL)
        if CENTER:
            mean = tl.load(mean_ptr + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)[:, None]
        if CENTER:
            # Where a tail element does not exist n is not 0, but dm and y are, so no sum sees it.
            n_h, n_t = (r_h - mean) * rstd, (r_t - mean) * rstd
        else:
            n_h, n_t = r_h * rstd, r_t * rstd
        if WANT_SUMS:
            s0_h += tl.sum(dm_h, 0)
            s0_t += tl.sum(dm_t, 0)
            s1_h += tl.sum(dm_h * n_h, 0)
            s1_t += tl.sum(dm_t * n_t, 0)
        g_h, g_t = dm_h * a_h, dm_t * a_t
        g = row_mean(g_h, g_t, D)[:, None] if CENTER else 0.0
        gn = row_mean(g_h * n_h, g_t * n_t, D)[:, None]
        d_h, d_t = rstd * (g_h - g - n_h * gn), rstd * (g_t - g - n_t * gn)
        if HAS_DR:
            dr_h, dr_t = load_rows(dr_ptr, b * dr_stride_b + token * dr_stride_l, live, D, HEAD, TAIL)
            d_h, d_t = d_h + dr_h, d_t + dr_t
        if WANT_DX:
            store_rows(dx_ptr, row * D, live, d_h, d_t, D, HEAD, TAIL)
        if WANT_DY:
            store_rows(dy_ptr, row * D, live, gate_h * d_h, gate_t * d_t, D, HEAD, TAIL)
        if WANT_DGATE:
            y_h, y_t = load_rows(y_ptr, b * y_stride_b + token * y_stride_l, live, D, HEAD, TAIL)
            dgate_h += tl.sum(d_h * y_h, 0)
            dgate_t += tl.sum(d_t * y_t, 0)
        if WANT_SUM:
            sum_h += tl.sum(d_h, 0)
            sum_t += tl.sum(d_t, 0)
        if WANT_MODULATED:
            store_rows(modulated_ptr, row * D, live, n_h * a_h + shift_h, n_t * a_t + shift_t, D, HEAD, TAIL)
    part = part_ptr + pid.to(tl.int64) * (2 * WANT_SUMS + WANT_DGATE + WANT_SUM) * D
    if WANT_DGATE:
        store_sums(part, dgate_h, dgate_t, D, HEAD, TAIL)
        part += D
    if WANT_SUMS:
        store_sums(part, s0_h, s0_t, D, HEAD, TAIL)
        store_sums(part + D, s1_h, s1_t, D, HEAD, TAIL)
        part += 2 * D
    if WANT_SUM:
        store_sums(part, sum_h, sum_t, D, HEAD, TAIL)


def forward_fake(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward's outputs, unwritten: residual, modulated [B, L, D]; mean, rstd [B, L] float32.

    Without ``center`` no mean is subtracted (RMSNorm), and mean is empty.
    """
    B, L, _ = x.shape
    mean, rstd = (x.new_empty((B, n), dtype=torch.float32) for n in (L if center else 0, L))
    residual = gating.forward_fake(x, y, gate, residual_dtype)
    return residual, x.new_empty(x.shape, dtype=out_dtype), mean, rstd


def launch_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool = True,
    residual_dtype: torch.dtype | None = None,
    wrap: Any = direct,
    tile: Tile | None = None,
    *,
    scale8: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``forward_fake``'s outputs, written.

    scale8: B·L float32 for the scales of rows that are written in 8 bits (``fp8.py``), where out_dtype is such.
    """
    outputs = forward_fake(x, y, gate, shift, scale, weight, bias, eps, out_dtype, center, residual_dtype)
    if x.numel() == 0:
        return outputs
    x, y, gate, shift, scale = map(dense_rows, (x, y, gate, shift, scale))
    weight, bias = dense(weight), dense(bias)
    B, L, D = x.shape
    tile = tile or forward_tile(x, y, quantize=scale8 is not None)
    P, walk = programs(B, L, tile)
    HEAD, TAIL = split(D)
    wrap(_fused_fwd)[(B * P,)](
        *(x, y, gate, shift, scale, given(weight, x), given(bias, x), *outputs, given(scale8, x)),
        *(x.stride(0), x.stride(1), y.stride(0), y.stride(1)),
        *(gate.stride(0), shift.stride(0), scale.stride(0), L, P, walk),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        ROWS=tile.rows,
        STAGES=tile.stages,
        EPS=eps,
        CENTER=center,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        QUANTIZE=scale8 is not None,
        num_warps=tile.warps,
    )
    return outputs


def backward_fake(
    dr: Tensor | None,
    dm: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    sums_dtype: torch.dtype,
    want: list[bool],
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward's outputs, unwritten: dx, dy [B, L, D]; sums [B, K, D] = (dgate, S0, S1). Empty where not wanted.

    ``want`` says whether dx, dy, dgate and (S0, S1) are; K counts the sums that are.
    """
    want_dx, want_dy, want_dgate, want_sums = want
    B, _, D = residual.shape
    return (
        residual.new_empty(residual.shape if want_dx else (0,), dtype=x_dtype),
        y.new_empty(y.shape if want_dy else (0,)),
        residual.new_empty((B, 2 * want_sums + want_dgate, D), dtype=sums_dtype),
    )


def launch_backward(
    dr: Tensor | None,
    dm: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    sums_dtype: torch.dtype,
    want: list[bool],
    center: bool = True,
    wrap: Any = direct,
    tile: Tile | None = None,
    *,
    want_sum: bool = False,
    shift: Tensor | None = None,
    modulated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward_fake``'s outputs, written.

    want_sum: append S to the sums. modulated: [B, L, D], contiguous, where to write the forward's output again; that
    needs ``shift``, and a LayerNorm without a bias.
    """
    fixed = (x_dtype, sums_dtype, want, center)
    dx, dy, sums = backward_fake(dr, dm, residual, y, gate, scale, weight, mean, rstd, *fixed)
    if want_sum:
        sums = sums.new_empty((sums.shape[0], sums.shape[1] + 1, sums.shape[2]))
    if residual.numel() == 0:
        return dx, dy, sums.zero_()
    dm, y, gate, scale = map(dense_rows, (dm, y, gate, scale))
    dr, weight, shift = dense(dr), dense(weight), dense(shift)
    at_dr = dm if dr is None else dr
    B, L, D = residual.shape
    tile = tile or backward_tile(at_dr, dm, residual, y)
    P, walk = programs(B, L, tile)
    HEAD, TAIL = split(D)
    K = sums.shape[1]
    partials = residual.new_empty((B, P, K, D), dtype=torch.float32)
    want_dx, want_dy, want_dgate, want_sums = want
    wrap(_fused_bwd)[(B * P,)](
        *(at_dr, dm, residual, y, gate, scale, given(weight, y), mean, rstd, given(shift, y)),
        *(dx, dy, given(modulated, y), partials),
        *(at_dr.stride(0), at_dr.stride(1), dm.stride(0), dm.stride(1), y.stride(0), y.stride(1)),
        *(gate.stride(0), scale.stride(0), row_stride(shift), L, P, walk),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        ROWS=tile.rows,
        STAGES=tile.stages,
        CENTER=center,
        HAS_DR=dr is not None,
        HAS_WEIGHT=weight is not None,
        WANT_DX=want_dx,
        WANT_DY=want_dy,
        WANT_DGATE=want_dgate,
        WANT_SUMS=want_sums,
        WANT_SUM=want_sum,
        WANT_MODULATED=modulated is not None,
        num_warps=tile.warps,
    )
    if K:
        sum_programs(partials, sums, wrap)
    return dx, dy, sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gate, shift, scale, weight, bias, _, _, ctx.center, _ = inputs
    residual, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # a gradient that is not there need not be read
    ctx.save_for_backward(residual, y, gate, scale, weight, bias, mean, rstd)
    ctx.x_dtype, ctx.shift_dtype = x.dtype, shift.dtype
    dtype = sums_dtype(shift, scale, weight, bias)
    ctx.sums_dtype = dtype if dtype is gate.dtype else torch.float32


def _gradients(ctx: Any, dr: Tensor | None, dm: Tensor | None, launch: Any, launch_gating: Any) -> tuple[Any, ...]:
    residual, y, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
    want_dx, want_dy, want_dgate, *rest = ctx.needs_input_grad[:7]
    if dm is None:  # the modulated output is unused: what is left is gate_residual's backward
        dx = dr.to(ctx.x_dtype) if dr is not None and want_dx else None
        dy, dgate = None, None
        if dr is not None and (want_dy or want_dgate):
            dy, dgate = launch_gating(dr, y, gate, want_dy, want_dgate)
        return dx, dy if want_dy else None, dgate if want_dgate else None, *(None,) * 8
    want = [want_dx, want_dy, want_dgate, any(rest)]
    fixed = (ctx.x_dtype, ctx.sums_dtype, want, ctx.center)
    dx, dy, sums = launch(dr, dm, residual, y, gate, scale, weight, mean, rstd, *fixed)
    small: tuple[Tensor | None, ...] = (None,) * 4
    if any(rest):
        small = modulation_gradients(sums[:, want_dgate:], ctx.shift_dtype, scale, weight, bias)
    return (
        dx if want_dx else None,
        dy if want_dy else None,
        sums[:, 0].to(gate.dtype) if want_dgate else None,
        *small,
        *(None,) * 4,
    )


class _GateResidualLayerNormModulate(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device; autograd sets it itself
            output = launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dr: Tensor | None, dm: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, dr, dm, launch_backward, gating.launch_backward)


forward_op = register("gate_residual_layernorm_modulate_forward", launch_forward, forward_fake)
backward_op = register("gate_residual_layernorm_modulate_backward", launch_backward, backward_fake)
if forward_op is not None:
    forward_op.register_autograd(
        lambda ctx, dr, dm, *_: _gradients(ctx, dr, dm, backward_op, gating.backward_op), setup_context=_save
    )


def apply(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The Triton path: `launch_forward`'s inputs up to residual_dtype, to (residual, modulated)."""
    if torch.compiler.is_compiling():
        residual, modulated, _, _ = forward_op(*inputs)
        return residual, modulated
    return _GateResidualLayerNormModulate.apply(*inputs)


def gate_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(residual, modulated) = (x + gate · y, LayerNorm(residual) · (1 + scale) + shift).

    Args:
        x, y: [B, L, D], any floating dtypes. Outer strides may be anything; a last stride other than 1 costs a copy,
            of an incoming gradient too.
        gate, shift, scale: [B, D], any floating dtype, read in place (chunks of one [B, 6·D] tensor, or expanded).
        weight, bias: [D], the LayerNorm's own affine parameters, if it has them.
        eps: added to the variance.
        out_dtype: modulated's dtype; by default what x, y, gate, shift and scale promote to.
        residual_dtype: the residual's dtype; by default what x, y and gate promote to.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        Two [B, L, D], contiguous. A float32 x with bfloat16 y and gate stays float32 unless told otherwise. Statistics
        and arithmetic are float32 (float64 for float64 inputs, which only the reference takes), with one rounding per
        output. Gradients have their input's dtype and shape and are bit-identical when repeated. Either output may go
        unused. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "gate_residual_layernorm_modulate"
    check_tokens(name, "x", x)
    check_tokens(name, "y", y, like=x)
    B, _, D = x.shape
    check_vectors(name, x, (B, D), required=True, gate=gate, shift=shift, scale=scale)
    if weight is not None or bias is not None:
        check_vectors(name, x, (D,), weight=weight, bias=bias)
    check_eps(name, eps)
    check_out_dtype(name, out_dtype)
    check_out_dtype(name, residual_dtype, "residual_dtype")
    double = has_double(x, y, gate, shift, scale, weight, bias)
    if resolve(backend, name, x.device, D, double) == "reference":
        return gate_residual_layernorm_modulate_reference(
            x,
            y,
            gate,
            shift,
            scale,
            weight=weight,
            bias=bias,
            eps=eps,
            out_dtype=out_dtype,
            residual_dtype=residual_dtype,
        )
    out_dtype = out_dtype or promote(x, y, gate, shift, scale)
    return apply(x, y, gate, shift, scale, weight, bias, eps, out_dtype, True, residual_dtype)


def _upstream(x, y, gate, shift, scale, *, weight=None, bias=None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    residual = gating.SPEC.upstream(x, y, gate)
    normalized = torch.nn.functional.layer_norm(residual, residual.shape[-1:], weight, bias, eps)
    return residual, normalized * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


SPEC = KernelSpec(
    name="gate_residual_layernorm_modulate",
    fn=gate_residual_layernorm_modulate,
    reference=gate_residual_layernorm_modulate_reference,
    upstream=_upstream,
    inputs={
        "x": "BLD",
        "y": "BLD",
        "gate": "BD",
        "shift": "BD",
        "scale": "BD",
        "weight": "D?",
        "bias": "D?",
    },
    outputs=("residual", "modulated"),
    backward_moves=("d_residual", "d_modulated", "residual", "y", "d_x", "d_y"),
)
