"""out = RMSNorm(x) · (1 + scale_b) + shift_b, for every token of sample b.

x, out [B, L, D]; shift, scale [B, D]; weight [D] (the norm's own, optional); B batch, L tokens, D hidden.

    n = x · rstd,  rstd = 1 / √(mean_D(x²) + eps);  RMSNorm(x) = n · weight

It runs ``layernorm_modulate``'s kernels without a mean. With a = weight · (1 + scale_b) and do = d(out), the backward
reads x and do once:

    dx = rstd · (a · do − n · mean_D(a · do · n))
    S0 = Σ_L do,  S1 = Σ_L do · n           per sample
    dshift = S0;  dscale = weight · S1;  dweight = Σ_b (1 + scale_b) · S1
"""

from __future__ import annotations

import torch
from torch import Tensor

from opendit.kernels._checks import (
    check_eps,
    check_out_dtype,
    check_tokens,
    check_vectors,
    compute_dtype,
    has_double,
    promote,
)
from opendit.kernels.backend import resolve
from opendit.kernels.layernorm_modulate import apply
from opendit.kernels.spec import KernelSpec


def root_mean_square_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / √(mean_D(x²) + eps) · weight, in x's dtype."""
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return n if weight is None else n * weight


def rmsnorm_modulate_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification: float32 inside (float64 if any input is), one downcast at the end."""
    dtype = compute_dtype(x, shift, scale, weight)
    normalized = root_mean_square_norm(x.to(dtype), None if weight is None else weight.to(dtype), eps)
    out = torch.addcmul(shift.to(dtype).unsqueeze(1), normalized, 1 + scale.to(dtype).unsqueeze(1))
    return out.to(out_dtype or promote(x, shift, scale))


def rmsnorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """RMSNorm(x) · (1 + scale) + shift, each sample with its own row of shift and scale.

    Args:
        x: [B, L, D], any floating dtype. Outer strides may be anything; a last stride other than 1 costs a copy.
        shift, scale: [B, D], any floating dtype, read in place (chunks of one [B, 6·D] tensor, or expanded).
        weight: [D], the norm's own, if it has one.
        eps: added to the mean of the squares.
        out_dtype: the result's dtype; by default what x, shift and scale promote to.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        [B, L, D], contiguous. Statistics and arithmetic are float32 (float64 for float64 inputs, which only the
        reference takes), with one rounding at the end. Gradients have their input's dtype and shape and are
        bit-identical when repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "rmsnorm_modulate"
    check_tokens(name, "x", x)
    B, _, D = x.shape
    check_vectors(name, x, (B, D), required=True, shift=shift, scale=scale)
    check_vectors(name, x, (D,), weight=weight)
    check_eps(name, eps)
    check_out_dtype(name, out_dtype)
    if resolve(backend, name, x.device, D, has_double(x, shift, scale, weight)) == "reference":
        return rmsnorm_modulate_reference(x, shift, scale, weight=weight, eps=eps, out_dtype=out_dtype)
    return apply(x, shift, scale, weight, None, eps, out_dtype or promote(x, shift, scale), False)


def upstream(x: Tensor, shift: Tensor, scale: Tensor, *, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """As models of Llama's descent write it: the norm in float32, rounded before its weight."""
    normalized = root_mean_square_norm(x.float(), None, eps).type_as(x)
    if weight is not None:
        normalized = normalized * weight
    return normalized * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


SPEC = KernelSpec(
    name="rmsnorm_modulate",
    fn=rmsnorm_modulate,
    reference=rmsnorm_modulate_reference,
    upstream=upstream,
    inputs={"x": "BLD", "shift": "BD", "scale": "BD", "weight": "D?"},
    outputs=("modulated",),
    backward_moves=("d_modulated", "x", "d_x"),
    usual=("weight",),
)
