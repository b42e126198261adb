"""Blocks that alternate between frames and tokens, at any number of either, as one device; and mistakes seen."""

from __future__ import annotations

import pytest

from opendit.patch.families.latte import FAMILY as LATTE
from opendit.patch.planner import Planner
from opendit.patch.registry import Family
from opendit.patch.spreading import plan_spread
from tests.fastseq import alternating
from tests.launch import of_every_rank
from tests.tiny_models import UserLatte

CASES = [(world, case) for world in (2, 4) for case in alternating.cases(world)]


def found(world: int, case: str):
    return of_every_rank("tests.fastseq.alternating", world, case)


@pytest.mark.parametrize(
    ("world", "case"), [(w, c) for w, c in CASES if c.split("/")[0] in ("video", "images", "flash", "in place")]
)
def test_as_one_device(world: int, case: str):
    for loss, gradient, name in found(world, case):
        assert loss <= 1e-10
        assert gradient <= 1e-8, name


@pytest.mark.parametrize("world", [2, 4])
def test_images_may_be_left_out(world: int):
    for loss, gradient, name in found(world, "no images"):
        assert loss <= 1e-10
        assert gradient <= 1e-8, name


@pytest.mark.parametrize("world", [2, 4])
def test_blocks_may_be_one_function(world: int):
    assert max(found(world, "whole blocks")) <= 1e-5  # in fp32


@pytest.mark.parametrize(("world", "case"), [(w, c) for w, c in CASES if c.startswith("rows")])
def test_frames_and_tokens_drawn(world: int, case: str):
    for compared, worst, where in found(world, case):
        assert compared == 40
        assert worst <= 1e-10, where


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 2), (4, 4)])
def test_every_number_of_frames_and_tokens(world: int, sp: int):
    for compared, worst, where in of_every_rank("tests.fastseq.every_video", world, f"rows/{sp}", 3600.0):
        assert compared == len(alternating.FRAMES) * len(alternating.TOKENS)
        assert worst <= 1e-10, where


@pytest.mark.parametrize("mutant", alternating.MUTANTS)
def test_caught(mutant: str):
    assert min(found(4, f"mutant/{mutant}")) >= 1e-2


def test_a_family_that_does_not_say_how_is_refused():
    family = Family("mute", "", LATTE.traits, LATTE.plan, LATTE.blocks)
    with pytest.raises(NotImplementedError, match="sp_size: sequence parallelism is not implemented for family mute"):
        plan_spread(Planner(), UserLatte(), family)
