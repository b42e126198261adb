"""Attention of one block of keys among several, forward and backward, for methods that never hold all keys.

q [B, Lq, H, K], k and v [B, Lk, H, K], lse [B, H, Lq]: the logarithm of each query's softmax denominator. Nothing is
recorded for autograd. torch's flash kernels where they take the tensors; elsewhere the formulas, in fp32 at least:

    s = q·kᵀ/√K    p = exp(s − lse)    dv = pᵀ·do    ds = p·(do·vᵀ − Σ_K do·out)    dq = ds·k/√K    dk = dsᵀ·q/√K

With lse and out of all keys, these are this block's share of dv and dk, and its contribution to dq.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, K] in q's dtype, lse [B, H, Lq] in fp32, or in fp64 for fp64)."""
    with torch.no_grad():
        if _flash(q):
            found = _aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, False, False)
            return found[0].transpose(1, 2), found[1]
        scores = _scores(q, k)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.unsqueeze(-1))
        return torch.einsum("bhij,bjhk->bihk", p, v.to(p.dtype)).to(q.dtype), lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of q."""
    with torch.no_grad():
        if _flash(q):
            first = _heads_first(dout, q, k, v, out)
            unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is off
            found = _aten._scaled_dot_product_flash_attention_backward(
                *first, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, False, unused, unused
            )
            dq, dk, dv = (g.transpose(1, 2) for g in found)
            return dq, dk, dv
        p = torch.exp(_scores(q, k) - lse.unsqueeze(-1))
        wide_do, wide_q, wide_k, wide_v = (t.to(p.dtype) for t in (dout, q, k, v))
        dv = torch.einsum("bhij,bihk->bjhk", p, wide_do)
        dp = torch.einsum("bihk,bjhk->bhij", wide_do, wide_v)
        ds = p * (dp - (wide_do * out).sum(-1).transpose(1, 2).unsqueeze(-1)) * q.shape[-1] ** -0.5
        dq = torch.einsum("bhij,bjhk->bihk", ds, wide_k)
        dk = torch.einsum("bhij,bihk->bjhk", ds, wide_q)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("bihk,bjhk->bhij", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5


def _flash(q: Tensor) -> bool:
    # Head dims that are no multiple of 8 would need padding around the kernel and its backward.
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]
