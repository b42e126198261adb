"""`attend`: check the arguments, pick a backend, run it. Shapes as in the package's docstring."""

import math

import torch
from torch import Tensor

from opendit.attention.backends import BACKENDS, FLOATS, get_backend
from opendit.attention.choice import autocast_dtype, choose_and_log, describe


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str = "auto",
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of q [B, Lq, H, K] over k, v [B, Lk, H, K]; returns [B, Lq, H, K] in q's dtype.

    q, k and v may be strided views (such as slices of a packed [B, L, 3, H, K]) and are not copied here; the result
    may be a view too. Under `torch.autocast` fp32 and half inputs are cast to the autocast dtype, as
    `F.scaled_dot_product_attention` does. An empty batch or no queries gives an empty result; no keys gives zeros.

    Args:
        backend: a name from `backend_names()`, or "auto" (see `choose`).
        mask: bool (True: attend) or additive in q's dtype, at most 4-D, broadcastable to [B, H, Lq, Lk].
            A query that may attend to nothing gets zeros from "reference" and from torch's CPU kernels.
        dropout_p: probability of dropping an attention weight, in [0, 1). Applied as given: pass 0 for evaluation.
        scale: factor on q·k, default 1/√K.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or value that is not allowed, an unknown backend, or a backend that is not installed or
            cannot do this exactly (device, dtype, head_dim, mask, dropout); the message says what to do instead.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attend: {name} must be a torch.Tensor, got {type(x).__name__}")
    lower = autocast_dtype(q.device.type)
    if lower is not None:
        q, k, v = _lowered(q, lower), _lowered(k, lower), _lowered(v, lower)
        mask = _lowered(mask, lower) if isinstance(mask, Tensor) else mask
    _validate(q, k, v, mask, dropout_p, scale)

    if backend == "auto":
        backend = choose_and_log(*describe(q, k, v, mask, dropout_p))
    chosen = get_backend(backend)
    problem = chosen.refuses(q, k, v, mask, dropout_p)
    if problem is not None:
        raise ValueError(f'attend: backend "{backend}" cannot run this: {problem}')

    if q.numel() == 0 or k.numel() == 0:
        # Not every kernel takes empty tensors; plain torch gives the zeros and the zero gradients.
        chosen = BACKENDS["sdpa-math"]
    return chosen.run(q, k, v, _mask_4d(mask, k.shape[1]), dropout_p, scale)


def _validate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> None:
    """Raises TypeError or ValueError naming the argument. Runs on every call: comparisons only, until one fails."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"attend: q, k, v must be [B, L, H, K], got {_shapes(q, k, v)}")
    B, Lq, H, K = q.shape
    kB, Lk, kH, kK = k.shape
    if k.shape != v.shape or kB != B or kH != H or kK != K or K == 0:
        raise ValueError(
            "attend: k and v must have the same shape, and q's batch, heads and (non-zero) head_dim; got "
            f"{_shapes(q, k, v)}; repeat the heads of k and v first if they are fewer than q's"
        )
    dtype, device = q.dtype, q.device
    if dtype not in FLOATS:
        raise TypeError(f"attend: q, k, v must be float16, bfloat16, float32 or float64, got {dtype}; cast with .to()")
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"attend: q, k, v must have one dtype, got {dtype}, {k.dtype}, {v.dtype}; cast with .to()")
    if k.device != device or v.device != device:
        raise ValueError(
            f"attend: q, k, v must be on one device, got {device}, {k.device}, {v.device}; move with .to()"
        )
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attend: dropout_p must be a number in [0, 1), got {dropout_p!r}")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise TypeError(f"attend: scale must be None or a finite Python number, got {scale!r}")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attend: mask must be None or a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype != dtype:
        # Kernels differ in what they make of an fp32 mask on half inputs, so the caller decides on the rounding.
        raise TypeError(
            f"attend: mask must be bool (True: attend) or additive in q's dtype {dtype}, got {mask.dtype}; "
            "cast it with mask.to(q.dtype), or mask.bool() for a mask of 0 and 1"
        )
    if mask.device != device:
        raise ValueError(f"attend: mask must be on q's device {device}, got {mask.device}; move it with .to()")
    full = (B, H, Lq, Lk)
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"attend: mask must broadcast to [B, H, Lq, Lk] = {list(full)}, got {list(mask.shape)}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's own rule: floating tensors are cast, except double ones."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _mask_4d(mask: Tensor | None, Lk: int) -> Tensor | None:
    if mask is None:
        return None
    if not torch.is_grad_enabled():
        mask = mask.detach()  # torch's kernels refuse a mask that requires grad even where none is taken
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] != Lk:  # fused kernels read rows of keys, which a zero stride there does not give them
        mask = mask.expand(*mask.shape[:-1], Lk).contiguous()
    return mask
