"""Rotary positions of heads whose channels rotate in neighbouring pairs, as diffusers' video models have them.

    (a, b) → (a·cos − b·sin, b·cos' + a·sin')    for channels 2i and 2i + 1, rounded once to x's dtype

Shapes: x [B, L, H, K]; tables cos, sin broadcastable to it, [1, L, 1, K]. B batch, L tokens, H heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opendit.doubles import at_least_float
from opendit.fastseq.ops import rank_in_sp
from opendit.fastseq.shards import real, total_length

Tables = tuple[Tensor, Tensor]


def rotated(x: Tensor, cos: Tables, sin: Tables) -> Tensor:
    """x with each pair of channels turned; cos and sin: of even and of odd channels, [..., K/2] each."""
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([a * cos[0] - b * sin[0], b * cos[1] + a * sin[1]], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def turned(x: Tensor, tables: Tables) -> Tensor:
    """x [B, L, H, K] at the positions of two tables [L, K], cosines and sines; computed in fp32 at least."""
    cos, sin = (table.to(x.device)[None, :, None] for table in tables)
    out = rotated(at_least_float(x), (cos[..., 0::2], cos[..., 1::2]), (sin[..., 0::2], sin[..., 1::2]))
    return out.to(x.dtype)


def of_part(table: Tensor, dim: int, local: int, sp: int) -> Tensor:
    """The rows of `table` that belong to this process's `local` tokens; zeros for padding.

    Raises `ValueError` where the table is not of the whole sequence.
    """
    total = total_length(local, sp)
    if table.shape[dim] != total:
        raise ValueError(
            f"rotary positions: got {table.shape[dim]} rows for a sequence of {total} tokens; allowed: one for each"
        )
    rank = rank_in_sp(sp)
    here = real(total, local, rank)
    rows = table.narrow(dim, min(rank * local, total), here)
    padding = [0, 0] * (table.dim() - dim - 1) + [0, local - here]
    return F.pad(rows, padding) if here < local else rows
