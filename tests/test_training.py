from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch

import opendit
from opendit.training import training_of
from tests.comparing import build
from tests.tiny_models import TINY


def test_what_accelerate_did_is_remembered_until_restore():
    model, optimizer = opendit.accelerate(build(TINY[0]), {"fusion": "adaln"}, optimizer=partial(torch.optim.SGD, lr=1))
    known = training_of(torch.compile(model))
    assert known.cfg.fusion == "adaln"
    assert known.sp_size == 1
    assert known.engine is None
    assert known.placed() is model
    assert known.optimizer() is optimizer
    opendit.restore(model)
    assert training_of(model) is None


def test_remembering_keeps_nothing_alive():
    model, optimizer = opendit.accelerate(build(TINY[0]), optimizer=partial(torch.optim.SGD, lr=1))
    known, gone = training_of(model), weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert known.optimizer() is None
    with pytest.raises(ValueError, match="the wrapper that accelerate returned is gone"):
        known.placed()


def test_no_sync_of_a_plain_model_does_nothing():
    model = build(TINY[0])
    with opendit.no_sync(model):
        pass
    with opendit.no_sync(opendit.accelerate(model)):
        pass
    with pytest.raises(TypeError, match="model: got str"):
        opendit.no_sync("model")
    with pytest.raises(ValueError, match=r"plugin='zero2'; allowed here: None"):
        opendit.verify(build(TINY[0]), (torch.zeros(2),), {"plugin": "zero2"})


def test_a_plugin_that_an_engine_has_not_is_refused_by_name():
    with pytest.raises(ValueError, match=r"plugin: got 'zero3' with engine='colossalai'; allowed with it: "):
        opendit.accelerate(build(TINY[0]), {"plugin": "zero3", "engine": "colossalai"})
