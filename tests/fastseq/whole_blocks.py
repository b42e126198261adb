"""Cases for `test_whole_blocks`: blocks that are one function each, on a part of the tokens; and mistakes planted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opendit
import opendit.patch.adaln
from opendit.attention import attend, two_pass
from opendit.fastseq import Sequence, in_block
from opendit.fastseq.collectives import gather_tokens, split_tokens
from opendit.patch import block as block_file
from opendit.patch.core import plan_of
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
            # On four processes: all of them for one model, pairs for another.
            if heads >= sp and (world == 2 or (name, sp) in (("dit", 4), ("sit-odd", 2))):
                found[f"right/{name}/{sp}"] = functools.partial(_every_method, name, sp)
    found["frozen"] = functools.partial(_frozen, world)
    found["in parts"] = functools.partial(_in_parts, world)
    found["graphs"] = functools.partial(_graphs, world)
    found["wider"] = functools.partial(_wider, world)
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


def _graphs(world: int) -> list[bool]:
    """Whether blocks may be in graphs, by what was asked for; where not, it is said."""
    plain = build(next(t for t in TINY if t.name == "dit"))
    asked = []
    for how in (True, "collectives"):
        fast = opendit.accelerate(twin(plain), {"cuda_graphs": how, "sequence_parallel": "ulysses"}, sp_size=world)
        plan = plan_of(fast)
        assert plan is not None
        asked.append(plan.choices.graphs)
        assert plan.choices.graphs != any("no CUDA graphs with sp_size > 1" in kept.why for kept in plan.kept)
    return asked


def _wider(world: int) -> float:
    """Heads together wider than tokens, with a threshold for overlapping between the two."""
    heads, width, tokens = 4, 12, 11
    generator = torch.Generator().manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x, weight, bias = make(1, tokens, width), make(3 * heads * 8, width), make(3 * heads * 8)
    do = make(1, tokens, heads * 8)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    q, k, v = (leaves[0] @ leaves[1].T + leaves[2]).unflatten(2, (3, heads, 8)).unbind(2)
    out = attend(q, k, v, backend="reference").flatten(2)
    expected = torch.autograd.grad(out, leaves, do)
    attention = in_block.Attend(
        lambda q, k, v: two_pass.forward(q, k, v, "sdpa-math"),
        lambda da, q, k, v, a, more: two_pass.backward(da, q, k, v, a, more, "sdpa-math"),
        lambda dq, dk, dv, _: ((packed := torch.stack([dq, dk, dv], 1)), packed.sum(0).flatten()),
    )
    largest = 0.0
    for regather in (False, True):
        sequence = Sequence("fastseq", world, regather=regather)
        part, dpart = (split_tokens(t, world) for t in (x, do))
        threshold = 2 * part.numel()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_block, "overlaps", lambda t, _, least=threshold: t.numel() >= least)
            o, saved = in_block.forward(part, weight, bias, heads, sequence, attention)
            given = dpart, saved, weight, heads, sequence, attention
            dh, dw, db = in_block.fastseq_backward(*given, torch.empty_like(weight), torch.empty_like(bias))
        assert dw is not None
        assert db is not None
        for shared in (dw, db):
            dist.all_reduce(shared)
        found = gather_tokens(o, world), gather_tokens(dh, world), dw, db
        for a, e in zip(found, (out.detach(), *expected), strict=True):
            largest = max(largest, ((a - e).norm() / e.norm()).item())
    return largest


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
