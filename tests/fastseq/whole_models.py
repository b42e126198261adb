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
REGATHER = ("fastseq-regather", "fastseq-overlapped-regather")
JOINT = ("ulysses", "ring", "usp")  # for image and text beside each other
# Their norms of q and k, or rotations, are upstream's in fp32, whatever the model is in. Three times a gradient is
# rounded otherwise there than the gradient: with three processes they agree to fp32's rounding only, which says little.
IN_FP32 = ("sd3.5", "flux", "flux-schnell")
CHECKPOINTING = ("no", "reentrant", "non-reentrant")
MICROS = (1, 2)
# The first tiny model of each family that can be spread: four heads and three, 9 tokens, neither divides. Norms with
# weights on q and k, heads of 20: with two processes only. LightningDiT turns q and k by positions.
# Latte: 3 frames and 5, the last two of them images; 4 tokens of a frame; its positions in time are trained too.
FIRST = tuple({t.family: t.name for t in reversed(TINY) if families()[t.family].spread is not None}.values())
# Every layout for those whose attention or way is of a kind of its own; for others those that the layouts are made of.
ALL_WAYS = ("dit", "dit-qk-norm", "sit-odd", "diffusers", "latte", "latte-text", "latte-img", "lightningdit-qk-norm")
# Image and text beside each other: whole heads, also three for four processes, a ring, and rows of rings.
JOINT_WAYS = {
    2: {"sd3.5": ((2, "ring"),), "flux-schnell": ((2, "ulysses"),)},
    4: {"sd3.5": ((4, "usp"),), "flux": ((4, "ulysses"), (2, "ring"))},
}
SOME_WAYS = {2: ((2, "fastseq"), (2, "usp")), 4: ((4, "fastseq"), (4, "usp"), (2, "ulysses"))}
MODELS = {
    2: (*FIRST, "dit-qk-norm", "sit-odd", "latte-text", "latte-img", "lightningdit-qk-norm", "flux-schnell"),
    4: (*FIRST, "latte-img"),
}
# diffusers' models of videos: a way or two each, rotated and not, of three heads and of four.
WITH_TEXT = ("wan", "cogvideox", "hunyuan-video")
VIDEOS = {
    2: ["wan/2/ulysses", "cogvideox-rotary/2/ulysses", "hunyuan-video/2/fastseq"],
    4: ["wan/4/usp", "cogvideox/4/fastseq"],
}


def joint(name: str) -> bool:
    return name.startswith(("sd3", "flux"))


def methods_of(name: str) -> tuple[str, ...]:
    if joint(name):
        return JOINT
    if name.startswith("wan"):  # whose q and k are normalised over all heads
        return ("ulysses", "ring", "usp")
    if name.startswith(("cogvideox", "hunyuan")):  # whose text attends too, to all keys; usp of 3 heads is a ring
        return (*METHODS[:3], *(("usp", *REGATHER) if name == "cogvideox-rotary" else ()))
    return ("switch",) if name.startswith("latte") else METHODS + (REGATHER if name == "dit" else ())


def sizes(world: int) -> list[int]:
    return [n for n in range(2, world + 1) if world % n == 0]


def names(world: int) -> list[str]:
    found = [(name, sp, m) for name in MODELS[world] for sp in sizes(world) for m in methods_of(name)]
    some = {name: JOINT_WAYS[world].get(name, ()) if joint(name) else SOME_WAYS[world] for name in MODELS[world]}
    some |= {name: () for name in some if name.startswith(WITH_TEXT)}
    return ["/".join(map(str, c)) for c in found if c[0] in ALL_WAYS or c[1:] in some[c[0]]] + VIDEOS[world]


def cases(world: int) -> dict[str, Any]:
    return {name: functools.partial(_case, world, *name.split("/")) for name in names(world)}


@functools.cache
def _tiny(name: str) -> tuple[Tiny, nn.Module]:
    import torch

    tiny = next(t for t in TINY if t.name == name)
    model = build(tiny, torch.float64)
    if hasattr(model, "temp_embed"):
        model.temp_embed.requires_grad_()
    return tiny, model


@functools.cache
def _expected(name: str, dp: int, micros: int) -> Any:
    tiny, model = _tiny(name)
    return parity.alone(model, tiny, dp, micros)


def spread(model: nn.Module, method: str, sp: int) -> nn.Module:
    named = "auto" if method == "switch" else method.split("-")[0]
    config = {"sequence_parallel": named, "kernels": "reference"}
    opendit.accelerate(model, config, sp_size=sp)
    return parity.with_method(model, method) if "-" in method else model


@functools.cache
def _spread_once(name: str, sp: int) -> nn.Module:
    """Planned once for all methods: looking at a model takes longer than running it."""
    return spread(twin(_tiny(name)[1]), methods_of(name)[0], sp)


def every_case(world: int) -> dict[str, Any]:
    """Without anything left out: every tiny model, each kind of checkpointing with each number of micro-batches."""
    return {
        f"{tiny.name}/{sp}": functools.partial(_every_method, world, tiny.name, sp)
        for tiny in TINY
        for sp in sizes(world)
        if families()[tiny.family].spread is not None and not (tiny.name in IN_FP32 and sp == 3)
    }


def _every_method(world: int, name: str, sp: int) -> dict[str, tuple[float, float, str]]:
    limited = name.startswith(("latte", *WITH_TEXT)) or joint(name)
    methods = methods_of(name) if limited else METHODS + REGATHER
    found = {}
    for method in methods:
        for how, errors in _case(world, name, str(sp), method, every=True).items():
            found[f"{method}, {how}"] = errors
    return found


def _case(world: int, name: str, size: str, method: str, every: bool = False) -> dict[str, tuple[float, float, str]]:
    sp = int(size)
    tiny, _ = _tiny(name)
    model = _spread_once(name, sp)
    if method != "switch":
        parity.with_method(model, method)
    found = {}
    # Processes share two cores: where they are four, each kind of checkpointing with one number of micro-batches.
    all_pairs = itertools.product(CHECKPOINTING, MICROS)
    pairs = all_pairs if every or world == 2 else zip(CHECKPOINTING, (1, 2, 2), strict=True)
    for kind, micros in pairs:
        with parity.checkpointing(model, kind):
            together = parity.together(model, tiny, micros)
        found[f"{kind}, {micros}"] = parity.errors(together, _expected(name, world // sp, micros))
    return found
