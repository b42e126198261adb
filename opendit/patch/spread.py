"""Blocks on a part of the tokens: the mixins that split and gather, and attention over processes.

    blocks[0]    SplitTokens around its own mixin: [B, L, D] → its process's part [B, l, D], then the block
    attention    SpreadAttention: one of opendit.fastseq's methods instead of `attend`
    last module  GatherTokens around its own mixin: the module, then [B, l, C] → [B, L, C]

All else in a block must treat tokens one by one, and norms of q and k one head at a time: `spreading.py` sees to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opendit.attention import attend, blockwise
from opendit.fastseq import Projection, SelfAttention, inputs, methods
from opendit.fastseq.collectives import gather_tokens, split_tokens
from opendit.fastseq.joint import joint_attention, rows_of
from opendit.fastseq.method import Pair
from opendit.fastseq.shards import total_length
from opendit.patch.core import Patched, autocast_dtype
from opendit.patch.parts import Sublayer, plain_linear

_Heads = tuple[Tensor, Tensor, Tensor]
_PAIR = Pair(blockwise.forward, blockwise.backward)

# How often a model's inputs were compared so far, in training steps and otherwise: only training steps are sure to be
# taken by all groups alike, and are compared among all. Outside the modules, as everything that mixins remember.
_compared: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()


class ComparesInputs(Patched):
    """Base of what stands around the first block: its arguments must be alike on all that share a sequence."""

    _opendit_place: ClassVar[str] = "the first block"

    def _compare_inputs(self, *values: Any) -> None:
        if torch.compiler.is_compiling():
            return
        module = cast(nn.Module, self)
        training = module.training and torch.is_grad_enabled()
        times = _compared.setdefault(module, {})
        if times.get(training, 0) < inputs.STEPS:
            times[training] = times.get(training, 0) + 1
            tensors = [value for value in values if isinstance(value, Tensor)]
            size, place = self._opendit_sequence.size, self._opendit_place
            said = inputs.compare(tensors, size, training=training, of=place) if tensors else None
            if said is not None:
                self._note(said)


class ComparesModelInputs(ComparesInputs):
    """Around the model whose blocks are compiled one by one: a traced first block compares nothing."""

    _opendit_place = "the model"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._compare_inputs(*args, *kwargs.values())
        return cast(Any, super()).forward(*args, **kwargs)


class SplitTokens(ComparesInputs):
    """Around the first block: it gets this process's part of its first argument."""

    streams: ClassVar[int] = 1  # how many of its arguments are sequences

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._compare_inputs(*args, *kwargs.values())
        sp, n = self._opendit_sequence.size, self.streams
        args = (*(split_tokens(x, sp) for x in args[:n]), *args[n:])
        named = self._opendit_parameters[len(args) : n]
        kwargs = {**kwargs, **{name: split_tokens(kwargs[name], sp) for name in named if name in kwargs}}
        return cast(Any, super()).forward(*args, **kwargs)


class SplitStreams(SplitTokens):
    """The same for a block of two streams, which are its first two arguments."""

    streams = 2


class ChecksArguments(Patched):
    """Base of what stands around a model whose forward may do something between blocks that takes all tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        why = self._needs_all_tokens({**dict(zip(self._opendit_parameters, args, strict=False)), **kwargs})
        if why is not None:
            refuse(why)
        return cast(Any, super()).forward(*args, **kwargs)

    def _needs_all_tokens(self, given: dict[str, Any]) -> str | None:
        """What in the model's arguments does so, by name, or None."""
        raise NotImplementedError


class GatherTokens(Patched):
    """Around the last module that works token by token: what it returns is gathered."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return gather_tokens(cast(Any, super()).forward(*args, **kwargs), self._opendit_sequence.size)


class OnPart(Patched):
    """Base of mixins that may be given a part of the tokens, for which upstream's own forward may not do."""

    def _in_parts_of_a_sequence(self) -> bool:
        sequence = self._opendit_sequence
        return sequence is not None and sequence.in_attention

    def _length(self, x: Tensor) -> int:
        """How many tokens the sequence has of which x [B, l, D] holds all, or a part."""
        return total_length(x.shape[1], self._opendit_sequence.size) if self._in_parts_of_a_sequence() else x.shape[1]

    def _upstream(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        if self._in_parts_of_a_sequence():
            refuse(
                f"{type(self)._opendit_base.__name__} would have to run upstream's own forward ({reason}), which sees "
                "a part of the tokens only"
            )
        return super()._upstream(reason, *args, **kwargs)


class SpreadAttention(OnPart, Sublayer):
    """Base of attention mixins that can work on a part of the tokens."""

    # By name: the linears that give q, k, v (one packed, or three), and the modules that `_normalise` calls.
    projections: ClassVar[tuple[str, ...]]
    per_head: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    # Why q, k, v can't be computed for some heads only, as `fastseq` does; None where they can.
    all_heads: ClassVar[str | None] = None
    # Why keys can't come in blocks, as `ring` has them; None where they can.
    all_keys: ClassVar[str | None] = None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, L, H, K] of x [B, L, D]."""
        raise NotImplementedError

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def _spread(
        self,
        x: Tensor,
        heads: int,
        project: Callable[[Tensor], _Heads] | None = None,
        normalise: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attention of all processes' tokens for this one's, [B, l, D] → [B, l, H·K]; before the output projection.

        project, normalise, attend: instead of the mixin's own, where they need more than they are given; see
            `SelfAttention`.
        """
        sequence = self._opendit_sequence
        layer = SelfAttention(
            heads=heads,
            project=project or self._project,
            projection=self.all_heads or _projection(x, tuple(getattr(self, name) for name in self.projections)),
            normalise=normalise or (lambda q, k, first: self._normalise(q, k)),
            attend=attend or self._attend,
            pair=_PAIR,
        )
        return methods()[sequence.method].attention(x, layer, sequence)

    def _spread_jointly(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The same among several sequences, for this process's parts of them: [B, Σ l_j, H, K] → [B, Σ l_j, H·K]."""
        return joint_attention(q, k, v, lengths, self._attend, _PAIR, self._opendit_sequence).flatten(2)

    def _rows_of_parts(self, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Of x [Σ L_j, K] the rows of this process's tokens, [Σ l_j, K]."""
        return rows_of(x, lengths, self._opendit_sequence.size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, backend=self._opendit_attention)


def _projection(x: Tensor, linears: tuple[nn.Module, ...]) -> Projection | str:
    if not plain_linear(*linears):
        return "its linears are not torch's own, or something was put on them"
    weights = tuple(cast(nn.Linear, linear).weight for linear in linears)
    biases = tuple(b for linear in linears if (b := cast(nn.Linear, linear).bias) is not None)
    if len(biases) not in (0, len(weights)):
        return "only some of q, k and v have a bias"
    return Projection(weights, biases, autocast_dtype(x))


def refuse(why: str) -> NoReturn:
    raise ValueError(f"sp_size: {why}; leave sp_size at 1 for this model")
