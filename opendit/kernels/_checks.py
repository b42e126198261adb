"""The kernels' argument checks. They run on every call, so the good path is a few comparisons and no formatting.

Shapes: x, y [B, L, D]; shift, scale, gate [B, D]; weight, bias [D].
"""

import numbers
from typing import Any

import torch
from torch import Tensor


def check_tokens(kernel: str, name: str, tensor: Any, like: Tensor | None = None) -> None:
    """Require a floating [B, L, D] tensor, and ``like``'s shape and device when given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{kernel}: {name} is a {type(tensor).__name__}; pass a floating-point tensor [B, L, D]")
    if not tensor.is_floating_point():
        raise TypeError(f"{kernel}: {name} has dtype {tensor.dtype}; convert it to a floating-point dtype")
    if like is not None:
        if tensor.shape != like.shape:
            raise ValueError(
                f"{kernel}: {name} has shape {tuple(tensor.shape)}; it must be {tuple(like.shape)}, the shape of x"
            )
        if tensor.device != like.device:
            raise ValueError(f"{kernel}: {name} is on {tensor.device} and x on {like.device}; move it there")
    elif tensor.ndim != 3 or tensor.shape[2] == 0:
        raise ValueError(
            f"{kernel}: {name} has shape {tuple(tensor.shape)}; it must be [B, L, D] with D > 0; "
            "reshape it, with L=1 for one token per sample"
        )


def check_vectors(
    kernel: str,
    x: Tensor,
    shape: tuple[int, ...],
    meaning: str | None = None,
    *,
    required: bool = False,
    **vectors: Any,
) -> None:
    """Require floating tensors of exactly ``shape`` (its ``meaning`` in words) on x's device; None where not
    ``required`` is skipped.
    """
    for name, tensor in vectors.items():
        if tensor is None and not required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{kernel}: {name} is a {type(tensor).__name__}; pass a floating-point tensor {list(shape)}"
            )
        if tensor.shape != shape:
            meaning = meaning or ("[B, D], one row per sample" if len(shape) == 2 else "[D], the hidden size")
            raise ValueError(
                f"{kernel}: {name} has shape {tuple(tensor.shape)}; for x of shape {tuple(x.shape)} it must be "
                f"{tuple(shape)}, {meaning}; reshape or expand it"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{kernel}: {name} has dtype {tensor.dtype}; convert it to a floating-point dtype")
        if tensor.device != x.device:
            raise ValueError(f"{kernel}: {name} is on {tensor.device} and x on {x.device}; move it there")


def check_eps(kernel: str, eps: float) -> None:
    """Require eps > 0 (NaN is refused too)."""
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"{kernel}: eps is a {type(eps).__name__}; pass a positive number, for example 1e-6")
    if not eps > 0:
        raise ValueError(f"{kernel}: eps is {eps}; it must be positive, for example 1e-6")


def check_out_dtype(kernel: str, out_dtype: torch.dtype | None, name: str = "out_dtype") -> None:
    """Require a floating dtype or None."""
    if out_dtype is None:
        return
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{kernel}: {name} is {out_dtype!r}; pass a torch dtype such as torch.bfloat16, or None")
    if not out_dtype.is_floating_point:
        raise ValueError(f"{kernel}: {name} is {out_dtype}; it must be a floating-point dtype")


def promote(first: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype that torch's type promotion gives the tensors together, whatever their ranks."""
    result = first.dtype
    for tensor in others:
        dtype = tensor.dtype
        if dtype is not result:
            result = torch.promote_types(result, dtype)
    return result


def has_double(*tensors: Tensor | None) -> bool:
    """Whether any tensor is float64."""
    for tensor in tensors:  # noqa: SIM110 (a generator costs twice the time)
        if tensor is not None and tensor.dtype is torch.float64:
            return True
    return False


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What the references compute in: float64 if any tensor is float64, else float32."""
    return torch.float64 if has_double(*tensors) else torch.float32
