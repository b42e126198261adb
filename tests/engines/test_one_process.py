"""Engines in one process, a world of one: checks before anything is divided, optimizers that come later, undoing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import opendit
from opendit.engines import Setup
from opendit.engines import colossalai as adapter
from opendit.engines import colossalai_gemini as gemini
from opendit.engines import colossalai_shared as shared
from opendit.fastseq import mesh
from tests.comparing import build
from tests.stepping_cases import loss_of
from tests.tiny_models import TINY


@pytest.fixture(autouse=True)
def leave_no_world():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("more", [{}, {"skip_nonfinite": True}])
def test_after_a_step_of_an_optimizer_that_came_later_a_forward_has_the_new_parameters(more, caplog):
    losses = []
    for given in (True, False):
        cfg = {"plugin": "zero2", "kernels": "reference", **more}
        model = build(TINY[0]).eval()
        if given:
            model, optimizer = opendit.accelerate(model, cfg, optimizer=sgd(model))
            assert "opendit.attach" not in caplog.text
        else:
            model = opendit.accelerate(model, cfg)
            optimizer = opendit.attach(model, opendit.attach(model, sgd(model)))
        loss_of(model, 0).backward()
        before = loss_of(model, 0).item()  # leaves what it gathered
        optimizer.step()
        losses.append((before, loss_of(model, 0).item()))
        assert len(optimizer._optimizer_step_post_hooks) == 1
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    assert "opendit.attach(model, optimizer)" in caplog.text


def test_an_optimizer_that_nobody_can_attach_is_refused_before_anything_is_divided():
    model = build(TINY[0])
    kinds, parameters = [type(m) for m in model.modules()], list(model.parameters())
    with pytest.raises(ValueError, match="optimizer: got LBFGS"):
        opendit.accelerate(model, {"plugin": "zero2", "ema": 0.5}, optimizer=torch.optim.LBFGS(model.parameters()))
    assert [type(m) for m in model.modules()] == kinds
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    opendit.accelerate(model)


@pytest.mark.parametrize(
    ("factory", "error", "says"),
    [
        (torch.optim.LBFGS, ValueError, "optimizer: got LBFGS"),
        (list, TypeError, "the factory returned list"),
        (functools.partial(torch.optim.SGD, lr=-1.0), ValueError, "Invalid learning rate"),
    ],
)
@pytest.mark.parametrize("plugin", ["zero2", "ddp"])
def test_a_factory_of_no_use_is_refused_before_anything_is_divided(factory, error, says, plugin):
    model = build(TINY[0])
    kinds, parameters = [type(m) for m in model.modules()], list(model.parameters())
    with pytest.raises(error, match=says):
        opendit.accelerate(model, {"plugin": plugin, "ema": 0.5, "kernels": "reference"}, optimizer=factory)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    opendit.accelerate(model)


def test_restore_leaves_nothing_on_the_optimizer():
    model = build(TINY[0])
    optimizer = sgd(model)
    for _ in range(2):
        wrapped, same = opendit.accelerate(model, {"plugin": "ddp", "kernels": "reference"}, optimizer=optimizer)
        assert same is optimizer
        assert len(optimizer._optimizer_step_post_hooks) == 1
        assert opendit.restore(wrapped) is model
        assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("cfg", "sp_size", "timeout"),
    [
        ({"plugin": "ddp"}, 1, 600.0),
        ({"plugin": "ddp"}, 2, 600.0),
        ({"plugin": "ddp", "timeout": 30}, 2, 30),
        ({}, 2, None),
    ],
)
def test_the_groups_time_out_is_the_configs(monkeypatch, cfg, sp_size, timeout):
    class Enough(Exception): ...

    def ensure(*args: Any, timeout: float | None = None, **options: Any) -> None:
        found.append(timeout)
        raise Enough

    found: list[float | None] = []
    monkeypatch.setattr(mesh, "ensure_world", ensure)
    with pytest.raises(Enough):
        opendit.accelerate(build(TINY[0]), cfg, sp_size=sp_size)
    assert found == [timeout]


def setup(plugin: str, **more: str) -> Setup:
    asked = {"precision": "bf16", "reduction": "bf16", **more}
    return Setup(plugin, asked["precision"], asked["reduction"], 1, (), (), torch.device("cpu"))


def test_colossalai_is_not_asked_for_what_it_can_not_on_a_cpu(monkeypatch):
    for module in (adapter, gemini):
        monkeypatch.setattr(module, "colossalai", lambda: None)
    factory = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"reduction: got 'bf16' with plugin='ddp' for a model on cpu"):
        adapter.DDP().check(nn.Linear(2, 2), factory, setup("ddp"))
    gemini.Gemini().check(nn.Linear(8192, 4095, device="meta"), factory, setup("gemini"))
    with pytest.raises(ValueError, match=r"plugin: got 'gemini' for a model of 33558528 parameters on cpu"):
        gemini.Gemini().check(nn.Linear(8192, 4096, device="meta"), factory, setup("gemini"))


def test_a_refused_optimizer_keeps_its_groups():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": m.parameters()} for m in model], lr=0.1)
    for refused in (shared.trained_groups, lambda o: shared.check_optimizer("zero1", model, o)):
        with pytest.raises(ValueError, match="its group 1 holds no parameter that needs gradients"):
            refused(optimizer)
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
