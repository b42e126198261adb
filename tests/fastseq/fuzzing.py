"""Cases for `test_fuzz`: attention alone, at any number of heads and tokens, against one device's."""

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
from opendit.fastseq import Projection, SelfAttention, Sequence, methods
from opendit.fastseq.collectives import gather_tokens, split_tokens
from opendit.fastseq.method import Pair
from tests.fastseq.whole_models import METHODS, sizes

HEADS = range(1, 18)
TOKENS = range(1, 66)


def draws(world: int) -> int:
    return 6 if world == 2 else 3  # four processes share two cores


def cases(world: int) -> dict[str, Any]:
    """Every number of heads, each with a few numbers of tokens, drawn."""
    return {
        f"{method}/{sp}": functools.partial(_case, method, sp, draws(world))
        for sp in sizes(world)
        for method in (*METHODS, "fastseq-overlapped-regather")
    }


def _case(method: str, sp: int, times: int) -> tuple[int, float, str]:
    """(how many were compared, the worst relative error, where)."""
    compared, worst, where = 0, 0.0, ""
    choose = random.Random(sp)
    for heads in HEADS:
        for tokens in choose.sample(TOKENS, times):
            batch = 1 + compared % 2
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
    # A bias on every key moves no softmax: its gradient is nothing but rounding.
    least = 1e-3 * max(e.abs().max().item() for e in expected)
    return max(
        (a - e).abs().max().item() / max(e.abs().max().item(), least) for a, e in zip(actual, expected, strict=True)
    )
