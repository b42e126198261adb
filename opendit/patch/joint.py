"""What blocks of two sequences, a video's tokens x and a text's e, are probed with.

Shapes: x [B, L, D], e [B, Lt, D]. Their attention takes (x, e) and gives both back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opendit.patch.planner import Planner
from opendit.patch.probe import StandIn, reads_low_precision


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
