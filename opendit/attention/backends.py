"""The backends: for each kernel a record of what it needs, what it honours and how it is called.

To add one, write ``run(q, k, v, mask, dropout_p, scale)`` on [B, L, H, K] tensors and add a record to `BACKENDS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opendit.attention import packages

_HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = _HALF | {torch.float32, torch.float64}

_ANY = frozenset({"any"})
_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})

_Capability = tuple[int, int]
_F = TypeVar("_F", bound=Callable[..., Any])
_Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None], Tensor]


@dataclass(frozen=True)
class Backend:
    """One kernel and what it can do. Sets of strings name device types; "any" stands for all of them."""

    name: str
    run: _Run  # (q, k, v, mask, dropout_p, scale); arguments validated, mask None or 4-D, at least one key
    devices: frozenset[str] = _ANY
    capability: _Capability = (0, 0)  # the least CUDA compute capability
    cuda_dtypes: frozenset[torch.dtype] = FLOATS
    head_dims: Callable[[int, _Capability], str | None] = lambda head_dim, capability: None  # what fits, if not this
    backward_head_dims: Callable[[int], str | None] = lambda head_dim: None  # likewise, where gradients are needed
    masks: frozenset[str] = frozenset()
    mask_gradients: frozenset[str] = frozenset()
    dropout: frozenset[str] = frozenset()
    unavailable: Callable[[], str | None] = lambda: None  # why its package cannot be used, with the install line

    def limits(self, device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
        """Why it cannot run on this device with this dtype and head_dim (None: not known yet); None if it can."""
        if not _on(self.devices, device.type):
            return f'it needs a {" or ".join(sorted(self.devices))} device, got {device}; use backend="sdpa"'
        if device.type != "cuda":
            return None
        capability = capability_of(device)
        if capability is None:
            return "torch finds no CUDA device"
        if capability < self.capability:
            return f'it needs compute capability {self.capability}, {device} has {capability}; use backend="sdpa"'
        if dtype is not None and dtype not in self.cuda_dtypes:
            allowed = ", ".join(sorted(str(x) for x in self.cuda_dtypes))
            return f'it takes {allowed} on CUDA, got {dtype}; cast q, k, v or use backend="sdpa"'
        fits = None if head_dim is None else self.head_dims(head_dim, capability)
        return None if fits is None else f'it takes head_dim {fits}, got {head_dim}; use backend="sdpa"'

    def refuses(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0
    ) -> str | None:
        """Why it cannot do exactly what is asked of these (valid) arguments; None if nothing speaks against it.

        torch's kernels have finer rules of their own; where those refuse, `run` raises ValueError.
        """
        mask_gradient = mask is not None and mask.requires_grad and torch.is_grad_enabled()
        backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return _refusal(
            self.name,
            q.device,
            q.dtype,
            constant(q.shape[-1]),
            backward,
            mask is not None,
            mask_gradient,
            not dropout_p,
        )


def traced_as_constant(function: _F) -> _F:
    """Dynamo runs `function` once per trace, on constants, instead of tracing into it: imports, caches and logging
    stay out of the graph. It is `torch.compiler.assume_constant_result`, without importing Dynamo to say so."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@traced_as_constant
def _refusal(*description: Any) -> str | None:
    return _refusal_cached(*description)


@cache
def _refusal_cached(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    backward: bool,
    masked: bool,
    mask_gradient: bool,
    no_dropout: bool,
) -> str | None:
    backend = BACKENDS[name]
    problem = backend.unavailable() or backend.limits(device, dtype, head_dim)
    if problem is not None:
        return problem
    fits = backend.backward_head_dims(head_dim) if backward else None
    if fits is not None:
        return f'with gradients it takes head_dim {fits}, got {head_dim}; use backend="sdpa"'
    if masked and not _on(backend.masks, device.type):
        return f'it takes no mask on {device.type}; use backend="sdpa"'
    if mask_gradient and not _on(backend.mask_gradients, device.type):
        return f'it gives no gradient for the mask on {device.type}; detach the mask or use backend="sdpa-math"'
    if not no_dropout and not _on(backend.dropout, device.type):
        return f'it has no dropout on {device.type}; set dropout_p=0 or use backend="sdpa"'
    return None


def _on(devices: frozenset[str], device_type: str) -> bool:
    return device_type in devices or "any" in devices


@cache
def capability_of(device: torch.device) -> _Capability | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def constant(size: int) -> int:
    """A size as a plain int: in a dynamic-shape trace it is symbolic, and the length of a range makes it concrete."""
    return len(range(size))


def _run_sdpa(
    kernel: SDPBackend | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """`F.scaled_dot_product_attention` with one kernel allowed, or with torch's own choice (None)."""
    # torch wants [B, H, L, K]; the transposes are views, and its kernels take the strides as they are.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale).transpose(1, 2)
    try:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale).transpose(1, 2)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise ValueError(
            f"attend: torch's {kernel.name} kernel refuses these arguments (q {list(q.shape)} and k "
            f"{list(k.shape)} as [B, H, L, K], {q.dtype}, {q.device}, dropout_p={dropout_p}); torch's warnings "
            'say why; use backend="sdpa"'
        ) from error


def _run_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """The formula spelled out: fp32 inside (fp64 for fp64), rounded once at the end. O(Lq·Lk) memory."""
    inside = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        q_BHLK, k_BHLK, v_BHLK = (x.transpose(1, 2).to(inside) for x in (q, k, v))
        scores = q_BHLK @ k_BHLK.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is None:
            weights = scores.softmax(-1)
        else:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            # A query that may attend to nothing: zeros and zero gradients, where the softmax would give NaN.
            blind = (scores == -math.inf).all(-1, keepdim=True)
            weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        return (weights @ v_BHLK).to(q.dtype).transpose(1, 2)


def _head_dims_cudnn(head_dim: int, capability: _Capability) -> str | None:
    most = 256 if capability == (9, 0) else 128
    return None if head_dim % 8 == 0 and head_dim <= most else f"up to {most} in steps of 8"


def _head_dims_flash(head_dim: int, capability: _Capability) -> str | None:
    return None if head_dim <= 256 else "up to 256"


def _head_dims_flash_attn_4(head_dim: int, capability: _Capability) -> str | None:
    # On Blackwell 256 has a kernel of its own, with nothing between it and 128.
    if head_dim % 8 == 0 and (head_dim <= 128 or (head_dim <= 256 and capability[0] == 9) or head_dim == 256):
        return None
    return "up to 256 in steps of 8" if capability[0] == 9 else "up to 128 in steps of 8, or 256"


# 4.0.0b36 on an H200: at head_dim 40, 48, 72 and 80 the forward is right and dq is off by more than its own size. Here
# are the head_dims whose gradients the tests compare with fp64 (tests/test_attention.py, marker gpu).
_FLASH_ATTN_4_BACKWARD = (64, 128)


def _backward_head_dims_flash_attn_4(head_dim: int) -> str | None:
    if head_dim in _FLASH_ATTN_4_BACKWARD:
        return None
    return f"{' or '.join(map(str, _FLASH_ATTN_4_BACKWARD))} (its gradients are wrong or unchecked elsewhere)"


_torch_kernel = partial(partial, _run_sdpa)
_ALL = (
    Backend("sdpa", _torch_kernel(None), masks=_ANY, mask_gradients=_ANY, dropout=_ANY),
    Backend(
        "sdpa-cudnn",
        _torch_kernel(SDPBackend.CUDNN_ATTENTION),
        devices=_CUDA,
        capability=(8, 0),
        cuda_dtypes=_HALF,
        head_dims=_head_dims_cudnn,
        masks=_CUDA,
        dropout=_CUDA,
    ),
    Backend(
        "sdpa-flash",
        _torch_kernel(SDPBackend.FLASH_ATTENTION),
        devices=_CUDA | _CPU,
        capability=(8, 0),
        cuda_dtypes=_HALF,
        head_dims=_head_dims_flash,
        masks=_CPU,
        dropout=_CUDA,
    ),
    Backend(
        "sdpa-efficient",
        _torch_kernel(SDPBackend.EFFICIENT_ATTENTION),
        devices=_CUDA,
        capability=(5, 0),
        cuda_dtypes=_HALF | {torch.float32},
        masks=_CUDA,
        mask_gradients=_CUDA,
        dropout=_CUDA,
    ),
    Backend("sdpa-math", _torch_kernel(SDPBackend.MATH), masks=_ANY, mask_gradients=_ANY, dropout=_ANY),
    Backend(
        "flash-attn",
        packages.run_flash_attn,
        devices=_CUDA,
        capability=(8, 0),
        cuda_dtypes=_HALF,
        head_dims=_head_dims_flash,
        dropout=_CUDA,
        unavailable=packages.flash_attn_problem,
    ),
    Backend(
        "flash-attn-4",
        packages.run_flash_attn_4,
        devices=_CUDA,
        capability=(9, 0),
        cuda_dtypes=_HALF,
        head_dims=_head_dims_flash_attn_4,
        backward_head_dims=_backward_head_dims_flash_attn_4,
        unavailable=packages.flash_attn_4_problem,
    ),
    Backend("reference", _run_reference, masks=_ANY, mask_gradients=_ANY),
)
BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in _ALL}


def backend_names() -> tuple[str, ...]:
    """The names `attend` takes besides "auto"."""
    return tuple(BACKENDS)


def get_backend(name: str) -> Backend:
    """The record of that name; ValueError listing the names for an unknown one."""
    if name not in BACKENDS:
        raise ValueError(f'unknown attention backend {name!r}; use "auto" or one of: {", ".join(BACKENDS)}')
    return BACKENDS[name]


def backend_unavailable(
    name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Why backend `name` cannot run on `device` with `dtype` and `head_dim` (None: not known yet); None if it can.

    For deciding before any tensor exists. "auto" can always run. ValueError for an unknown name.
    """
    if name == "auto":
        return None
    backend = get_backend(name)
    return backend.unavailable() or backend.limits(device, dtype, head_dim)
