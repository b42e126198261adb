"""Cases for `test_pairs`: a batch shared by two processes, alone and with a sequence shared by others."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opendit
from opendit.fastseq import pairs
from opendit.patch import adaln, forward_only
from opendit.patch import block as block_file
from tests.comparing import twin
from tests.patch.plain_kernels import use_plain_kernels
from tests.sampling.drawing import euler, flow
from tests.sampling.test_table import build, cast_timesteps

TIMES = [999.0, 500.0, 17.0]
NAMES = {2: ("dit", "latte"), 4: ("dit", "latte")}


def cases(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES[world]:
        for sp in (1, 2)[: world // 2]:
            found[f"steps/{name}/{sp}"] = functools.partial(steps, name, sp, world)
    if world == 4:
        del found["steps/latte/1"]
    if world == 2:
        found["collectives"] = collectives
        found["guided"] = guided
        found["cached"] = cached
        found["refusals"] = refusals
        for method in ("fastseq", "ulysses"):
            found[f"whole blocks/{method}"] = functools.partial(whole_blocks, method)
        found["alike but not numbers"] = alike_but_not_numbers
    found["one pair's forward"] = one_pairs_forward
    found["ranks"] = functools.partial(ranks, world)
    return found


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def accelerated(model: nn.Module, sp: int = 1) -> nn.Module:
    return opendit.accelerate(twin(model), {"sampling": True, "cfg_parallel": True}, sp_size=sp)


@torch.no_grad()
def steps(name: str, sp: int, world: int) -> dict[str, float]:
    """Even batches, odd ones, one sample; step by step and looked up."""
    model, step = build(name)
    plain = cast_timesteps(twin(model))
    model = accelerated(model, sp)
    found = {}
    for looked_up in (False, True):
        for t, x in zip(TIMES, torch.randn((3, *step.x.shape), dtype=torch.float64), strict=True):
            if looked_up and t == TIMES[0]:
                run = opendit.sampling(model, TIMES)
                run.__enter__()
            found[f"{t}, {looked_up}"] = error(step(model, t, x), step(plain, t, x))
    run.__exit__(None, None, None)
    return found


@torch.no_grad()
def guided() -> dict[str, float]:
    """Guidance that pauses at both ends, where fewer rows are given."""
    plain = flow()
    model = accelerated(plain)
    times = [1000.0, 750.0, 500.0, 250.0]
    wanted = euler(plain, times, within=(300, 800))
    with opendit.sampling(model, times):
        return {"guided": error(euler(model, times, within=(300, 800)), wanted)}


@torch.no_grad()
def collectives() -> int:
    """How many a forward takes, once inputs were compared."""
    model, step = build("dit")
    model = accelerated(model)
    for _ in range(2):
        step(model, 17.0, step.x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, 17.0, step.x)
    return sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:"))


@torch.no_grad()
def cached() -> tuple[bool, str]:
    """Both calibrate to the same schedule, and draw the same with it."""
    model = accelerated(flow())
    times = [1000.0 - 125 * i for i in range(8)]
    cache = opendit.calibrate(model, lambda: euler(model, times), times, psnr=20)
    with opendit.sampling(model, times, cache):
        found = euler(model, times)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, (cache, found))
    return everyone[0][0] == everyone[1][0] and torch.equal(everyone[0][1], everyone[1][1]), cache.to_json()


@torch.no_grad()
def whole_blocks(method: str) -> dict[str, float]:
    """Blocks without a backward, on a part of the tokens: step by step and looked up."""
    model, step = build("dit")
    plain = cast_timesteps(twin(model))
    cfg = {"fusion": "block", "kernels": "reference", "attention": "sdpa-flash", "sequence_parallel": method}
    opendit.accelerate(model, {"sampling": True, **cfg}, sp_size=2)
    computed, found = [0], {}

    def counted(*args: Any) -> Tensor:
        computed[0] += 1
        return forward_only.forward_only(*args)

    with pytest.MonkeyPatch.context() as patch:
        use_plain_kernels(patch, block_file)
        patch.setattr(adaln, "resolve", lambda *_: "triton")
        patch.setattr(adaln, "forward_only", counted)
        for looked_up in (False, True):
            with opendit.sampling(model, TIMES) if looked_up else contextlib.nullcontext():
                for t in TIMES:
                    found[f"{t}, {looked_up}"] = error(step(model, t, step.x), step(plain, t, step.x))
    assert computed[0] == 2 * len(TIMES) * len(plain.blocks)
    return found


@torch.no_grad()
def one_pairs_forward() -> bool:
    """accelerate makes the groups, so the other pairs need no forward of their own."""
    pairs._built.clear()
    model, step = build("dit")
    model = accelerated(model)
    made = 1 in pairs._built
    if made and dist.get_rank() < 2:
        step(model, 17.0, step.x)
    return made


@torch.no_grad()
def alike_but_not_numbers() -> bool:
    model, step = build("dit")
    x = step.x.clone()
    x[0, 0, 0, 0] = float("nan")
    return bool(step(accelerated(model), 17.0, x).isnan().any())


@torch.no_grad()
def refusals() -> list[str]:
    model, step = build("dit")
    model = accelerated(model)
    said = []
    try:
        step(model, 17.0, step.x + dist.get_rank())
    except ValueError as error:
        said.append(str(error))
    try:
        opendit.accelerate(build("dit")[0], {"sampling": True, "cfg_parallel": True}, sp_size=2)
    except ValueError as error:
        said.append(str(error))
    return said


def ranks(world: int) -> tuple[int, int]:
    model = accelerated(build("dit")[0], world // 2)
    return opendit.data_parallel_rank(model), opendit.data_parallel_size(model)
