"""Attention's forward and backward as two plain functions, for a caller that writes its own backward.

q, k, v, out and their gradients are [B, L, H, K], as everywhere in this package; views are fine. What the forward hands
to the backward is a list of tensors, whose number depends on the backend only.

torch's fused kernels have such a pair of operators each. Any other backend is differentiated by autograd, which runs
its forward once more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opendit.attention import packages
from opendit.attention.backends import BACKENDS

_aten = torch.ops.aten
CUDNN_MAX_BATCH = 65535
_PAIRED = {"cuda": ("sdpa-cudnn", "sdpa-flash", "flash-attn-4"), "cpu": ("sdpa-flash",)}


def paired(backend: str, device: torch.device) -> bool:
    """Whether the backward does without another forward."""
    return backend in _PAIRED.get(device.type, ())


def refuses(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], gradients: bool
) -> str | None:
    """Why the pair must not be used for q, k and v of this shape [B, L, H, K], or None."""
    B, _, _, K = shape
    record = BACKENDS[backend]
    reason = record.limits(device, dtype, K)
    if reason is None and gradients:
        fits = record.backward_head_dims(K)
        reason = None if fits is None else f"{backend} has right gradients at head_dim {fits} only, not at {K}"
    if reason is None and device.type == "cuda" and K % 8:
        reason = f"{backend} takes head_dims in steps of 8, not {K}"
    if reason is None and backend == "sdpa-cudnn" and B > CUDNN_MAX_BATCH:
        reason = f"the batch is above {CUDNN_MAX_BATCH}"
    return reason


def resolve(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """ "sdpa" as the kernel that torch would choose for these tensors, where that kernel has a pair."""
    if backend != "sdpa" or q.device.type != "cuda" or q.shape[-1] % 8:
        return backend
    choice: int = torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return {1: "sdpa-flash", 3: "sdpa-cudnn"}.get(choice, backend)


def forward(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, list[Tensor]]:
    """(out, what the backward needs: the logarithm of the softmax's denominator and, for CUDA kernels of torch, the
    state of a dropout that is not used). Nothing is recorded for autograd.
    """
    if not paired(backend, q.device):
        with torch.no_grad():
            return BACKENDS[backend].run(q, k, v, None, 0.0, None), []
    if backend == "flash-attn-4":
        out, lse = packages._forward(q, k, v, q.shape[-1] ** -0.5)
        return out, [lse]
    q, k, v = _heads_first(q, k, v)
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), [lse]
    if backend == "sdpa-cudnn":
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, False, False
        )
    else:
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
    none = lse.new_empty(0)
    return out.transpose(1, 2), [lse, none if seed is None else seed, none if offset is None else offset]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Sequence[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if not paired(backend, q.device):
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            again = BACKENDS[backend].run(q, k, v, None, 0.0, None)
            dq, dk, dv = torch.autograd.grad(again, (q, k, v), dout)
        return dq, dk, dv
    if backend == "flash-attn-4":
        return packages._backward(dout, q, k, v, out, saved[0], q.shape[-1] ** -0.5)
    L = q.shape[1]
    q, k, v, dout, out = _heads_first(q, k, v, dout, out)
    if q.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, saved[0], 0.0, False)
        return _tokens_first(*found)
    lse, seed, offset = saved
    if backend == "sdpa-cudnn":
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, None, None, L, L, 0.0, False
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, L, L, 0.0, False, seed, offset
        )
    return _tokens_first(*found)


def _tokens_first(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]
