"""A transformer block with adaptive LayerNorm without a backward: what sampling computes.

    h = LN(x)·(1 + scale_a) + shift_a;   qkv = h·Wqkvᵀ + bqkv;   o = attention(qkv);   r = x + gate_a·(o·Wprojᵀ + bproj)
    h = LN(r)·(1 + scale_m) + shift_m;   out = r + gate_m·(GELU(h·W1ᵀ + b1)·W2ᵀ + b2)

x, r, out [B, L, D]; modulation [B, 6·D] = (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m). All of one dtype, in
which the block computes. B batch, L tokens, D hidden. Names as in `block.py`, whose forward this is but for what that
keeps, on a part of the tokens too: on GPUs the tanh GELU is the end of the product before it, where it sees what that
has not rounded yet.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opendit.attention import two_pass
from opendit.fastseq import in_block
from opendit.patch.block import Groups, Static, _Launch, _linear


def forward_only(x: Tensor, modulation: Tensor, groups: Groups, static: Static) -> Tensor:
    """The block's output. groups: the parameters in the order of `block.PARAMETERS`, those of the modulation absent."""
    _, _, qkv_w, qkv_b, proj_w, proj_b, w1, b1, w2, b2 = (_joined(group) for group in groups)
    assert qkv_w is not None
    assert proj_w is not None
    assert w1 is not None
    assert w2 is not None
    B, L, D = x.shape
    M = B * L
    with torch.cuda.device_of(x):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        h = _Launch.norm(x, shift_a, scale_a, None, None, static.eps_a, static.dtype)[0]
        if static.sequence is None:
            q, k, v = _linear(h.view(M, D), qkv_w.t(), qkv_b).view(B, L, 3, static.heads, -1).unbind(2)
            o = two_pass.forward(q, k, v, static.attention)[0]
        else:
            o = in_block.forward(h, qkv_w, qkv_b, static.heads, static.sequence, static.attend)[0]
        y = _linear(o.reshape(M, -1), proj_w.t(), proj_b).view(B, L, D)
        r, h = _Launch.fused(x, y, gate_a, shift_m, scale_m, None, None, static.eps_m, static.dtype)[:2]
        y = _linear(_hidden(h.view(M, D), w1, b1, static.tanh), w2.t(), b2).view(B, L, D)
        out: Tensor = _Launch.gate(r, y, gate_m)
        return out


def _joined(group: Sequence[Tensor]) -> Tensor | None:
    if not group:
        return None
    return group[0] if len(group) == 1 else torch.cat(list(group))


def _hidden(h: Tensor, w1: Tensor, b1: Tensor | None, tanh: bool) -> Tensor:
    """GELU(h·W1ᵀ + b1)."""
    if h.is_cuda and tanh and b1 is not None:
        # torch's CPU kernel of this is the exact GELU's, its CUDA kernel the approximation's.
        return torch._addmm_activation(b1, h, w1.t(), use_gelu=True)
    return _Launch.gelu(_linear(h, w1.t(), b1), tanh)
