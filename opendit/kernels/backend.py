"""Which implementation of a kernel can run where, and why one cannot. Imports neither triton nor apex.

``auto``       triton for CUDA tensors when triton is installed and torch.func is not at work, else the reference
``triton``     the fused kernels: CUDA, or any device under TRITON_INTERPRET=1 (slow; for tests)
``reference``  plain differentiable torch, anywhere
``apex``       NVIDIA Apex's FusedLayerNorm; ``layernorm`` on CUDA only
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

BACKENDS = ("auto", "triton", "reference")
MAX_HIDDEN = 8192  # a whole row is held in registers; wider rows would spill

# Read once: triton itself reads the variable when a kernel is decorated, so a later change has no effect there either.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETING = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def apex_layer_norm() -> Any:
    """``apex.normalization.fused_layer_norm``, or None where NVIDIA Apex with its CUDA extension is not installed."""
    try:
        module = importlib.import_module("apex.normalization.fused_layer_norm")
        importlib.import_module("fused_layer_norm_cuda")
    except ImportError:  # none at all, PyPI's unrelated package of that name, or a build without CUDA extensions
        return None
    return module if hasattr(module, "fused_layer_norm_affine") else None


def unavailable(backend: str, device: torch.device, kernel: str) -> str | None:
    """Why ``backend`` cannot run ``kernel`` on ``device``, with the remedy, or None when it can.

    Raises ValueError when there is no backend of that name.
    """
    if backend in ("auto", "reference"):
        return None
    if backend == "triton":
        if not TRITON_INSTALLED:
            return "triton is not installed; pip install 'opendit[triton]' or pass backend='reference'"
        if device.type != "cuda" and not INTERPRETING:
            return (
                f"triton kernels need a CUDA device, not {device.type!r}; move the tensors to CUDA, pass "
                "backend='reference', or set TRITON_INTERPRET=1 before Python starts to test them slowly"
            )
        return None
    if backend == "apex":
        if kernel != "layernorm":
            return f"apex has no {kernel}; only layernorm can use it"
        if device.type != "cuda":
            return f"apex's FusedLayerNorm needs a CUDA device, not {device.type!r}; pass backend='reference'"
        if apex_layer_norm() is None:
            return (
                "NVIDIA Apex with its CUDA extension is not installed (the package named apex on PyPI is another one); "
                "build it from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext, or pass backend='triton'"
            )
        return None
    raise ValueError(f"{kernel}: backend is {backend!r}; allowed are {_allowed(kernel)}")


def resolve(backend: str, kernel: str, device: torch.device, hidden: int, double: bool) -> str:
    """The backend to run: ``auto`` decided, any other checked.

    Args:
        hidden: D, the row's width. double: whether any input is float64, which only the reference computes.

    Raises:
        ValueError: the backend is unknown, cannot run on this device, or cannot take these inputs.
    """
    fits = hidden <= MAX_HIDDEN and not double
    if backend == "auto":
        fused = device.type == "cuda" and TRITON_INSTALLED and fits and not _transformed()
        return "triton" if fused else "reference"
    if backend == "reference":
        return "reference"
    reason = unavailable(backend, device, kernel)
    if reason is None and backend == "triton" and not fits:
        reason = (
            "its kernels compute in float32, and an input is float64; pass backend='reference'"
            if double
            else f"its rows hold at most D={MAX_HIDDEN}, and D is {hidden}; pass backend='reference'"
        )
    if reason is not None:
        raise ValueError(f"{kernel}: backend={backend!r} cannot run here: {reason}; allowed are {_allowed(kernel)}")
    return backend


def _transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp) is at work, which the kernels' autograd functions do not support."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def _allowed(kernel: str) -> str:
    return ", ".join(map(repr, (*BACKENDS, "apex") if kernel == "layernorm" else BACKENDS))
