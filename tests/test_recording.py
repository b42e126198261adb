"""What checkpoints keep of an accelerated model's steps: tests/examples shows that runs resume exactly."""

import pytest
import torch

import opendit
from tests.tiny_models import UserDiT, randomise


def trained(steps: int, seed: int = 0):
    model = randomise(UserDiT(), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = opendit.accelerate(model, {"ema": (0.5, 0.9)}, optimizer=optimizer)
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(torch.randn(2, 4, 6, 6), torch.tensor([1, 900]), torch.tensor([0, 4])).square().mean()
        (loss * float("nan") if step == 1 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def averages(model):
    return [opendit.ema_state_dict(model, decay) for decay in (0.5, 0.9)]


def test_averages_and_counters_come_back(tmp_path):
    from opendit.stepping import stepper_of

    model, optimizer = trained(4)
    opendit.save(tmp_path, model, optimizer, step=4)
    other, its_optimizer = trained(1, seed=1)
    opendit.load(tmp_path, other, its_optimizer)
    assert stepper_of(other).state() == stepper_of(model).state()
    assert (stepper_of(other).state()["taken"], stepper_of(other).state()["skipped"]) == (3, 1)
    for ours, theirs in zip(averages(other), averages(model), strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_with_averages_does_not_load_into_a_model_without(tmp_path):
    model, optimizer = trained(1)
    opendit.save(tmp_path, model, optimizer, step=1)
    plain = UserDiT()
    with pytest.raises(opendit.CheckpointError, match=r"steps|ema"):
        opendit.load(tmp_path, plain, torch.optim.AdamW(plain.parameters()))


def test_a_restored_model_has_nothing_recorded(tmp_path):
    model, optimizer = trained(1)
    opendit.restore(model)
    opendit.save(tmp_path, model, optimizer, step=1)
    plain = UserDiT()
    opendit.load(tmp_path, plain, torch.optim.AdamW(plain.parameters()))
