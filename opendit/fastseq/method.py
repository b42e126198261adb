"""What a method is: attention over a sequence that is spread, and what it costs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opendit.fastseq.sequence import Sequence

_Heads = tuple[Tensor, Tensor, Tensor]


class Projection(NamedTuple):
    """The rows of q, k, v as parameters: one packed [3·H·K, D] (q's rows first), or three of [H·K, D]."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]  # as many as weights, or none
    dtype: torch.dtype | None  # what autocast computes it in; None: as it is


class Pair(NamedTuple):
    """Attention of one block of keys, forward and backward; every tensor [B, L, H, K], lse [B, H, Lq].

    `forward(q, k, v)` gives out and the logarithm of the softmax's denominators. `backward(dout, q, k, v, out, lse)`
    gives dq, dk, dv; out and lse may be those of more keys than k holds, dk and dv are then this block's share.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], _Heads]


@dataclass(frozen=True)
class SelfAttention:
    """A layer's attention up to its output projection, in the pieces that methods put together.

    Attributes:
        heads: H.
        project: [B, l, D] → q, k, v [B, l, H, K], by the layer's own modules.
        projection: the same as parameters, or why it can't be taken apart.
        normalise: q, k of the tokens from the n-th on, and n → q, k, each vector of K by itself.
        attend: q, k, v [B, L, h, K] → [B, L, h, K].
        pair: attention of one block of keys.
    """

    heads: int
    project: Callable[[Tensor], _Heads]
    projection: Projection | str
    normalise: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    pair: Pair


class Shape(NamedTuple):
    """What costs depend on: tokens, hidden size, heads, bytes of a number."""

    tokens: int
    width: int
    heads: int
    itemsize: int


def attention_operations(shape: Shape) -> float:
    """Of one layer's attention, forward (4·L²·D) and backward (2.5 times that), per sample."""
    return 3.5 * 4 * shape.tokens**2 * shape.width


def uneven_heads(shape: Shape, size: int) -> float:
    """`Method.extra` where processes compute whole heads: attention and the projection before it follow them."""
    most = -(-shape.heads // size)
    follows = 3 * 6 * shape.tokens * shape.width**2 + attention_operations(shape)
    return follows * (most / shape.heads - 1 / size)


class Method(Protocol):
    """One way to compute attention over a sequence of which each process has a part."""

    name: str

    def layout(self, size: int, heads: int) -> int:
        """The ring size to use for `size` processes."""

    def extra(self, shape: Shape, size: int) -> float:
        """Operations that the busiest process spends on a layer beyond an even share; both passes, per sample."""

    def calls(self, size: int, heads: int) -> tuple[int, int]:
        """How many collectives one layer's forward and its backward wait for, one after the other."""

    def received(self, shape: Shape, size: int) -> tuple[float, float]:
        """Bytes that each process receives in one layer's forward and in its backward, per sample."""

    def attention(self, x: Tensor, layer: SelfAttention, sequence: Sequence) -> Tensor:
        """[B, l, D] → [B, l, H·K], padding tokens' rows holding anything finite."""


_found: dict[str, Method] = {}


def methods() -> dict[str, Method]:
    """Every method by name: what the files of this package end in as ``METHOD``."""
    if not _found:  # not functools.cache, through which torch.compile would trace to the imports
        package = importlib.import_module("opendit.fastseq")
        for info in pkgutil.iter_modules(package.__path__):
            method: Method | None = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "METHOD", None)
            if method is not None:
                _found[method.name] = method
    return _found
