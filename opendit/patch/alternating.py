"""Videos over processes, for blocks that alternate between frames and tokens: mixins, and where they are planned.

    blocks[0]    FirstFrames     [R, T, D] ─ own frames ► [ρ, T, D] → block → ─ all-to-all ► [R, l, D]
    odd blocks   Tokens          [B·l, F, D] → block, with the condition's rows of these tokens
    even blocks  Frames          [R, l, D] ─ all-to-all ► [ρ, T, D] → block → ─ all-to-all ► [R, l, D]
    last module  GatherTokens    → [R, l, C] ─ all-gather ► [R, T, C]

B samples, F frames of each, R of all, T tokens of a frame, D hidden; ρ frames and l tokens of one process. N blocks
have N collectives each way. Between blocks the model's own forward sees all frames of some tokens, so what it does with
frames (temporal positions, images set apart) stays its own. Every row of a block is whole, so any block will do that
treats rows one by one: fused as a whole, left to upstream, with any attention.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from opendit.fastseq import switch
from opendit.fastseq.shards import local_length
from opendit.patch.core import Patched
from opendit.patch.planner import Planner, parameters_of_forward
from opendit.patch.probe import separable
from opendit.patch.registry import Alternating, Family
from opendit.patch.spread import ComparesInputs, refuse
from opendit.patch.spreading import cannot, plan_gather, put_around, whole_blocks


class _Rows(Patched):
    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
        """(x, c, T, sp) of a call with x [rows, length, D] and c [rows, C]."""
        values = self._positional(args, kwargs)
        if values is None or values[0].dim() != 3 or values[1].dim() != 2:
            refuse(
                "a block was called with something else than its rows [rows, L, D] and a condition [rows, C] for each"
            )
        sequence = self._opendit_sequence
        return values[0], values[1], sequence.tokens, sequence.size

    def _run(self, x: Tensor, c: Tensor) -> Tensor:
        return cast(Any, super()).forward(x, c)


class FirstFrames(_Rows, ComparesInputs):
    """Around the first block: this process's frames of all, and then all frames of its tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, c, tokens, sp = self._given(args, kwargs)
        self._compare_inputs(x, c)
        _check(x, c, tokens, "all")
        local_length(tokens, sp)
        return switch.to_tokens(self._run(switch.mine_of(x, sp), switch.frames_of(c, sp)), len(x), sp)


class Frames(_Rows):
    """Around the other blocks that look within a frame."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, c, tokens, sp = self._given(args, kwargs)
        _check(x, c, local_length(tokens, sp), "this process's")
        return switch.to_tokens(self._run(switch.to_frames(x, tokens, sp), switch.frames_of(c, sp)), len(x), sp)


class Tokens(_Rows):
    """Around a block that looks within the frames of a token."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, c, tokens, sp = self._given(args, kwargs)
        local = local_length(tokens, sp)
        if len(c) % tokens or len(x) != len(c) // tokens * local:
            refuse(
                f"a block that looks within the frames of a token was given {len(x)} rows and {len(c)} conditions, "
                f"where each sample has {local} of {tokens} tokens on this process; the model's tokens must stay "
                "as many as they were when accelerate was called"
            )
        return self._run(x, switch.tokens_of(c, tokens, sp))


def _check(x: Tensor, c: Tensor, length: int, whose: str) -> None:
    if x.shape[1] != length or len(x) != len(c):
        refuse(
            f"a block that looks within a frame was given {len(x)} frames of {x.shape[1]} tokens, and {len(c)} "
            f"conditions; expected {whose} {length} tokens of a frame, by pos_embed as it was when accelerate was "
            "called, and a condition for each frame"
        )


def plan_alternating(planner: Planner, model: nn.Module, family: Family) -> None:
    """Adds the switches of layout and the gather to what is planned.

    Raises `ValueError`, naming the module, where a block does not treat rows one by one.
    """
    spread = family.spread
    assert isinstance(spread, Alternating)
    for i, (fqn, block) in enumerate(whole_blocks(model, family)):
        if len(parameters_of_forward(block)) != 2:
            raise cannot(fqn, f"its forward takes ({', '.join(parameters_of_forward(block))}), not rows and conditions")
        if not planner.once(_row_by_row, block, _width(block)):
            raise cannot(fqn, "it gives something else for a part of its rows, or can't be run on a CPU to find out")
        if i == 0:
            put_around(planner, fqn, FirstFrames, "on this process's frames, then all frames of its tokens")
        elif i % 2 == 0:
            put_around(planner, fqn, Frames, "on this process's frames, exchanged for tokens before and after")
        else:
            put_around(planner, fqn, Tokens, "on all frames of this process's tokens")
    plan_gather(planner, model, spread.gather)


def video_shape(model: nn.Module, family: Family) -> tuple[int, int, int]:
    """(frames, tokens of one, hidden size) that the model is built for."""
    assert isinstance(family.spread, Alternating)
    first = family.blocks_of(model)[0][1]
    return family.spread.frames(model), family.spread.tokens(model), _width(first)


def _width(block: nn.Module) -> int:
    """Of its rows, and of their conditions."""
    return next(m.in_features for m in block.modules() if isinstance(m, nn.Linear))


def _row_by_row(block: nn.Module, width: int) -> bool:
    return separable(block, torch.Size((4, 6, width)), (0,), torch.Size((4, width)))
