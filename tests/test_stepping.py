"""`optimizer.step()` of an attached optimizer: skipped steps, schedules, GradScaler, closures, copies, and undoing."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import opendit
from opendit import ema, nonfinite, stepping
from tests.comparing import build
from tests.launch import of_every_rank
from tests.stepping_cases import MUTANTS, OPTIMIZERS, STEPPED, changed, everything, loss_of, made, samples
from tests.tiny_models import TINY

CASES = "tests.stepping_cases"


@pytest.mark.parametrize(("kind", "optimizer"), STEPPED)
def test_one_process_has_a_nan_and_all_skip(kind, optimizer):
    assert of_every_rank(CASES, 2, f"skip/{kind}/{optimizer}") == [[], []]


@pytest.mark.slow
def test_over_four_processes():
    assert of_every_rank(CASES, 4, "skip/sharded/adamw", 500.0) == [[]] * 4


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "shard" not in m and "scale" not in m])
def test_mutants_are_noticed(mutant):
    for noticed in of_every_rank(CASES, 2, f"mutant/{mutant}"):
        assert noticed


def test_all_stop_after_several_in_a_row_and_name_the_parameter():
    for said in of_every_rank(CASES, 2, "stop"):
        assert said.startswith("2: 3 steps in a row had gradients that were inf or NaN")
        assert "Worst now: blocks.1.mlp.fc1.weight on process 1." in said


def test_models_are_let_go_of():
    assert of_every_rank(CASES, 2, "let_go") == [[True, True]] * 2


def spoil(model: nn.Module) -> None:
    model.blocks[0].attn.qkv.weight.grad[3, 2] = float("nan")


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
@pytest.mark.parametrize("built", ["before", "after"])
def test_schedules_built_before_and_after(optimizer, built):
    model = build(TINY[0]).eval()
    stepped = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepped, 10) if built == "before" else None
    opendit.accelerate(model, {"skip_nonfinite": True}, optimizer=stepped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = schedule or torch.optim.lr_scheduler.CosineAnnealingLR(stepped, 10)
        assert opendit.schedule(schedule) is schedule is opendit.schedule(schedule)
        for i in range(5):
            loss_of(model, 0).backward()
            before, state = everything(model, stepped), schedule.state_dict()
            if i in (1, 2):
                spoil(model)
            stepped.step()
            schedule.step()
            stepped.zero_grad()
            moved = changed(before, everything(model, stepped))
            assert bool(moved) == (i not in (1, 2))
            assert (schedule.state_dict() == state) == (i in (1, 2))
    assert schedule.last_epoch == 3
    other = copy.deepcopy(schedule)
    assert type(other) is torch.optim.lr_scheduler.CosineAnnealingLR
    assert other.state_dict() == schedule.state_dict()
    opendit.restore(model)
    assert type(stepped) is torch.optim.AdamW
    assert type(schedule) is torch.optim.lr_scheduler.CosineAnnealingLR
    loss_of(model, 0).backward()
    spoil(model)
    stepped.step()  # as torch does
    schedule.step()
    assert schedule.last_epoch == 4
    assert model.blocks[0].attn.qkv.weight.isnan().any()


@pytest.mark.parametrize("again", ["attach", "restore"])
@pytest.mark.parametrize("built", ["before", "between"])
def test_attached_anew_a_step_is_one_step_and_schedules_stay(again, built):
    model = build(TINY[0]).eval()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1) if built == "before" else None
    opendit.accelerate(model, {"ema": 0.5}, optimizer=optimizer)
    schedule = opendit.schedule(schedule or torch.optim.lr_scheduler.StepLR(optimizer, 1))
    for _ in range(2):
        if again == "attach":
            opendit.attach(model, optimizer)
        else:
            opendit.restore(model)
            opendit.accelerate(model, {"ema": 0.5}, optimizer=optimizer)
            opendit.schedule(schedule)
    name, p = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    before = p.detach().clone()
    loss_of(model, 0).backward()
    optimizer.step()
    schedule.step()
    stepper = stepping.stepper_of(model)
    assert (stepper.taken, stepper.ema.steps, schedule.last_epoch) == (1, 1, 1)
    assert torch.allclose(ema.pieces(model)["0.5"][name].values, ((before + p) / 2).detach().flatten(), atol=1e-7)
    spoil(model)
    optimizer.step()
    schedule.step()
    assert (stepper.skipped, schedule.last_epoch) == (1, 1)
    opendit.restore(model)
    assert type(optimizer) is torch.optim.AdamW
    optimizer.step()  # as torch does
    assert model.blocks[0].attn.qkv.weight.isnan().any()
    assert stepper.taken == 1


def test_a_schedule_on_the_optimizer_inside_an_engines_wrapper():
    model = build(TINY[0]).eval()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.inner = inner  # as ColossalAI's has it
    opendit.accelerate(model, {"skip_nonfinite": True}, optimizer=optimizer)
    assert opendit.schedule(schedule) is schedule
    loss_of(model, 0).backward()
    spoil(model)
    optimizer.step()
    schedule.step()
    assert schedule.last_epoch == 0


def test_a_schedule_that_was_not_given_is_told(caplog):
    model, optimizer = made("alone", {"skip_nonfinite": True})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss_of(model, 0).backward()
    spoil(model)
    with caplog.at_level("WARNING", "opendit"):
        optimizer.step()
    assert "opendit.schedule(scheduler)" in caplog.text
    with pytest.raises(ValueError, match="its optimizer skips nothing"):
        opendit.schedule(torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=1.0), 1))
    with pytest.raises(TypeError, match="scheduler: got AdamW"):
        opendit.schedule(optimizer)
    assert opendit.schedule(schedule) is schedule


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skip", [None, False])
def test_a_grad_scaler_of_the_users_own(fused, skip):
    model = build(TINY[0]).eval()
    plain = copy.deepcopy(model)
    ours = OPTIMIZERS["fused" if fused else "adamw"](model.parameters())
    theirs = OPTIMIZERS["fused" if fused else "adamw"](plain.parameters())
    opendit.accelerate(model, {"ema": 0.9, "skip_nonfinite": skip, "kernels": "reference"}, optimizer=ours)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16) for _ in range(2)]
    gradients: list[torch.Tensor | None] = []
    for i in range(5):
        factor = 1e6 if i in (0, 2) else 1.0
        averages = {n: p.values.clone() for n, p in ema.pieces(model)["0.9"].items()}
        for m, optimizer, scaler in ((model, ours, scalers[0]), (plain, theirs, scalers[1])):
            with torch.autocast("cpu", dtype=torch.float16):
                out = m(*samples(0))
            scaler.scale(out.float().square().mean() * factor).backward()
            if m is model:
                gradients = [None if p.grad is None else p.grad.clone() for p in m.parameters()]
            for p, gradient in zip(m.parameters(), gradients, strict=True):
                p.grad = None if gradient is None else gradient.clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        same = all(torch.equal(p.values, averages[n]) for n, p in ema.pieces(model)["0.9"].items())
        assert same == (i in (0, 2))
    assert ema.description(model)["steps"] == 3
    assert not hasattr(ours, "found_inf")


def test_closures_hooks_groups_and_states_are_the_optimizers():
    model, optimizer = made("alone", {"skip_nonfinite": True})
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append("closure")
        return loss

    first = optimizer.step(closure)
    with torch.no_grad():
        assert optimizer.step(closure=closure) < first
    assert calls == ["closure", "pre", "post"] * 2
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamW"
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    optimizer.step()
    assert calls[-2:] == ["pre", "post"]
    assert len(calls) == 8
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    optimizer.param_groups[0]["lr"] = 0.25
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is torch.optim.AdamW
        assert [g["lr"] for g in other.param_groups] == [0.25, 0.5]
        assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    assert repr(optimizer).startswith("AdamW (")


def test_counters_are_json_and_go_on():
    model, optimizer = made("alone", {"precision": "fp16", "skip_nonfinite": 7})
    for i in range(3):
        loss_of(model, 0).backward()
        if i == 1:
            spoil(model)
        optimizer.step()
        optimizer.zero_grad()
    stepper = stepping.stepper_of(model)
    state = json.loads(json.dumps(stepper.state()))
    assert (state["taken"], state["skipped"], state["in_a_row"]) == (2, 1, 0)
    assert state["scale"] == {"value": 2.0**15, "good_steps": 1}
    other, _ = made("alone", {"precision": "fp16", "skip_nonfinite": 7})
    stepping.stepper_of(other).load(state)
    assert stepping.stepper_of(other).state() == stepper.state()


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_the_limit_is_of_steps_in_a_row(optimizer):
    model, stepped = made("alone", {"skip_nonfinite": 2}, optimizer)
    for bad in (False, True, False, True):
        loss_of(model, 0).backward()
        if bad:
            spoil(model)
        stepped.step()
        stepped.zero_grad()
    loss_of(model, 0).backward()
    spoil(model)
    with pytest.raises(
        opendit.NonFiniteGradients, match=r"2 steps in a row.*2 were taken before.*blocks.0.attn.qkv.weight"
    ):
        (stepped.step(), stepping.stepper_of(model).settle())  # where nobody waited for the device


def test_explain_waits_for_nobody():
    model, _ = made("alone", {"skip_nonfinite": True}, "fused")
    stepper = stepping.stepper_of(model)
    stepper._pending = nonfinite.Pending(torch.ones(()), None)
    text = io.StringIO()
    opendit.explain(model, file=text)
    assert "so far: 0 steps taken, 0 skipped, and one that the device has not told yet" in text.getvalue()
    assert stepper._pending is not None


def test_explain_says_what_a_step_does():
    def said(model, *args):
        text = io.StringIO()
        opendit.explain(model, *args, file=text)
        return text.getvalue()

    config = {"precision": "fp16", "ema": opendit.EMA(decays=0.9999, warmup=True, stds=0.1)}
    model = build(TINY[0])
    before = said(model, config)
    opendit.accelerate(model, config)
    assert "(the model): its forward under fp16 autocast, fp32 out" in before
    for line in (
        "all processes skip the step; 50 in a row",
        "loss scale: from 65536",
        "EMA: 0.9999, std0.1; fp32, 4 bytes",
    ):
        assert line in before
        assert line in said(model)
    assert "not attached to an optimizer yet" in said(model)
    opendit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "so far: 0 steps taken, 0 skipped, loss scale 65536" in said(model)
    plain = opendit.accelerate(build(TINY[0]))
    assert "gradients" not in said(plain)


def test_what_can_not_be_attached_is_said(caplog):
    model = build(TINY[0])
    with caplog.at_level("WARNING", "opendit"):
        opendit.accelerate(model, {"ema": 0.9})
    assert "opendit.attach(model, optimizer)" in caplog.text
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer: got int"):
        opendit.attach(model, 3)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        opendit.attach(model, torch.optim.SGD(build(TINY[0]).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="optimizer: got LBFGS"):
        opendit.attach(model, torch.optim.LBFGS(model.parameters()))
    assert opendit.attach(model, optimizer) is optimizer
    with pytest.raises(ValueError, match="attached to another optimizer"):
        opendit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="nothing of it goes into"):
        opendit.attach(opendit.accelerate(build(TINY[0])), optimizer)
    twin = build(TINY[0])
    joint = torch.optim.SGD([*model.parameters(), *twin.parameters()], lr=0.1)
    opendit.restore(model)
    kinds = [type(m) for m in twin.modules()]
    opendit.accelerate(model, {"ema": 0.9}, optimizer=joint)
    with pytest.raises(ValueError, match="attached to another model"):
        opendit.accelerate(twin, {"ema": 0.9}, optimizer=joint)
    assert [type(m) for m in twin.modules()] == kinds


@pytest.mark.gpu
def test_nobody_waits_for_the_device_with_a_fused_optimizer():
    model = build(TINY[0]).cuda().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    opendit.accelerate(model, {"ema": (0.9, 0.99), "skip_nonfinite": True}, optimizer=optimizer)
    inputs = [s.cuda() for s in samples(0)]
    for i in range(4):
        model(*inputs).square().mean().backward()
        before = everything(model, optimizer)
        if i == 2:
            spoil(model)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first step has no state to leave alone
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(changed(before, everything(model, optimizer))) == (i != 2)
        optimizer.zero_grad()
    state = stepping.stepper_of(model).state()
    assert (state["taken"], state["skipped"]) == (3, 1)
