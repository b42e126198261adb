"""What "auto" takes at which shapes, with speeds made up; parts of a sequence; groups that can't be had."""

from __future__ import annotations

import pytest
import torch

import opendit
from opendit.fastseq import methods, shards
from opendit.fastseq.choice import Speeds, waiting
from opendit.fastseq.method import Shape
from tests.comparing import build
from tests.tiny_models import TINY

WIRE = Speeds(link=200e9, gemm=600e12, latency=1e-9, origin="made up")
LAUNCHES = Speeds(link=1e18, gemm=1e21, latency=60e-6, origin="made up")


def cheapest(shape: Shape, size: int, speeds: Speeds) -> str:
    return min(methods(), key=lambda name: (waiting(methods()[name], shape, size, speeds), name))


@pytest.mark.parametrize(
    ("heads", "size", "speeds", "expected"),
    [
        (16, 2, WIRE, "fastseq"),  # a quarter fewer bytes
        (16, 4, WIRE, "ulysses"),
        (16, 8, WIRE, "ulysses"),
        (2, 8, WIRE, "usp"),  # whole heads would keep six processes waiting
        (1, 4, WIRE, "ring"),
        (16, 8, LAUNCHES, "ulysses"),  # two calls, as FastSeq, but not seven
    ],
)
def test_cheapest(heads: int, size: int, speeds: Speeds, expected: str):
    assert cheapest(Shape(16384, 1152, heads, 2), size, speeds) == expected


@pytest.mark.parametrize("name", sorted(methods()))
def test_more_tokens_cost_more_and_a_slower_link_too(name: str):
    few, many = Shape(1024, 1152, 16, 2), Shape(4096, 1152, 16, 2)
    method = methods()[name]
    assert waiting(method, few, 4, WIRE) < waiting(method, many, 4, WIRE)
    assert waiting(method, few, 4, WIRE) < waiting(method, few, 4, WIRE._replace(link=1e9))


def test_each_local_length_stands_for_one_length():
    sp = 1000003  # a size that no other test uses: the lengths seen are the process's
    locals_of = {total: shards.local_length(total, sp) for total in (5, 6, 7, 2 * sp, 2 * sp - 1)}
    assert len(set(locals_of.values())) == len(locals_of)
    for total, local in locals_of.items():
        assert local >= total / sp
        assert shards.total_length(local, sp) == total
        assert sum(shards.real(total, local, rank) for rank in range(10)) == min(total, 10 * local)
    with pytest.raises(ValueError, match="sp_size=1000003: a layer was given 77 tokens"):
        shards.total_length(77, sp)


def test_long_padding_is_said_once_and_multiples_have_none(caplog):
    sp = 44  # sizes that no other test uses
    lengths = range(100 * sp, 110 * sp)
    with caplog.at_level("WARNING", logger="opendit"):
        assert all(shards.local_length(total, sp) == total // sp for total in lengths[::sp])
        assert not caplog.records
        locals_of = [shards.local_length(total, sp) for total in lengths]
    assert max(locals_of) == 100 + len(lengths) - 1
    assert [record.getMessage().count("multiples of sp_size") for record in caplog.records] == [1]


def test_chosen_for_where_an_engine_takes_the_model(monkeypatch):
    from opendit import plan

    monkeypatch.setattr(plan, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    model = torch.nn.Linear(2, 2)
    for plugin, there in ((None, "cpu"), ("ddp", "cpu"), ("zero3", "cuda:1"), ("gemini", "cuda:1")):
        assert str(plan._placed_on(model, opendit.BoosterConfig(plugin=plugin))) == there


def test_heads_are_spread_evenly():
    assert shards.evenly(7, 3) == [3, 2, 2]
    assert shards.evenly(2, 4) == [1, 1, 0, 0]


def test_without_processes_it_says_how_to_start_some():
    with pytest.raises(ValueError, match=r"sp_size: got more than 1.*torchrun --nproc-per-node"):
        opendit.accelerate(build(TINY[0]), sp_size=2)
    assert (opendit.data_parallel_rank(build(TINY[0])), opendit.data_parallel_size(build(TINY[0]))) == (0, 1)


def test_seed():
    state = torch.get_rng_state()
    assert opendit.seed(4, build(TINY[0])) == 4
    assert not torch.equal(torch.get_rng_state(), state)
    for wrong, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed: got"):
            opendit.seed(wrong, build(TINY[0]))
