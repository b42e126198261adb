"""out = LayerNorm(x) · (1 + scale_b) + shift_b, for every token of sample b.

x, out [B, L, D]; shift, scale [B, D]; weight, bias [D] (the LayerNorm's own, optional); B batch, L tokens, D hidden.

With n = (x − mean) · rstd, a = weight · (1 + scale_b) and do = d(out), the backward reads x and do once:

    g  = a · do
    dx = rstd · (g − mean_D(g) − n · mean_D(g · n))
    S0 = Σ_L do,  S1 = Σ_L do · n           per sample; every other gradient is a small combination of these two
    dshift = S0;  dscale = weight · S1 + bias · S0
    dweight = Σ_b (1 + scale_b) · S1;  dbias = Σ_b (1 + scale_b) · S0

Without a mean, these are the kernels of ``rmsnorm_modulate`` too: mean and mean_D(g) are 0 then.

Where a block's backward asks for it, the same pass adds the residual stream's gradient to dx, and writes ``out`` again,
so that the forward need not have kept it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels._checks import (
    check_eps,
    check_out_dtype,
    check_tokens,
    check_vectors,
    compute_dtype,
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
from opendit.kernels.spec import KernelSpec


def layernorm_modulate_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification: float32 inside (float64 if any input is), one downcast at the end."""
    dtype = compute_dtype(x, shift, scale, weight, bias)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    normalized = F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    out = torch.addcmul(shift.to(dtype).unsqueeze(1), normalized, 1 + scale.to(dtype).unsqueeze(1))
    return out.to(out_dtype or promote(x, shift, scale))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _layernorm_modulate_fwd(
    x_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    scale8_ptr,
    x_stride_b,
    x_stride_l,
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
    HAS_MODULATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)  # the sample, not the program
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L)

    # out = n·a + c: one multiply-add per element, whatever affine and modulation there are.
    a_h = tl.full([1, HEAD], 1.0, tl.float32)
    a_t = tl.full([1, TAIL], 1.0, tl.float32)
    c_h = tl.zeros([1, HEAD], tl.float32)
    c_t = tl.zeros([1, TAIL], tl.float32)
    if HAS_WEIGHT:
        a_h, a_t = load_vector(weight_ptr, D, HEAD, TAIL)
    if HAS_BIAS:
        c_h, c_t = load_vector(bias_ptr, D, HEAD, TAIL)
    if HAS_MODULATION:
        scale_h, scale_t = load_vector(scale_ptr + b * scale_stride, D, HEAD, TAIL)
        shift_h, shift_t = load_vector(shift_ptr + b * shift_stride, D, HEAD, TAIL)
        a_h, a_t = a_h * (1 + scale_h), a_t * (1 + scale_t)
        c_h, c_t = c_h * (1 + scale_h) + shift_h, c_t * (1 + scale_t) + shift_t

    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        live = token < last
        token = token.to(tl.int64)  # offsets pass 2**31 elements
        x_h, x_t = load_rows(x_ptr, b * x_stride_b + token * x_stride_l, live, D, HEAD, TAIL)
        if CENTER:
            mean, rstd, n_h, n_t = normalize(x_h, x_t, EPS, D, HEAD, TAIL)
        else:
            rstd, n_h, n_t = normalize_by_root_mean_square(x_h, x_t, EPS, D)
        row = b * L + token
        if CENTER:
            tl.store(mean_ptr + row, mean, mask=live)
        tl.store(rstd_ptr + row, rstd, mask=live)
        if QUANTIZE:
            store_quantized(out_ptr, scale8_ptr, row, live, n_h * a_h + c_h, n_t * a_t + c_t, D, HEAD, TAIL)
        else:
            store_rows(out_ptr, row * D, live, n_h * a_h + c_h, n_t * a_t + c_t, D, HEAD, TAIL)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _layernorm_modulate_bwd(
    dout_ptr,
    x_ptr,
    scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dr_ptr,
    shift_ptr,
    dx_ptr,
    out_ptr,
    part_ptr,
    dout_stride_b,
    dout_stride_l,
    x_stride_b,
    x_stride_l,
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
    HAS_MODULATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DR: tl.constexpr,
    WANT_OUT: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_SUMS: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // P).to(tl.int64)
    first = (pid % P) * walk
    last = tl.minimum(first + walk, L)

    a_h = tl.full([1, HEAD], 1.0, tl.float32)
    a_t = tl.full([1, TAIL], 1.0, tl.float32)
    if HAS_WEIGHT:
        a_h, a_t = load_vector(weight_ptr, D, HEAD, TAIL)
    if HAS_MODULATION:
        scale_h, scale_t = load_vector(scale_ptr + b * scale_stride, D, HEAD, TAIL)
        a_h, a_t = a_h * (1 + scale_h), a_t * (1 + scale_t)
    if WANT_OUT:
        shift_h, shift_t = load_vector(shift_ptr + b * shift_stride, D, HEAD, TAIL)

    s0_h = tl.zeros([HEAD], tl.float32)
    s0_t = tl.zeros([TAIL], tl.float32)
    s1_h = tl.zeros([HEAD], tl.float32)
    s1_t = tl.zeros([TAIL], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        live = token < last
        token = token.to(tl.int64)  # offsets pass 2**31 elements
        row = b * L + token
        do_h, do_t = load_rows(dout_ptr, b * dout_stride_b + token * dout_stride_l, live, D, HEAD, TAIL)
        x_h, x_t = load_rows(x_ptr, b * x_stride_b + token * x_stride_l, live, D, HEAD, TAIL)
        if CENTER:
            mean = tl.load(mean_ptr + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)[:, None]
        if CENTER:
            # Where a tail element does not exist n is not 0, but do is, so no sum sees it.
            n_h, n_t = (x_h - mean) * rstd, (x_t - mean) * rstd
        else:
            n_h, n_t = x_h * rstd, x_t * rstd
        if WANT_SUMS:
            s0_h += tl.sum(do_h, 0)
            s0_t += tl.sum(do_t, 0)
            s1_h += tl.sum(do_h * n_h, 0)
            s1_t += tl.sum(do_t * n_t, 0)
        if WANT_DX:
            g_h, g_t = do_h * a_h, do_t * a_t
            g = row_mean(g_h, g_t, D)[:, None] if CENTER else 0.0
            gn = row_mean(g_h * n_h, g_t * n_t, D)[:, None]
            dx_h, dx_t = rstd * (g_h - g - n_h * gn), rstd * (g_t - g - n_t * gn)
            if HAS_DR:
                dr_h, dr_t = load_rows(dr_ptr, row * D, live, D, HEAD, TAIL)
                dx_h, dx_t = dx_h + dr_h, dx_t + dr_t
            store_rows(dx_ptr, row * D, live, dx_h, dx_t, D, HEAD, TAIL)
        if WANT_OUT:
            store_rows(out_ptr, row * D, live, n_h * a_h + shift_h, n_t * a_t + shift_t, D, HEAD, TAIL)
    if WANT_SUMS:
        part = part_ptr + pid.to(tl.int64) * 2 * D
        store_sums(part, s0_h, s0_t, D, HEAD, TAIL)
        store_sums(part + D, s1_h, s1_t, D, HEAD, TAIL)


def forward_fake(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward's outputs, unwritten: out [B, L, D] in out_dtype; mean, rstd [B, L] float32.

    Without ``center`` no mean is subtracted (RMSNorm), and mean is empty.
    """
    B, L, _ = x.shape
    mean, rstd = (x.new_empty((B, n), dtype=torch.float32) for n in (L if center else 0, L))
    return x.new_empty(x.shape, dtype=out_dtype), mean, rstd


def launch_forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    center: bool = True,
    wrap: Any = direct,
    tile: Tile | None = None,
    *,
    scale8: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``forward_fake``'s outputs, written. shift and scale come together, or are both None.

    scale8: B·L float32 for the scales of rows that are written in 8 bits (``fp8.py``), where out_dtype is such.
    """
    out, mean, rstd = forward_fake(x, shift, scale, weight, bias, eps, out_dtype, center)
    if x.numel() == 0:
        return out, mean, rstd
    x = dense_rows(x)
    shift, scale, weight, bias = map(dense, (shift, scale, weight, bias))
    B, L, D = x.shape
    tile = tile or forward_tile(x, quantize=scale8 is not None)
    P, walk = programs(B, L, tile)
    HEAD, TAIL = split(D)
    wrap(_layernorm_modulate_fwd)[(B * P,)](
        *(x, given(shift, x), given(scale, x), given(weight, x), given(bias, x), out, mean, rstd),
        *(given(scale8, x),),
        *(x.stride(0), x.stride(1), row_stride(shift), row_stride(scale), L, P, walk),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        ROWS=tile.rows,
        STAGES=tile.stages,
        EPS=eps,
        CENTER=center,
        HAS_MODULATION=scale is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        QUANTIZE=scale8 is not None,
        num_warps=tile.warps,
    )
    return out, mean, rstd


def backward_fake(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sums_dtype: torch.dtype,
    want_dx: bool,
    want_sums: bool,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """The backward's outputs, unwritten: dx [B, L, D]; (S0, S1) [B, 2, D]. What is not wanted is empty."""
    B, _, D = x.shape
    return (
        x.new_empty(x.shape if want_dx else (0,)),
        x.new_empty((B, 2, D) if want_sums else (0,), dtype=sums_dtype),
    )


def launch_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sums_dtype: torch.dtype,
    want_dx: bool,
    want_sums: bool,
    center: bool = True,
    wrap: Any = direct,
    tile: Tile | None = None,
    *,
    dr: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``backward_fake``'s outputs, written, dx to memory that is given or new.

    dr: [B, L, D], contiguous, what to add to dx. out: [B, L, D], contiguous, where to write the forward's output again;
    that needs ``shift``, and a LayerNorm without a bias.
    """
    want_new = want_dx and dx is None
    new_dx, sums = backward_fake(dout, x, scale, weight, mean, rstd, sums_dtype, want_new, want_sums, center)
    dx = new_dx if dx is None else dx
    if x.numel() == 0:
        return dx, sums.zero_()
    dout, x = dense_rows(dout), dense_rows(x)
    scale, weight, shift = map(dense, (scale, weight, shift))
    B, L, D = x.shape
    tile = tile or backward_tile(*(dout, x) if dr is None else (dout, x, dr))
    P, walk = programs(B, L, tile)
    HEAD, TAIL = split(D)
    partials = x.new_empty((B, P, 2, D) if want_sums else (0,), dtype=torch.float32)
    wrap(_layernorm_modulate_bwd)[(B * P,)](
        *(dout, x, given(scale, x), given(weight, x), mean, rstd, given(dr, x), given(shift, x)),
        *(dx, given(out, x), partials),
        *(dout.stride(0), dout.stride(1), x.stride(0), x.stride(1), row_stride(scale), row_stride(shift), L, P, walk),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        ROWS=tile.rows,
        STAGES=tile.stages,
        CENTER=center,
        HAS_MODULATION=scale is not None,
        HAS_WEIGHT=weight is not None,
        HAS_DR=dr is not None,
        WANT_OUT=out is not None,
        WANT_DX=want_dx,
        WANT_SUMS=want_sums,
        num_warps=tile.warps,
    )
    if want_sums:
        sum_programs(partials, sums, wrap)
    return dx, sums


def sums_dtype(shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """What S0 and S1 are rounded to: the gradients' own dtype when they are the gradients, else float32."""
    modulation, affine = ({t.dtype for t in pair if t is not None} for pair in ((shift, scale), (weight, bias)))
    dtypes = modulation or affine  # without modulation there is one sample, whose sums are the affine's gradients
    return dtypes.pop() if len(dtypes) == 1 and not (modulation and affine) else torch.float32


def modulation_gradients(
    sums: Tensor, shift_dtype: torch.dtype | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dshift, dscale, dweight, dbias) from S0 and S1; None for an absent argument."""
    s0, s1 = sums.unbind(1)
    if scale is None:
        s0, s1 = s0[0], s1[0]
        return None, None, None if weight is None else s1.to(weight.dtype), None if bias is None else s0.to(bias.dtype)
    if weight is None and bias is None:
        return s0.to(shift_dtype), s1.to(scale.dtype), None, None
    dscale = s1 if weight is None else weight * s1
    if bias is not None:
        dscale = dscale + bias * s0
    a = 1 + scale.float()
    return (
        None if shift_dtype is None else s0.to(shift_dtype),
        dscale.to(scale.dtype),
        None if weight is None else (a * s1).sum(0).to(weight.dtype),
        None if bias is None else (a * s0).sum(0).to(bias.dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, weight, bias, _, _, ctx.center = inputs
    ctx.save_for_backward(x, scale, weight, bias, *output[1:])
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.sums_dtype = sums_dtype(shift, scale, weight, bias)


def _gradients(ctx: Any, dout: Tensor, launch: Any) -> tuple[Tensor | None, ...]:
    x, scale, weight, bias, mean, rstd = ctx.saved_tensors
    want_dx, *rest = ctx.needs_input_grad[:5]
    dx, sums = launch(dout, x, scale, weight, mean, rstd, ctx.sums_dtype, want_dx, any(rest), ctx.center)
    small = modulation_gradients(sums, ctx.shift_dtype, scale, weight, bias) if any(rest) else (None,) * 4
    return (dx if want_dx else None, *small, None, None, None)


class _LayerNormModulate(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device; autograd sets it itself
            output = launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout, launch_backward)


forward_op = register("layernorm_modulate_forward", launch_forward, forward_fake)
backward_op = register("layernorm_modulate_backward", launch_backward, backward_fake)
if forward_op is not None:
    forward_op.register_autograd(lambda ctx, dout, *_: _gradients(ctx, dout, backward_op), setup_context=_save)


def apply(*inputs: Any) -> Tensor:
    """The Triton path: (x, shift, scale, weight, bias, eps, out_dtype, center) to out, differentiable."""
    if torch.compiler.is_compiling():
        return forward_op(*inputs)[0]
    return _LayerNormModulate.apply(*inputs)


def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift, each sample with its own row of shift and scale.

    Args:
        x: [B, L, D], any floating dtype. Outer strides may be anything; a last stride other than 1 costs a copy.
        shift, scale: [B, D], any floating dtype, read in place (chunks of one [B, 6·D] tensor, or expanded).
        weight, bias: [D], the LayerNorm's own affine parameters, if it has them.
        eps: added to the variance.
        out_dtype: the result's dtype; by default what x, shift and scale promote to.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        [B, L, D], contiguous. Statistics and arithmetic are float32 (float64 for float64 inputs, which only the
        reference takes), with one rounding at the end. Gradients have their input's dtype and shape and are
        bit-identical when repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "layernorm_modulate"
    check_tokens(name, "x", x)
    B, _, D = x.shape
    check_vectors(name, x, (B, D), required=True, shift=shift, scale=scale)
    if weight is not None or bias is not None:
        check_vectors(name, x, (D,), weight=weight, bias=bias)
    check_eps(name, eps)
    check_out_dtype(name, out_dtype)
    if resolve(backend, name, x.device, D, has_double(x, shift, scale, weight, bias)) == "reference":
        return layernorm_modulate_reference(x, shift, scale, weight=weight, bias=bias, eps=eps, out_dtype=out_dtype)
    return apply(x, shift, scale, weight, bias, eps, out_dtype or promote(x, shift, scale), True)


def _upstream(x: Tensor, shift: Tensor, scale: Tensor, *, weight=None, bias=None, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


SPEC = KernelSpec(
    name="layernorm_modulate",
    fn=layernorm_modulate,
    reference=layernorm_modulate_reference,
    upstream=_upstream,
    inputs={"x": "BLD", "shift": "BD", "scale": "BD", "weight": "D?", "bias": "D?"},
    outputs=("modulated",),
    backward_moves=("d_modulated", "x", "d_x"),
)
