"""Attention among several sequences, each of them spread: image and text, say, of which every process has a part each.

    q, k, v [B, Σ l_j, H, K], one part after the other
      ─ all-to-all in the row ►  [B, u·Σ l_j, h, K] of the row's parts; then without the padding of each sequence
      ─ attention, or a ring over the rows' keys ►  padding back, all-to-all back ►  [B, Σ l_j, H, K]

Sequence j has L_j tokens, l_j of them on each process, padding included (`shards.py`). s = u·r processes, u in a row,
as in `usp.py`: with u = s it is Ulysses, with u = 1 ring attention. All sequences travel in one collective. Attention
does not see the order of keys, so parts are put together as they lie; only padding must go, or lie behind all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
import torch.nn.functional as F
from torch import Tensor

from opendit.fastseq.collectives import to_heads, to_tokens
from opendit.fastseq.method import Pair
from opendit.fastseq.ops import Line
from opendit.fastseq.ring import ring_attention
from opendit.fastseq.sequence import Sequence
from opendit.fastseq.shards import real, total_length

# FastSeq gathers one input for one projection; what is gathered here has a projection for each sequence.
METHODS = ("ulysses", "ring", "usp")


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    pair: Pair,
    sequence: Sequence,
) -> Tensor:
    """Attention of all processes' tokens of all sequences for this one's, [B, Σ l_j, H, K].

    Args:
        q, k, v: of this process's parts, in the order of `lengths`; normalised, and moved to their places.
        lengths: l_j.
        attend, pair: as in `SelfAttention`.
    """
    size, ring = sequence.size, sequence.ring
    row, line = size // ring, sequence.line("ulysses")
    totals = [total_length(local, size) for local in lengths]
    heads, local = q.shape[2], sum(lengths)
    # Norms may run in fp32 under autocast; what is sent is what attention reads.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if row > 1:
        q, k, v = to_heads((q, k, v), line, row * local)
    # How much of each sequence each row has.
    of_rows = [[real(n, row * part, r) for n, part in zip(totals, lengths, strict=True)] for r in range(ring)]
    here = of_rows[sequence.line("ring").rank]
    padded = here != [row * part for part in lengths]
    if padded:
        q, k, v = (_without_padding(x, row, lengths, here) for x in (q, k, v))
    if ring > 1:
        if padded:
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, row * local - sum(here))) for x in (q, k, v))
        counts = tuple(sum(each) for each in of_rows)
        out = ring_attention(q, k, v, pair, sequence.line("ring"), counts)
    else:
        out = attend(q, k, v)
    if padded:
        out = _with_padding(out, row, lengths, here)
    if row > 1:
        out = to_tokens(out, heads, line, local)
    return out


def _without_padding(x: Tensor, row: int, lengths: Many[int], here: Many[int]) -> Tensor:
    """[B, row·Σ l_j, …] of a row's parts → [B, Σ here_j, …]: one sequence's real tokens after the other's."""
    whole = x.view(len(x), row, sum(lengths), *x.shape[2:])  # which may be of no heads
    parts = whole.split(list(lengths), 2)  # type: ignore[no-untyped-call]
    return torch.cat([part.flatten(1, 2)[:, :n] for part, n in zip(parts, here, strict=True)], 1)


def _with_padding(x: Tensor, row: int, lengths: Many[int], here: Many[int]) -> Tensor:
    """The way back of `_without_padding`; padding is zero."""
    parts = []
    real_parts = x[:, : sum(here)].split(list(here), 1)  # type: ignore[no-untyped-call]
    for part, local, n in zip(real_parts, lengths, here, strict=True):
        whole = F.pad(part, (0, 0, 0, 0, 0, row * local - n))
        parts.append(whole.view(len(x), row, local, *x.shape[2:]))
    return torch.cat(parts, 2).flatten(1, 2)


def rows_of(x: Tensor, lengths: tuple[int, ...], sp: int) -> Tensor:
    """This process's rows of x [Σ L_j, K], one for each token of the sequences in their order: [Σ l_j, K].

    Zeros for padding. Raises `ValueError` where x has another number of rows.
    """
    rank = Line(sp, 1, "sp").rank
    totals = [total_length(local, sp) for local in lengths]
    if x.shape[0] != sum(totals):
        raise ValueError(
            f"sp_size={sp}: positions of {x.shape[0]} tokens were given for sequences of {totals}; allowed: one for "
            "each token"
        )
    parts = []
    for each, local, n in zip(x.split(totals), lengths, totals, strict=True):  # type: ignore[no-untyped-call]
        begin, here = min(rank * local, n), real(n, local, rank)
        parts.append(F.pad(each[begin : begin + here], (0, 0, 0, local - here)))
    return torch.cat(parts)
