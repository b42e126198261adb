"""out = LayerNorm(x) · weight + bias, over the last dimension.

x, out [..., D]; weight, bias [D], both optional; D hidden. It runs ``layernorm_modulate``'s kernels without modulation,
over all leading dimensions flattened into one, or NVIDIA Apex's FusedLayerNorm.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opendit.kernels._checks import check_eps, check_out_dtype, check_vectors, compute_dtype, has_double
from opendit.kernels.backend import apex_layer_norm, resolve
from opendit.kernels.layernorm_modulate import apply
from opendit.kernels.spec import KernelSpec


def layernorm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification: float32 inside (float64 if any input is), one downcast at the end."""
    dtype = compute_dtype(x, weight, bias)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(out_dtype or x.dtype)


def layernorm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: [..., D], any floating dtype. Leading dimensions that do not flatten into one cost a copy, and so does a
            last stride other than 1.
        weight, bias: [D], any floating dtype, either or both absent.
        eps: added to the variance.
        out_dtype: the result's dtype; x's by default.
        backend: "auto", "triton", "reference" or "apex"; see ``opendit.kernels.backend``.

    Returns:
        x's shape, contiguous. Statistics and arithmetic are float32 (float64 for float64 inputs, which only the
        reference takes), with one rounding at the end. Gradients have their input's dtype and shape; those of "triton"
        are bit-identical when repeated and differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or the backend cannot run here.
    """
    name = "layernorm"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x is a {type(x).__name__}; pass a floating-point tensor [..., D]")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x has dtype {x.dtype}; convert it to a floating-point dtype")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; it must be [..., D] with D > 0")
    D = x.shape[-1]
    check_vectors(name, x, (D,), weight=weight, bias=bias)
    check_eps(name, eps)
    check_out_dtype(name, out_dtype)
    chosen = resolve(backend, name, x.device, D, has_double(x, weight, bias))
    if chosen == "reference":
        return layernorm_reference(x, weight, bias, eps=eps, out_dtype=out_dtype)
    if chosen == "apex":
        return _apex(x, weight, bias, eps).to(out_dtype or x.dtype)
    rows = x.reshape(1, x.numel() // D, D)
    return apply(rows, None, None, weight, bias, eps, out_dtype or x.dtype, True).view(x.shape)


def _apex(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """Apex takes weight and bias together or not at all, in x's dtype."""
    module = apex_layer_norm()
    shape = x.shape[-1:]
    if weight is None and bias is None:
        return module.fused_layer_norm(x, shape, eps)
    weight = x.new_ones(shape) if weight is None else weight.to(x.dtype)
    bias = x.new_zeros(shape) if bias is None else bias.to(x.dtype)
    return module.fused_layer_norm_affine(x, weight, bias, shape, eps)


def _upstream(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


SPEC = KernelSpec(
    name="layernorm",
    fn=layernorm,
    reference=layernorm_reference,
    upstream=_upstream,
    inputs={"x": "BLD", "weight": "D?", "bias": "D?"},
    outputs=("normalized",),
    backward_moves=("d_normalized", "x", "d_x"),
    usual=("weight", "bias"),
)
