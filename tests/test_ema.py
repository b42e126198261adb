"""Averages of the parameters: exact, divided, in and out of the model, gathered, snapshots and what is said."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import opendit
from opendit import ema, ema_profiles, ema_snapshots, sharded_ema
from opendit.sharded_ema import Part, ShardedEma
from tests.comparing import build
from tests.launch import of_every_rank
from tests.stepping_cases import KINDS, MUTANTS, loss_of, made
from tests.tiny_models import TINY

CASES = "tests.stepping_cases"


@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_right_divided_swapped_and_gathered(kind):
    assert of_every_rank(CASES, 2, f"ema/{kind}") == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "hybrid"])
def test_over_four_processes(kind):
    assert of_every_rank(CASES, 4, f"ema/{kind}", 500.0) == [[]] * 4


def test_what_fsdp2_keeps_gathered_is_let_go_of():
    assert of_every_rank(CASES, 2, "gathered_shards") == [[], []]


def test_processes_that_train_apart_are_noticed():
    for said in of_every_rank(CASES, 2, "apart"):
        assert "its parameters differ among processes" in said


def test_snapshots_of_several_processes_give_any_width():
    for errors in of_every_rank(CASES, 2, "snapshots"):
        assert len(errors) > 40
        assert max(errors) <= 2e-3


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "shard" in m and "scale" not in m])
def test_mutants_are_noticed(mutant):
    for noticed in of_every_rank(CASES, 2, f"mutant/{mutant}"):
        assert noticed


def paths(kind: str, steps: int):
    """Parameters [n] over time, fp32: as Adam moves them, steadily, by little, and those of norm layers."""
    generator = torch.Generator().manual_seed(1)
    n = 1000
    start = 0.02 * torch.randn(n, dtype=torch.float64, generator=generator) + (kind in ("norms", "steady"))
    drift = torch.randn(n, dtype=torch.float64, generator=generator).sign()
    value = start.clone()
    for t in range(steps):
        noise = torch.randn(n, dtype=torch.float64, generator=generator)
        if kind == "steady":
            value = start + 0.1 * (t + 1) / steps
        else:
            value = value + {"adam": 1e-4, "norms": 1e-4, "little": 1e-6}[kind] * (0.3 * drift + noise)
        yield value.float()


@pytest.mark.parametrize("kind", ["adam", "norms", "steady", "little"])
def test_error_after_ten_thousand_steps(kind):
    model = nn.Linear(1000, 1, bias=False)
    steps = paths(kind, 10_000)
    model.weight.data.copy_(next(steps))
    averages = ShardedEma(model, opendit.EMA(decays=0.9999))
    wanted = model.weight[0].detach().double()
    naive = model.weight[0].detach().clone()
    for value in steps:
        model.weight.data.copy_(value)
        averages.update()
        wanted = 0.9999 * wanted + (1 - 0.9999) * value.double()
        naive.mul_(0.9999).add_(value, alpha=1 - 0.9999)
    error, theirs = (
        ((found.double() - wanted).norm() / wanted.norm()).item() for found in (averages.values["0.9999"][0], naive)
    )
    assert error <= 3e-5
    assert theirs > 3e-5  # the form that rounds the decay


def test_parameters_of_lower_precision_are_averaged_in_fp32():
    model = nn.Linear(4, 3).bfloat16()
    averages = ShardedEma(model, opendit.EMA(decays=0.5))
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 0.01
    averages.update()
    wanted = (first.float() + model.weight.detach().float()) / 2
    assert torch.allclose(averages.values["0.5"][0].view(3, 4), wanted, atol=1e-7)
    own = averages.own()
    now = model.weight.detach().clone()
    averages.write(averages.values["0.5"])
    averages.write(own)
    assert torch.equal(model.weight, now)
    assert torch.allclose(averages.values["0.5"][0].view(3, 4), wanted, atol=1e-7)


def trained(config, steps: int = 3):
    model, optimizer = made("alone", config)
    for _ in range(steps):
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_frozen_parameters_buffers_and_keys_are_the_models():
    model, _ = trained({"ema": 0.9})
    model.register_buffer("mark", torch.tensor([3.0]))
    state = opendit.ema_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert torch.equal(state["pos_embed"], model.pos_embed)
    assert torch.equal(state["mark"], model.mark)
    state["mark"] += 1
    assert model.mark.item() == 3.0


def adapters(model: nn.Module) -> list[nn.Parameter]:
    """Those of LoRA, put into the model and made the only ones that are trained."""
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False), model)
    return [p for p in model.parameters() if p.requires_grad]


def test_adapters_that_come_later_are_averaged_or_refused_by_name(tmp_path):
    snapshots = opendit.EMA(decays=0.5, stds=(0.1,), snapshot_every=1, snapshots=tmp_path)
    model, optimizer = trained({"ema": snapshots}, 0)
    added = adapters(model)
    loss_of(model, 0).backward()
    joint = torch.optim.SGD(added, lr=0.1)  # the averages' optimizer never meets them
    joint.step()
    says = r"such as 'blocks\.0\.attn\.qkv\.lora_A.*', were added or unfrozen.*call opendit\.attach"
    with pytest.raises(RuntimeError, match=says):
        opendit.ema_state_dict(model)
    with pytest.raises(RuntimeError, match=says), opendit.ema_weights(model):
        pass
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()  # a snapshot is due
    assert not list(tmp_path.iterdir())

    optimizer.add_param_group({"params": added})
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.attn\.qkv\.lora_A.*' was added after ema was set up.*attach"):
        optimizer.step()
    opendit.attach(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    optimizer.step()
    averages = opendit.ema_state_dict(model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(averages[name], (before[name] + parameter.detach()) / 2)
    assert before


def test_parameters_of_others_are_no_matter():
    model, optimizer = trained({"ema": 0.5}, 0)
    other = nn.Linear(2, 2)
    optimizer.add_param_group({"params": other.parameters()})
    (loss_of(model, 0) + other.weight.sum()).backward()
    optimizer.step()
    assert not [name for name in opendit.ema_state_dict(model) if name not in model.state_dict()]


def test_a_copy_has_no_ema_and_leaves_the_models_alone():
    model, optimizer = trained({"ema": 0.9})
    twin, other = copy.deepcopy((model, optimizer))
    assert type(other) is torch.optim.AdamW
    with pytest.raises(ValueError, match="it has no EMA"):
        opendit.ema_state_dict(twin)
    before = {n: p.values.clone() for n, p in ema.pieces(model)["0.9"].items()}
    loss_of(twin, 0).backward()
    other.step()
    assert all(torch.equal(p.values, before[n]) for n, p in ema.pieces(model)["0.9"].items())


def test_what_a_checkpoint_needs_goes_on_exactly():
    config = {"ema": opendit.EMA(decays=(0.9,), warmup=True, stds=(0.1,))}
    model, optimizer = trained(config)
    said = json.loads(json.dumps(ema.description(model)))
    other, again = made("alone", config)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for label, parts in ema.pieces(model).items():
        for name, piece in parts.items():
            there = ema.pieces(other)[label][name]
            assert (there.shape, there.start, there.stop) == (piece.shape, piece.start, piece.stop)
            there.values.copy_(piece.values)
    ema.load_description(other, said)
    loss_of(model, 0).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()
    again.step()
    assert ema.description(other) == ema.description(model)
    assert said["steps"] == 3
    for label in ("0.9", "std0.1"):
        a, b = opendit.ema_state_dict(model, label), opendit.ema_state_dict(other, label)
        assert [n for n in a if not torch.equal(a[n], b[n])] == []
    with pytest.raises(ValueError, match=r"got averages 0\.5; allowed: the model's, 0\.9, std0\.1"):
        ema.load_description(other, {**said, "averages": ["0.5"]})


@pytest.mark.gpu
def test_averages_follow_parameters_to_another_device():
    model = nn.Linear(2, 2)
    averages = ShardedEma(model, opendit.EMA(decays=0.5))
    before = averages.values["0.5"][0].clone()
    model.cuda()
    averages.update()
    assert averages.values["0.5"][0].is_cuda
    assert torch.allclose(averages.values["0.5"][0].cpu(), before)


def test_parameters_without_values_are_refused():
    with pytest.raises(ValueError, match=r"'weight' is on the meta device.*opendit.attach"):
        ShardedEma(nn.Linear(2, 2, device="meta"), opendit.EMA(decays=0.5))


def test_misuse_is_said():
    model, optimizer = trained({"ema": (0.9, 0.99)})
    with pytest.raises(ValueError, match=r"decay: got 0.999; allowed: 0.9, 0.99"), opendit.ema_weights(model, 0.999):
        pass
    with opendit.ema_weights(model):
        with pytest.raises(RuntimeError, match="in its parameters already"), opendit.ema_weights(model, 0.99):
            pass
        with pytest.raises(RuntimeError, match="would train the EMA"):
            optimizer.step()
    optimizer.step()
    with pytest.raises(ValueError, match="it has no EMA"):
        opendit.ema_state_dict(build(TINY[0]))
    with pytest.raises(TypeError, match="model: got int"), opendit.ema_weights(3):
        pass
    model.final_layer.linear.weight = nn.Parameter(model.final_layer.linear.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"'final_layer.linear.weight' was replaced since"):
        opendit.ema_state_dict(model)


def test_snapshots_that_are_no_use_are_said(tmp_path):
    with pytest.raises(ValueError, match="has no complete snapshot"):
        opendit.posthoc_ema(tmp_path, std=0.1)
    with pytest.raises(ValueError, match=r"std: got 0.5; allowed: a number between 0 and 0.288"):
        opendit.posthoc_ema(tmp_path, std=0.5)
    trained({"ema": opendit.EMA(stds=(0.1,), snapshot_every=1, snapshots=tmp_path)})
    with pytest.raises(ValueError, match=r"step: got 9; allowed: a step with a snapshot: 1, 2, 3"):
        opendit.posthoc_ema(tmp_path, std=0.1, step=9)
    (tmp_path / "00000003" / "rank-0-of-1.safetensors").unlink()
    assert opendit.posthoc_ema(tmp_path, std=0.1).keys() == opendit.posthoc_ema(tmp_path, std=0.1, step=2).keys()
    (tmp_path / "00000002" / "rank-0-of-1.safetensors").write_bytes(b"\x80\x04not a tensor")
    with pytest.raises(Exception, match=r"(?i)header"):
        opendit.posthoc_ema(tmp_path, std=0.1)


def written(folder, monkeypatch, world: int, value: float, ranks=None) -> None:
    """A snapshot of step 1, as `world` processes write it."""
    gammas = {label: ema_profiles.Power(ema_profiles.gamma_of(std)) for label, std in (("a", 0.05), ("b", 0.1))}
    monkeypatch.setattr(ema_snapshots, "several", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    for rank in range(world) if ranks is None else ranks:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        size = 8 // world
        part = Part("w", nn.Parameter(torch.zeros(8)), (8,), rank * size, (rank + 1) * size, True)
        values = {label: [torch.full((size,), value)] for label in gammas}
        ema_snapshots.write(str(folder), SimpleNamespace(steps=1, profiles=gammas, parts=[part], values=values))
        time.sleep(0.01)


def test_a_step_that_another_number_of_processes_wrote_again_counts_as_written_last(tmp_path, monkeypatch):
    for world, value in ((2, 1.0), (4, 2.0), (1, 3.0), (2, 4.0)):
        written(tmp_path, monkeypatch, world, value)
        assert torch.allclose(opendit.posthoc_ema(tmp_path, std=0.07)["w"], torch.full((8,), value))
    written(tmp_path, monkeypatch, 8, 5.0, ranks=range(7))  # killed before the last one
    assert torch.allclose(opendit.posthoc_ema(tmp_path, std=0.07)["w"], torch.full((8,), 4.0))


def test_copies_that_are_nan_everywhere_are_alike(monkeypatch):
    model = nn.Linear(2, 2)
    averages = ShardedEma(model, opendit.EMA(decays=0.5))
    averages.parts = [dataclasses.replace(part, divided=True) for part in averages.parts]
    nn.init.constant_(model.weight, float("nan"))
    monkeypatch.setattr(sharded_ema, "several", lambda: True)
    monkeypatch.setattr(sharded_ema, "gathered", lambda value: [value, value.clone()])
    averages.check(model)
    monkeypatch.setattr(sharded_ema, "gathered", lambda value: [value, value + 1])
    with pytest.raises(RuntimeError, match="its parameters differ among processes"):
        averages.check(model)


def test_snapshots_without_their_package_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = build(TINY[0])
    kinds = [type(m) for m in model.modules()]
    config = {"ema": opendit.EMA(stds=(0.1,), snapshot_every=1, snapshots=tmp_path)}
    with pytest.raises(ImportError, match="pip install safetensors"):
        opendit.accelerate(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert [type(m) for m in model.modules()] == kinds
