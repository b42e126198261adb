"""Cases for `test_whole_models`: every sp × dp × method × {checkpointing, accumulation}, all families."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from torch import nn

import opendit
import opendit.fastseq.seed
from opendit.patch.registry import families
from tests.comparing import build, twin
from tests.fastseq import parity
from tests.tiny_models import TINY, Tiny

METHODS = ("fastseq", "fastseq-overlapped", "ulysses", "ring", "usp")
CHECKPOINTING = ("no", "reentrant", "non-reentrant")
MICROS = (1, 2)
# The first tiny model of each family that can be spread: four heads and three, 9 tokens, neither divides. Norms with
# weights on q and k, heads of 20: with two processes only.
FIRST = tuple({t.family: t.name for t in reversed(TINY) if families()[t.family].spread is not None}.values())
# Every layout for those whose attention is of a kind of its own; for others those that the layouts are made of.
ALL_WAYS = ("dit", "dit-qk-norm", "sit-odd", "diffusers")
SOME_WAYS = {2: ((2, "fastseq"), (2, "usp")), 4: ((4, "fastseq"), (4, "usp"), (2, "ulysses"))}
MODELS = {2: (*FIRST, "dit-qk-norm", "sit-odd"), 4: FIRST}


def sizes(world: int) -> list[int]:
    return [n for n in range(2, world + 1) if world % n == 0]


def names(world: int) -> list[str]:
    found = itertools.product(MODELS[world], sizes(world), METHODS)
    return ["/".join(map(str, c)) for c in found if c[0] in ALL_WAYS or c[1:] in SOME_WAYS[world]]


def cases(world: int) -> dict[str, Any]:
    return {name: functools.partial(_case, world, *name.split("/")) for name in names(world)}


@functools.cache
def _tiny(name: str) -> tuple[Tiny, nn.Module]:
    import torch

    tiny = next(t for t in TINY if t.name == name)
    return tiny, build(tiny, torch.float64)


@functools.cache
def _expected(name: str, dp: int, micros: int) -> Any:
    tiny, model = _tiny(name)
    return parity.alone(model, tiny, dp, micros)


def spread(model: nn.Module, method: str, sp: int) -> nn.Module:
    config = {"sequence_parallel": method.removesuffix("-overlapped"), "kernels": "reference"}
    opendit.accelerate(model, config, sp_size=sp)
    return parity.with_method(model, method) if method.endswith("-overlapped") else model


@functools.cache
def _spread_once(name: str, sp: int) -> nn.Module:
    """Planned once for all methods: looking at a model takes longer than running it."""
    return spread(twin(_tiny(name)[1]), "fastseq", sp)


def _case(world: int, name: str, size: str, method: str) -> dict[str, tuple[float, float, str]]:
    sp = int(size)
    tiny, _ = _tiny(name)
    model = parity.with_method(_spread_once(name, sp), method)
    found = {}
    # Four processes share two cores: there each kind of checkpointing with one number of micro-batches.
    pairs = itertools.product(CHECKPOINTING, MICROS) if world == 2 else zip(CHECKPOINTING, (1, 2, 2), strict=True)
    for kind, micros in pairs:
        with parity.checkpointing(model, kind):
            together = parity.together(model, tiny, micros)
        found[f"{kind}, {micros}"] = parity.errors(together, _expected(name, world // sp, micros))
    return found
