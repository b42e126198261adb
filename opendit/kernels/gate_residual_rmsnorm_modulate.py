"""residual = x + gate_b · y;  modulated = RMSNorm(residual) · (1 + scale_b) + shift_b, for every token of sample b.

x, y, residual, modulated [B, L, D]; gate, shift, scale [B, D]; weight [D] (the norm's own, optional); B batch, L
tokens, D hidden. Exactly ``gate_residual`` followed by ``rmsnorm_modulate``, in one pass over memory: it runs
``gate_residual_layernorm_modulate``'s kernels without a mean. With n = residual · rstd, a = weight · (1 + scale_b) and
dm = d(modulated), the backward is

    dr = d(residual) + rstd · (a · dm − n · mean_D(a · dm · n))
    dx = dr;  dy = gate · dr;  dgate = Σ_L dr · y;  S0 = Σ_L dm;  S1 = Σ_L dm · n        the sums per sample
"""

from __future__ import annotations

import torch
from torch import Tensor

from opendit.kernels import gate_residual as gating
from opendit.kernels import rmsnorm_modulate as norm
from opendit.kernels._checks import check_eps, check_out_dtype, check_tokens, check_vectors, has_double, promote
from opendit.kernels.backend import resolve
from opendit.kernels.gate_residual_layernorm_modulate import apply
from opendit.kernels.spec import KernelSpec


def gate_residual_rmsnorm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: the two references one after the other."""
    residual = gating.gate_residual_reference(x, y, gate)
    return residual, norm.rmsnorm_modulate_reference(
        residual, shift, scale, weight=weight, eps=eps, out_dtype=out_dtype
    )


def gate_residual_rmsnorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(residual, modulated) = (x + gate · y, RMSNorm(residual) · (1 + scale) + shift).

    Args:
        x, y: [B, L, D], any floating dtypes. Outer strides may be anything; a last stride other than 1 costs a copy,
            of an incoming gradient too.
        gate, shift, scale: [B, D], any floating dtype, read in place (chunks of one [B, 6·D] tensor, or expanded).
        weight: [D], the norm's own, if it has one.
        eps: added to the mean of the squares.
        out_dtype: modulated's dtype; by default what the residual, shift and scale promote to.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``.

    Returns:
        Two [B, L, D], contiguous. residual has the dtype that x, y and gate promote to. Statistics and arithmetic are
        float32 (float64 for float64 inputs, which only the reference takes), with one rounding per output. Gradients
        have their input's dtype and shape and are bit-identical when repeated. Either output may go unused.
        Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "gate_residual_rmsnorm_modulate"
    check_tokens(name, "x", x)
    check_tokens(name, "y", y, like=x)
    B, _, D = x.shape
    check_vectors(name, x, (B, D), required=True, gate=gate, shift=shift, scale=scale)
    check_vectors(name, x, (D,), weight=weight)
    check_eps(name, eps)
    check_out_dtype(name, out_dtype)
    if resolve(backend, name, x.device, D, has_double(x, y, gate, shift, scale, weight)) == "reference":
        return gate_residual_rmsnorm_modulate_reference(
            x, y, gate, shift, scale, weight=weight, eps=eps, out_dtype=out_dtype
        )
    out_dtype = out_dtype or promote(x, y, gate, shift, scale)
    return apply(x, y, gate, shift, scale, weight, None, eps, out_dtype, False, None)


def _upstream(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    residual = gating.SPEC.upstream(x, y, gate)
    return residual, norm.upstream(residual, shift, scale, weight=weight, eps=eps)


SPEC = KernelSpec(
    name="gate_residual_rmsnorm_modulate",
    fn=gate_residual_rmsnorm_modulate,
    reference=gate_residual_rmsnorm_modulate_reference,
    upstream=_upstream,
    inputs={"x": "BLD", "y": "BLD", "gate": "BD", "shift": "BD", "scale": "BD", "weight": "D?"},
    outputs=("residual", "modulated"),
    backward_moves=("d_residual", "d_modulated", "residual", "y", "d_x", "d_y"),
    usual=("weight",),
)
