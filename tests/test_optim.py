from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import opendit
from opendit import optim
from tests.comparing import build
from tests.tiny_models import TINY


def model_and_optimizer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.5, "name": "first"},
        {"params": [model[1].weight], "weight_decay": 0.3},
        {"params": [model[1].bias]},
    ]
    return model, torch.optim.AdamW(groups, lr=0.1)


def step(model, optimizer):
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def replace_parameters(model):
    for module in model:
        for name in ("weight", "bias"):
            setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))


def test_rebind_keeps_identity_options_state_and_scheduler():
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    step(model, optimizer)
    before = dict(model.named_parameters())
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in before.items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    replace_parameters(model)
    after = dict(model.named_parameters())
    optim.rebind(optimizer, before, after)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert [id(p) for p in held] == [id(p) for p in after.values()]
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == options
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[name]) for name, p in after.items())
    assert not any(p in optimizer.state for p in before.values())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    values = [p.clone() for p in held]
    step(model, optimizer)
    assert not any(torch.equal(p, v) for p, v in zip(held, values, strict=True))


def test_rebind_leaves_parameters_of_others_alone():
    model, _ = model_and_optimizer()
    stranger = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), stranger], lr=0.1)
    before = dict(model.named_parameters())
    replace_parameters(model)
    optim.rebind(optimizer, before, dict(model.named_parameters()))
    assert optimizer.param_groups[0]["params"][-1] is stranger


def test_rebind_refuses_state_that_does_not_fit():
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    before = dict(model.named_parameters())
    held = [p for g in optimizer.param_groups for p in g["params"]]
    after = {**before, "0.weight": nn.Parameter(torch.zeros(2, 3))}
    with pytest.raises(ValueError, match=r"state of '0.weight' \(exp_avg, exp_avg_sq\) can't be carried"):
        optim.rebind(optimizer, before, after)
    assert [p for g in optimizer.param_groups for p in g["params"]] == held


def test_rebind_without_state_takes_any_shape():
    model, optimizer = model_and_optimizer()
    before = dict(model.named_parameters())
    shard = nn.Parameter(torch.zeros(2, 3))
    optim.rebind(optimizer, before, {**before, "0.weight": shard})
    assert optimizer.param_groups[0]["params"][0] is shard


def test_rebind_refuses_a_parameter_that_is_gone():
    model, optimizer = model_and_optimizer()
    before = dict(model.named_parameters())
    after = {name: p for name, p in before.items() if name != "1.bias"}
    with pytest.raises(ValueError, match=r"'1.bias' is no longer in the model.*factory"):
        optim.rebind(optimizer, before, after)


def test_accelerate_gives_the_same_optimizer_back():
    model = build(TINY[0])
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 3e-3, "betas": (0.8, 0.9)}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    result = opendit.accelerate(model, optimizer=optimizer)
    assert result == (model, optimizer)
    assert result.optimizer is optimizer
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert scheduler.get_last_lr() == [1.5e-3]


@pytest.mark.parametrize("where", ["argument", "config"])
def test_factory_is_called_on_the_final_parameters(where):
    model = build(TINY[0])
    factory = partial(torch.optim.AdamW, lr=2e-4)
    if where == "argument":
        boosted, optimizer = opendit.accelerate(model, optimizer=factory)
    else:
        boosted, optimizer = opendit.accelerate(model, opendit.BoosterConfig(optimizer=factory))
    assert boosted is model
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_optimizer_of_another_model_is_refused():
    model, other = build(TINY[0]), build(TINY[0])
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        opendit.accelerate(model, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))


def test_factory_that_returns_something_else_leaves_the_model_as_it_was():
    model = build(TINY[0])
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="the factory returned list"):
        opendit.accelerate(model, optimizer=lambda parameters: list(parameters))
    assert [type(m) for m in model.modules()] == kinds


def test_two_optimizers_are_refused():
    model = build(TINY[0])
    factory = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="given both to accelerate and in booster_cfg"):
        opendit.accelerate(model, {"optimizer": factory}, optimizer=factory)


def test_an_optimizer_on_a_part_of_the_model_is_told(caplog):
    model = build(TINY[0])
    with caplog.at_level("WARNING", "opendit"):
        opendit.accelerate(model, optimizer=torch.optim.SGD(model.blocks.parameters(), lr=0.1))
    assert "trainable parameters of the model are not in the optimizer, such as x_embedder" in caplog.text
