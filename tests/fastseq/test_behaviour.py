"""A spread model compiled, copied, restored, wrapped, checkpointed, explained, and refused where it can't be right."""

from __future__ import annotations

import pytest

from tests.fastseq import behaving
from tests.launch import of_every_rank

BESIDE = ("compiled", "compiled blocks", "inference", "full checkpointing", "fully_shard")
RIGHT = [name for name in behaving.cases(2) if name.split("/")[0] in BESIDE]


def found(case: str, world: int = 2):
    return of_every_rank("tests.fastseq.behaving", world, case)


@pytest.mark.parametrize("case", [*RIGHT, "lengths in flight"])
def test_right(case: str):
    assert max(found(case)) <= 1e-10


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_inputs_are_compared_where_blocks_are_compiled(name: str):
    for said in found(f"different inputs, compiled/{name}"):
        assert "were given different inputs (argument 0 of the model" in said


@pytest.mark.parametrize("case", [name for name in behaving.cases(2) if name.startswith("frozen/")])
def test_frozen_projections_cost_no_products(case: str):
    for error, saved in found(case):
        assert error <= 1e-10
        assert saved > 0


def test_groups_are_their_own_and_made_once():
    for holds in found("groups"):
        assert holds == [True] * 4


@pytest.mark.parametrize("name", behaving.NAMES)
def test_copies_are_spread_and_restore_is_exact(name: str):
    for errors in found(f"copies/{name}"):
        assert max(errors) <= 1e-5  # in fp32


@pytest.mark.parametrize("method", ["fastseq", "ulysses", "switch"])
def test_ddp_over_the_world_needs_no_scaling(method: str):
    for loss, gradient, name in found(f"ddp/{method}"):
        assert loss <= 1e-10
        assert gradient <= 1e-8, name


def test_bf16_autocast_is_about_as_exact_as_the_models_own():
    assert max(found("autocast")) <= 1.5


LAYER = {
    "fastseq": (["gather", "all_to_all_single"], ["all_to_all_single", "reduce-scatter"]),
    "ulysses": (["all_to_all_single"] * 2, ["all_to_all_single"] * 2),
}


@pytest.mark.parametrize("method", LAYER)
def test_two_collectives_a_layer_each_way_and_one_for_the_model(method: str):
    forward, backward = LAYER[method]
    for calls in found(f"calls/{method}"):
        assert calls["forward"] == [*forward * 2, "gather"]
        assert calls["backward"] == [*backward * 2, "gather"]


def test_one_collective_a_layer_where_blocks_alternate():
    """Four layers, spatial and temporal in turn: fewer than two a layer, the model's gather counted in."""
    for calls in found("calls/switch"):
        assert calls["forward"] == [*["all_to_all_single"] * 3, "gather"]
        assert calls["backward"] == [*["all_to_all_single"] * 3, "gather"]


def test_explain_shows_method_degree_groups_and_numbers():
    for text in found("explain/dit"):
        for said in ("chosen by auto", "sp 2, dp 1", "ranks that share", "received per layer", "GB/s", "assumed", "dp"):
            assert said in text
        for method in ("fastseq", "ulysses", "ring", "usp"):
            assert f"{method} " in text


def test_explain_shows_what_alternating_blocks_send():
    for text in found("explain/latte"):
        for said in (
            "switch (blocks alternate",
            "sp 2, dp 1",
            "received per block",
            "MiB forward",
            "frames of a process",
        ):
            assert said in text
        assert "blocks.{1,3} (2)" in text


def test_the_input_gathered_again_is_not_kept():
    for seen in found("regather"):
        kept, again = seen["shares"]
        assert again <= 0.55
        assert again <= kept - 0.02
        assert seen["compiled"] <= 1e-10
        assert "gathered again in the backward" in seen["said"]
        assert "no input is gathered again (regather_input): blocks that alternate" in seen["latte"]


SAID = {
    **{f"latte {m}": f"sequence_parallel: got '{m}', but this model's" for m in ("fastseq", "ulysses", "ring", "usp")},
    "latte's rows": "sp_size: the tokens of blocks.0 can't be spread over processes: it gives something else",
    "latte's dropout": "blocks.1.mlp.drop1 can't be spread over processes: dropout (p=0.1)",
    "latte's tokens": "was given 6 frames of 9 tokens",
    "wan fastseq": "got 'fastseq', but it computes q, k, v from rows of the weights, but q and k are normalised",
    "cogvideox ring": "got 'ring', but the text's tokens are keys too",
    "cogvideox usp": "got 'usp', but the text's tokens are keys too",  # three heads: a ring of two
    "divisor": "sp_size: got 3, but there are 2 processes; allowed: a divisor of that: 1, 2",
    "block": "fusion: got 'block' with the method 'ring' for sp_size > 1",
    "attention": "sequence_parallel: got 'ring', but blocks of keys",
    "adapted": "sequence_parallel: got 'fastseq', but it computes q, k, v from rows of the weights",
    "mlp": "sp_size: the tokens of blocks.0.mlp can't be spread over processes",
    "part": "sp_size=2: a layer was given 977 tokens",
    "hook": "use 'ulysses', 'ring' or 'usp'",
    "dropout": "dropout active in attention",
}


@pytest.mark.parametrize("what", SAID)
def test_refused_by_name(what: str):
    for said in found("refusals"):
        assert SAID[what] in said[what]
