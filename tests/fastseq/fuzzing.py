"""Cases for `test_fuzz`: attention alone, at any number of heads and tokens, against one device's.

Also among two sequences that are spread each, of any two numbers of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from opendit.attention import blockwise
from opendit.fastseq import Projection, SelfAttention, Sequence, joint, methods
from opendit.fastseq.collectives import gather_tokens, split_tokens
from opendit.fastseq.method import Pair
from tests.fastseq.whole_models import METHODS, sizes

HEADS = range(1, 18)
TOKENS = range(1, 66)


# Whole heads that don't divide, and rows as well as rings; every way is in `every_shape`.
JOINT = ("joint ulysses", "joint usp")


def draws(world: int, case: str) -> int:
    if case.startswith("joint"):
        return 2 if world == 2 else 1
    return 6 if world == 2 else 3  # four processes share two cores


def cases(world: int) -> dict[str, Any]:
    """Every number of heads, each with a few numbers of tokens, drawn."""
    found = [(m, sp) for sp in sizes(world) for m in (*METHODS, "fastseq-overlapped-regather")]
    found += [(method, world) for method in (JOINT if world == 2 else JOINT[1:])]
    return {f"{m}/{sp}": functools.partial(_case, m, sp, draws(world, m)) for m, sp in found}


def _case(method: str, sp: int, times: int) -> tuple[int, float, str]:
    """(how many were compared, the worst relative error, where)."""
    compared, worst, where = 0, 0.0, ""
    choose = random.Random(sp)
    for heads in HEADS:
        for tokens in choose.sample(TOKENS, times):
            batch = 1 + compared % 2
            if method.startswith("joint "):
                error = _joint_error(method.split()[1], sp, heads, (tokens, choose.choice(TOKENS)), batch)
            else:
                error = _error(method, sp, heads, tokens, batch, packed=compared % 3 > 0)
            compared += 1
            if not error <= worst:
                worst, where = error, f"{heads} heads, {tokens} tokens, batch {batch}"
    return compared, worst, where


class Layer(nn.Module):
    """q, k and v by one linear or three, in the shape that `SelfAttention` describes."""

    def __init__(self, heads: int, packed: bool) -> None:
        super().__init__()
        self.heads, width = heads, 2 * heads
        rows = [3 * width] if packed else [width] * 3
        self.linears = nn.ModuleList(nn.Linear(5, n, dtype=torch.float64) for n in rows)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.cat([linear(x) for linear in self.linears], dim=-1)
        q, k, v = rows.unflatten(-1, (3, self.heads, 2)).unbind(2)
        return q, k, v

    def description(self) -> SelfAttention:
        weights = tuple(linear.weight for linear in self.linears)
        biases = tuple(linear.bias for linear in self.linears)
        return SelfAttention(
            self.heads,
            self.project,
            Projection(weights, biases, None),
            turned,
            attend,
            Pair(blockwise.forward, blockwise.backward),
        )


def turned(q: Tensor, k: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """q and k [B, L, H, 2] turned by their tokens' positions, which begin at `first`."""
    angles = torch.arange(first, first + q.shape[1], dtype=q.dtype)[:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    return turn(q), turn(k)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _error(method: str, sp: int, heads: int, tokens: int, batch: int, packed: bool) -> float:
    torch.manual_seed(heads * 1000 + tokens)
    layer = Layer(heads, packed)
    x = torch.randn(batch, tokens, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch, tokens, 2 * heads, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    q, k, v = layer.project(x)
    out = attend(*turned(q, k, 0), v).flatten(2)
    expected = [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    name = method.split("-")[0]
    chosen = methods()[name]
    sequence = Sequence(name, sp, chosen.layout(sp, heads), overlap="-overlapped" in method)
    sequence = dataclasses.replace(sequence, regather="-regather" in method)
    out = gather_tokens(chosen.attention(split_tokens(x, sp), layer.description(), sequence), sp)
    actual = [out, *torch.autograd.grad((out * weights).sum(), leaves)]
    for grad in actual[2:]:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return _worst(actual, expected)


def _joint_error(method: str, sp: int, heads: int, tokens: tuple[int, int], batch: int) -> float:
    """Of attention among two sequences with layers of their own; queries and keys are scaled by where they are."""
    torch.manual_seed(heads * 1000 + tokens[0])
    layers = [Layer(heads, packed=True) for _ in tokens]
    xs = [torch.randn(batch, n, 5, dtype=torch.float64, requires_grad=True) for n in tokens]
    places = 1 + torch.rand(sum(tokens), 2, dtype=torch.float64)
    weights = torch.randn(batch, sum(tokens), 2 * heads, dtype=torch.float64)
    leaves = [*xs, *(p for layer in layers for p in layer.parameters())]

    def heads_of(parts: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        each = [layer.project(part) for layer, part in zip(layers, parts, strict=True)]
        q, k, v = (torch.cat(both, 1) for both in zip(*each, strict=True))
        return q * rows[:, None], k * rows[:, None], v

    out = attend(*heads_of(xs, places)).flatten(2)
    expected = [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    sequence = Sequence(method, sp, methods()[method].layout(sp, heads))
    parts = [split_tokens(x, sp) for x in xs]
    lengths = (parts[0].shape[1], parts[1].shape[1])
    q, k, v = heads_of(parts, joint.rows_of(places, lengths, sp))
    pair = Pair(blockwise.forward, blockwise.backward)
    mine = joint.joint_attention(q, k, v, lengths, attend, pair, sequence).flatten(2)
    out = torch.cat([gather_tokens(part, sp) for part in mine.split(lengths, 1)], 1)
    actual = [out, *torch.autograd.grad((out * weights).sum(), leaves)]
    for grad in actual[3:]:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return _worst(actual, expected)


def _worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    # A bias on every key moves no softmax: its gradient is nothing but rounding.
    least = 1e-3 * max(e.abs().max().item() for e in expected)
    return max(
        (a - e).abs().max().item() / max(e.abs().max().item(), least) for a, e in zip(actual, expected, strict=True)
    )
