"""Tensors divided among processes as flat ranges: what torch's clipping does to them, and what is refused."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import opendit
from opendit.divided_optimizer import DividedOptimizer
from tests.launch import of_every_rank


def outcome(case: str) -> list:
    return of_every_rank("tests.dividing", 2, case)


def test_norms_are_those_of_the_whole():
    assert max(outcome("norms")) < 1e-12


def test_what_is_not_finite_in_one_process_is_so_for_all():
    assert outcome("nan") == [[], []]


def test_changes_in_place_are_those_of_the_whole():
    assert outcome("in place") == [[], []]


def test_anything_else_is_refused():
    for messages in outcome("refused"):
        assert len(messages) == 5
        for message in messages:
            assert "on a tensor that is divided over processes; allowed: norms" in message
            assert ".full_tensor()" in message


def test_it_is_a_piece():
    first, second = outcome("whole")
    assert (first["range"], second["range"]) == ((0, 8), (8, 15))
    for found in (first, second):
        assert found["shape"] == (3, 5)
        assert found["shares memory"]
        assert found["repr"].startswith("Divided(shape=(3, 5), [")
        assert found["detached"] == "Divided"


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("attached", [False, True])
def test_an_optimizer_over_what_is_divided_can_not_be_copied(copied, attached):
    model = opendit.accelerate(nn.MultiheadAttention(8, 2), {"skip_nonfinite": True}, family="generic")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    around = DividedOptimizer.around(inner, SimpleNamespace(groups=[list(model.parameters())], shares={}))
    if attached:
        opendit.attach(model, around)
    with pytest.raises(TypeError, match=r"optimizer: SGD steps what an engine divided, and can't be copied or pickled"):
        copied(around)
