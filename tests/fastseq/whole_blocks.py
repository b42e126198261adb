"""Cases for `test_whole_blocks`: blocks that are one function each, on a part of the tokens; and mistakes planted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

import opendit
import opendit.patch.adaln
from opendit.fastseq import in_block
from opendit.patch import block as block_file
from tests.comparing import Results, build, run, twin, worst
from tests.fastseq import parity
from tests.fastseq.whole_models import sizes
from tests.patch.plain_kernels import use_plain_kernels
from tests.tiny_models import TINY

METHODS = ("ulysses", "fastseq", "fastseq-overlapped", "fastseq-regather", "fastseq-overlapped-regather")
KEEP = (False, "selective", "full")
MODELS = {"dit": 4, "sit-odd": 3, "diffusers": 3}  # and their heads
WHOLE = {"fusion": "block", "kernels": "triton", "attention": "sdpa-flash"}


def cases(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, heads in MODELS.items():
        for sp in sizes(world):
            if heads >= sp:
                found[f"right/{name}/{sp}"] = functools.partial(_every_method, name, sp)
    found["frozen"] = functools.partial(_frozen, world)
    found["in parts"] = functools.partial(_in_parts, world)
    if world == 2:
        found |= {f"wrong/{name}": functools.partial(_wrong, world, name) for name in MUTANTS}
    return found


def _averaged(found: Results) -> Results:
    for name, value in found.items():
        if name not in ("output", "input"):
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return found


def _error(plain: nn.Module, name: str, sp: int, method: str, keep: Any) -> tuple[float, str]:
    tiny = next(t for t in TINY if t.name == name)
    calls: list[Any] = []
    named = {"sequence_parallel": method.split("-")[0], "activation_checkpointing": keep}
    fast = opendit.accelerate(twin(plain), WHOLE | named, sp_size=sp)
    parity.with_method(fast, method)
    with pytest.MonkeyPatch.context() as patch:
        use_plain_kernels(patch, block_file)
        original = opendit.patch.adaln.adaln_block
        patch.setattr(opendit.patch.adaln, "adaln_block", lambda *args: calls.append(args[3]) or original(*args))
        found = _averaged(run(fast, tiny))
    blocks = getattr(plain, "blocks", None) or plain.transformer_blocks
    assert len(calls) == len(blocks)
    assert all(static.sequence.method == method.split("-")[0] for static in calls)
    return worst(found, run(plain, tiny))


def _every_method(name: str, sp: int) -> list[tuple[float, str]]:
    plain = build(next(t for t in TINY if t.name == name))
    every = name == "dit" and dist.get_world_size() == 2
    pairs = [(m, k) for m in METHODS for k in KEEP] if every else list(zip(METHODS, (*KEEP, *KEEP), strict=False))
    return [(*_error(plain, name, sp, m, k), f"{m}, {k}") for m, k in pairs]


def _frozen(world: int) -> list[tuple[float, str]]:
    """No gradient of some parameters is wanted; others' are what they were."""
    plain = build(next(t for t in TINY if t.name == "dit"))
    for block in plain.blocks:
        block.attn.qkv.weight.requires_grad_(False)
        block.attn.proj.bias.requires_grad_(False)
        block.mlp.fc2.weight.requires_grad_(False)
    return [(*_error(plain, "dit", world, m, "selective"), m) for m in METHODS]


def _in_parts(world: int) -> str:
    """A method that a block can't compute itself is refused for whole blocks, and taken in parts otherwise."""
    plain = build(next(t for t in TINY if t.name == "dit"))
    with pytest.raises(ValueError, match="fusion: got 'block' with the method 'ring'") as refused:
        opendit.accelerate(twin(plain), WHOLE | {"attention": "auto", "sequence_parallel": "ring"}, sp_size=world)
    return str(refused.value)


@contextlib.contextmanager
def _replaced(name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_block, name, made(getattr(in_block, name)))
        yield


def _others(rows: Any) -> Any:
    def wrong(heads: int, sequence: Any) -> Any:
        found = rows(heads, sequence)
        return found._replace(first=heads - found.first - found.here)

    return wrong


def _swapped(packed: Any) -> Any:
    return lambda parts, *more: packed((parts[1], parts[0], parts[2]), *more)


def _scaled(backward: Any) -> Any:
    def wrong(do: Tensor, *args: Any) -> Any:
        return backward(do / dist.get_world_size(), *args)

    return wrong


def _unzeroed(backward: Any) -> Any:
    def wrong(*args: Any) -> Any:
        found = backward(*args)
        return found._replace(weight=found.weight + (found.weight == 0) * 0.1)

    return wrong


MUTANTS = {
    "others' heads": ("fastseq", lambda: _replaced("_rows", _others)),
    "dq and dk swapped": ("ulysses", lambda: _replaced("packed_tokens_first", _swapped)),
    "gradients of attention scaled": ("fastseq", lambda: _replaced("backward_through_heads", _scaled)),
    "others' rows not zero": ("fastseq", lambda: _replaced("fastseq_backward", _unzeroed)),
}


def _wrong(world: int, name: str) -> float:
    plain = build(next(t for t in TINY if t.name == "dit"))
    method, mistake = MUTANTS[name]
    with mistake():
        return _error(plain, "dit", world, method, "selective")[0]
