"""Blocks of two sequences, a video's tokens x and a text's e, in which attention sees both: over processes, and probed.

The video's tokens are spread, the text is whole on every process. What is computed of the text token by token is
computed everywhere; of attention each process has its heads, over all tokens of both, and the text's are gathered:

    x [B, l, D] → q, k, v of all tokens, local heads ─┐
    e [B, n, D] → q, k, v, local heads ───────────────┴► attention ─► y [B, l, H·K], as the method has it
                                                                   └► z [B, n, h, K] ─ all-gather ► [B, n, H·K]

Shapes: B batch, l tokens of the video here, n of the text, D hidden, H heads, h of them here, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opendit.fastseq.collectives import gather_heads
from opendit.fastseq.shards import evenly
from opendit.patch.diffusers_parts import ATTENTION, comes_as
from opendit.patch.planner import Planner
from opendit.patch.probe import Inputs, StandIn, reads_low_precision
from opendit.patch.rotated import of_part, turned
from opendit.patch.spread import SpreadAttention

# (video's, text's) q, k, v [B, L, h, K] and [B, n, h, K] → out of both.
Together = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


class SpreadJointAttention(SpreadAttention):
    """Base of mixins for diffusers' Attention of a video and a text together."""

    projections = ("to_q", "to_k", "to_v")
    per_head = ("norm_q", "norm_k")
    all_keys = "the text's tokens are keys too, which every process of a ring would add again"
    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    norm_q: nn.Module | None
    norm_k: nn.Module | None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.to_q, self.to_k, self.to_v))
        return q, k, v

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q if self.norm_q is None else self.norm_q(q), k if self.norm_k is None else self.norm_k(k)

    def _spread_with_text(
        self, x: Tensor, text: Sequence[Tensor], tables: Any, together: Together
    ) -> tuple[Tensor, Tensor]:
        """(y [B, l, H·K], z [B, n, H·K]) of x [B, l, D] and the text's q, k, v [B, n, H, K], normalised already.

        tables: the rotary positions of all of the video's tokens, two tables [L, K], or None.
        """
        line = self._opendit_sequence.line("sp")
        heads = evenly(self.heads, line.size)
        first = sum(heads[: line.rank])
        mine = [h[:, :, first : first + heads[line.rank]] for h in text]
        text_out: list[Tensor] = []

        def normalise(q: Tensor, k: Tensor, _: int) -> tuple[Tensor, Tensor]:
            q, k = self._normalise(q, k)
            if tables is None:
                return q, k
            # `fastseq` does this after tokens were exchanged, the others before.
            local, whole = q.shape[1], self._opendit_sequence.method == "fastseq"
            cos, sin = tables if whole else (of_part(table, 0, local, line.size) for table in tables)
            return turned(q, (cos, sin)), turned(k, (cos, sin))

        def attend(*video: Tensor) -> Tensor:
            y, z = together(video, [t.to(v.dtype) for t, v in zip(mine, video, strict=True)])
            text_out.append(z)
            return y

        y = self._spread(x, self.heads, normalise=normalise, attend=attend)
        (z,) = text_out
        return y, gather_heads(z, self.heads, line).flatten(2)


class JointStandIn(StandIn):
    """Takes the place of an attention in which both sequences see each other."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: object
    ) -> tuple[Tensor, Tensor]:
        x, e = hidden_states, encoder_hidden_states
        y = super().forward(torch.cat([x + e.mean(1, keepdim=True), e - x.mean(1, keepdim=True)], 1), **options)
        return y[:, : x.shape[1]], y[:, x.shape[1] :]


class _OnOne(nn.Module):
    """A joint attention as a module of one sequence, of which the first token is the text's."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.attn(x[:, 1:], x[:, :1]), dim=1)


def read_low_precision(planner: Planner, attn: nn.Module, width: int, *others: nn.Module) -> bool:
    """Whether a joint attention and `others` are the same under autocast for inputs in autocast's dtype."""
    low = planner.once(_jointly, attn, width)
    return low and all(planner.once(reads_low_precision, other, width) for other in others)


def _jointly(attn: nn.Module, width: int) -> bool:
    return reads_low_precision(_OnOne(attn), width)


def plan_joint_attention(
    planner: Planner, name: str, attn: Any, mixin: type[SpreadJointAttention], processor: str, *, masked: bool
) -> None:
    """Offers `mixin` to diffusers' Attention of a video and a text, as `processor` computes it.

    It is compared with positions of the video, and without; masked: the first time with a mask of the text, too.
    """
    if not comes_as(planner, name, attn, ATTENTION, processor):
        return
    width, K = attn.to_q.weight.shape[1], attn.to_q.weight.shape[0] // attn.heads

    def inputs(length: int, text: int, first: bool) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            tables = tuple(torch.randn(length, K, dtype=dtype) for _ in range(2))
            mask = torch.arange(length + text) < torch.tensor([length + text, length + 1])[:, None]
            sequences = (torch.randn(2, n, width, dtype=dtype) for n in (length, text))
            masks = (mask[:, None, None] if first else None,) if masked else ()
            return *sequences, *masks, {"image_rotary_emb": tables if first else None}

        return make

    dispatched = planner.offer(
        name,
        attn,
        mixin,
        f"q, k, v of video and text together{', and their mask,' if masked else ''} go to the chosen attention backend",
        [inputs(5, 3, True), inputs(130, 4, False)],
        keep_doubles=True,
    )
    if dispatched:
        planner.keep(
            name, "its norms, and rotation if any, run as torch's operations; under torch.compile they are fused"
        )
