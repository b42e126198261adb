"""A resumed run is the uninterrupted one, to the bit; nothing that belongs to it can be left out unnoticed."""

from __future__ import annotations

import json
import random
import sys

import numpy
import pytest
import torch

import opendit
from opendit.attached import attached
from opendit.checkpoint import disk, inventory, jsonfile, manifest, modules, randomness, shards
from tests.checkpoint.running import Trainer, differences


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_resumed_is_uninterrupted(tmp_path, accelerate, background):
    whole = Trainer(0, accelerate=accelerate)
    whole.train(4)
    saving = whole.save(tmp_path, background=background)
    whole.train(9)
    assert saving.wait() == tmp_path / "step-00000004" == opendit.latest_checkpoint(tmp_path)

    resumed = Trainer(1, accelerate=accelerate)
    resumed.train(2)
    assert resumed.load(tmp_path).step == 4
    resumed.train(9)
    assert differences(resumed.facts(), whole.facts()) == []
    assert len(whole.losses) == 9


def test_everything_that_was_perturbed_comes_back(tmp_path):
    trainer = Trainer(0)
    trainer.train(5)
    trainer.save(tmp_path)
    saved = trainer.facts()
    trainer.train(7)
    _perturb(trainer)
    changed = differences(trainer.facts(), saved)
    constant = {n for n in saved if n.startswith(("group", "scheduler", "scaler"))} | {"step"}
    assert set(saved) - constant <= set(changed), "something was not perturbed, so the test would say nothing of it"
    trainer.load(tmp_path)
    assert differences(trainer.facts(), saved) == []


def _perturb(trainer: Trainer) -> None:
    with torch.no_grad():
        for values in (trainer.model.state_dict(), trainer.ema.state_dict()):
            for value in values.values():
                value.add_(1)
        for state in trainer.optimizer.state.values():
            for value in state.values():
                value.add_(1)
        for value in trainer.rule.sums.values():
            value.add_(1)
    for group in trainer.optimizer.param_groups:
        group.update(lr=7.0, betas=(0.1, 0.2), weight_decay=3.0, eps=1.0)


# What plays the part of a programmer who forgets one item: the collecting function gives it as nothing.
FORGOTTEN = {
    "parameters": lambda m: m.setattr(inventory, "module_pieces", lambda module, prefix: {}),
    "moments": lambda m: m.setattr(
        inventory, "optimizer_state", lambda o, model: (modules.optimizer_state(o, model)[0], {})
    ),
    "optimizer": lambda m: m.setattr(inventory.Run, "optimizer", None, raising=False),
    "attached": lambda m: m.setattr(inventory, "attached", lambda model: {}),
    **{
        name: lambda m, name=name: m.setattr(
            inventory, "WITH_STATE_DICT", tuple(n for n in inventory.WITH_STATE_DICT if n != name)
        )
        for name in inventory.WITH_STATE_DICT
    },
    **{
        f"rng {name}": lambda m, name=name: m.setattr(
            randomness, "states", lambda: {k: v for k, v in states().items() if k != name}
        )
        for name in ("python", "numpy", "torch")
    },
}
states = randomness.states


@pytest.mark.parametrize("item", [name for name in FORGOTTEN if name != "optimizer"])
def test_a_forgotten_item_is_noticed(tmp_path, monkeypatch, item):
    trainer = Trainer(0)
    trainer.train(2)
    with monkeypatch.context() as patch:
        FORGOTTEN[item](patch)
        trainer.save(tmp_path)
    saved = trainer.facts()
    other = Trainer(1)
    other.train(1)
    try:
        other.load(tmp_path)
    except opendit.CheckpointError:
        return
    assert differences(other.facts(), saved), f"without {item} nothing was missed"


def test_an_item_taken_out_of_a_checkpoint_is_named(tmp_path):
    trainer = Trainer(0)
    trainer.train(2)
    folder = trainer.save(tmp_path).wait()
    index = json.loads((folder / manifest.INDEX).read_text())
    taken = 0
    for place in [("shared", n) for n in index["shared"]] + [("own", n) for n in index["own"]]:
        _without(folder, index, *place)
        with pytest.raises(opendit.CheckpointError, match=place[1]):
            trainer.load(tmp_path)
        taken += 1
    for key in index["tensors"]:
        _without(folder, index, "tensors", key)
        with pytest.raises(opendit.CheckpointError, match=r"does not (hold|fit)|tensor can't be|index"):
            trainer.load(tmp_path)
        taken += 1
    assert taken > 100
    disk.write(folder / manifest.INDEX, jsonfile.text(index))
    _signed_anew(folder)
    trainer.load(tmp_path)


def _without(folder, index, part, name):
    """The checkpoint with one entry of its index gone, signed anew: as if `save` had never written it."""
    smaller = {**index, part: {key: value for key, value in index[part].items() if key != name}}
    disk.write(folder / manifest.INDEX, jsonfile.text(smaller))
    _signed_anew(folder)


def _signed_anew(folder):
    found = json.loads((folder / manifest.NAME).read_text())
    files = {name: manifest.file_record(folder / name) for name in found["files"]}
    disk.write(folder / manifest.NAME, manifest.build(found["checkpoint"], found["id"], files))


@pytest.mark.parametrize("item", ["scheduler", "scaler", "sampler", "ema", "optimizer"])
def test_what_is_there_must_be_taken_or_left_by_name(tmp_path, item):
    trainer = Trainer(0)
    trainer.train(1)
    trainer.save(tmp_path)
    before = trainer.facts()
    trainer.train(2)
    now = trainer.facts()
    parts = {"optimizer": trainer.optimizer, **trainer.parts(), item: None}
    with pytest.raises(opendit.CheckpointError, match=rf"{item}: the checkpoint holds it"):
        opendit.load(tmp_path, trainer.model, **parts)
    assert differences(trainer.facts(), now) == [], "a refused load changed something"
    for given in (parts, {"optimizer": trainer.optimizer, **trainer.parts()}):
        opendit.load(tmp_path, trainer.model, **given, leave=(item,))
        left = differences(trainer.facts(), before)
        kinds = {"sampler": "position", "optimizer": "optimizer"}
        assert any(name.startswith(kinds.get(item, item)) for name in left), "what was left was loaded all the same"


def test_what_is_given_must_be_there(tmp_path):
    trainer = Trainer(0, attached=False)
    opendit.save(tmp_path, trainer.model, step=0)
    with pytest.raises(opendit.CheckpointError, match="sampler: load has one"):
        opendit.load(tmp_path, trainer.model, sampler=trainer.sampler)
    opendit.load(tmp_path, trainer.model, sampler=trainer.sampler, ema=trainer.ema, leave=("sampler", "ema"))
    with pytest.raises(opendit.CheckpointError, match=r"leave: got \['moments'\]"):
        opendit.load(tmp_path, trainer.model, leave=("moments",))
    assert opendit.load(tmp_path, trainer.model).step == 0


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    trainer = Trainer(0, attached=False)
    trainer.train(1)
    trainer.save(tmp_path)
    for other, match in (
        (Trainer(1, dim=20, attached=False), r"holds float32 \(.*\), this is float32"),
        (Trainer(1, depth=2, attached=False), "group 0 differs in"),
    ):
        before = other.facts()
        with pytest.raises(opendit.CheckpointError, match=match):
            other.load(tmp_path)
        assert differences(other.facts(), before) == []
    half = Trainer(1, attached=False)
    half.model.half()
    with pytest.raises(opendit.CheckpointError, match=r"holds float32.*this is float16"):
        half.load(tmp_path)
    kind = Trainer(1, attached=False)
    kind.optimizer = torch.optim.SGD(kind.model.parameters(), lr=0.1)
    with pytest.raises(opendit.CheckpointError, match=r"got SGD; the checkpoint is from AdamW"):
        kind.load(tmp_path)
    seeded = Trainer(1, attached=False)
    seeded.sampler.seed = 99
    before = seeded.facts()
    with pytest.raises(opendit.CheckpointError, match="sampler: the state is from seed=3"):
        seeded.load(tmp_path)
    assert differences(seeded.facts(), before) == []


def _refuses_once(part):
    real, refused = part.load_state_dict, []

    def load_state_dict(state):
        real(state)  # something may have changed before it refuses
        if not refused:
            refused.append(state)
            raise ValueError("refused")

    part.load_state_dict = load_state_dict


@pytest.mark.parametrize("refusing", ["sampler", "scheduler", "scaler", "rule"])
def test_what_is_refused_late_is_put_back(tmp_path, refusing):
    trainer = Trainer(0)
    trainer.train(3)
    trainer.scaler.update(512.0)
    trainer.save(tmp_path)
    other = Trainer(1)
    other.train(1)
    match = "refused"
    if refusing == "rule":
        other.rule.sums.pop("final_layer.linear.bias")  # seen after the rule took its numbers
        match = "the rule has nothing of that name"
    else:
        _refuses_once(getattr(other, refusing))
    before = other.facts()
    with pytest.raises(opendit.CheckpointError, match=match):
        other.load(tmp_path)
    assert differences(other.facts(), before) == []


def test_other_averages_are_refused_and_change_nothing(tmp_path):
    def built(decay):
        config = opendit.BoosterConfig(ema=decay)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = opendit.accelerate(model, optimizer=optimizer, family="generic", booster_cfg=config)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)

    model, optimizer, scheduler = built(0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    sampler = opendit.ResumableSampler(8, batch_size=2, seed=0)
    sampler.position = 4
    opendit.save(tmp_path, model, optimizer, step=1, scheduler=scheduler, sampler=sampler)
    model, optimizer, scheduler = built(0.99)
    sampler = opendit.ResumableSampler(8, batch_size=2, seed=0)
    before = (str(scheduler.state_dict()), sampler.state_dict(), str(model.state_dict()), str(optimizer.state_dict()))
    with pytest.raises(opendit.CheckpointError, match=r"ema: got averages 0\.9; allowed: the model's, 0\.99"):
        opendit.load(tmp_path, model, optimizer, scheduler=scheduler, sampler=sampler)
    now = (str(scheduler.state_dict()), sampler.state_dict(), str(model.state_dict()), str(optimizer.state_dict()))
    assert now == before


def test_a_sampler_that_lost_count_is_loaded_all_the_same(tmp_path):
    model, sampler = torch.nn.Linear(2, 2), opendit.ResumableSampler(8, batch_size=2, seed=0)
    opendit.save(tmp_path, model, step=0, sampler=sampler)
    next(iter(sampler))
    with pytest.raises(RuntimeError, match="nobody counted"):
        sampler.state_dict()
    opendit.load(tmp_path, model, sampler=sampler)
    assert sampler.state_dict()["position"] == 0


def test_random_states_of_gpus_are_refused_without_one_and_change_nothing(tmp_path, monkeypatch):
    trainer = Trainer(0)
    trainer.train(2)
    gpus = {"cuda": {"states": [torch.zeros(16, dtype=torch.uint8)], "current": 0}}
    with monkeypatch.context() as patch:
        patch.setattr(randomness, "states", lambda: {**states(), **gpus})
        trainer.save(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = Trainer(1)
    other.train(1)
    before = other.facts()
    with pytest.raises(opendit.CheckpointError, match=r"rng: .*pass leave=\('rng',\)"):
        other.load(tmp_path)
    assert differences(other.facts(), before) == []
    assert other.load(tmp_path, leave=("rng",)).step == 2


def test_a_disk_that_fails_while_tensors_are_read_is_told_as_what_it_is(tmp_path, monkeypatch):
    trainer = Trainer(0)
    trainer.train(1)
    trainer.save(tmp_path)

    def failing(self, key, piece):
        if key.startswith("model/"):
            raise OSError(5, "Input/output error")
        fill(self, key, piece)

    fill = shards.Shards.fill
    monkeypatch.setattr(shards.Shards, "fill", failing)
    with pytest.raises(opendit.CheckpointError, match=r"OSError: .*Input/output.* half loaded; load again"):
        trainer.load(tmp_path)


def test_optimizers_state_of_any_shape(tmp_path):
    """Factored moments, counters on either side, a learning rate in a tensor, lists, half precision."""
    model = torch.nn.Linear(6, 4).half()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    model(torch.randn(2, 6).half()).float().square().mean().backward()
    optimizer.step()
    optimizer.state[model.weight]["history"] = [1, (2.5, float("inf")), {"a": None}]
    opendit.save(tmp_path, model, optimizer, step=1)
    fresh = torch.nn.Linear(6, 4).half()
    other = torch.optim.Adafactor(fresh.parameters(), lr=0.3)
    opendit.load(tmp_path, fresh, other)
    assert other.param_groups[0]["lr"] == 0.1
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            found = other.state[q][key]
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, key

    model = torch.nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), capturable=False, foreach=False)
    model(torch.randn(2, 6)).square().mean().backward()
    optimizer.step()
    opendit.save(tmp_path / "b", model, optimizer, step=1)
    rate = torch.tensor(0.9)
    other = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
    opendit.load(tmp_path / "b", model, other)
    assert rate == torch.tensor(0.1), "the tensor itself is written to"


def test_what_was_never_stepped_and_what_is_no_longer(tmp_path):
    """A parameter without state gets none, also where the optimizer at hand has some."""
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    opendit.save(tmp_path, model, optimizer, step=1)
    model[1](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4
    opendit.load(tmp_path, model, optimizer)
    assert set(optimizer.state) == set(model[0].parameters())


class _Odd:
    pass


def test_what_cannot_be_written_exactly_is_refused_by_name(tmp_path):
    trainer = Trainer(0, attached=False)
    for extra, match in (
        ({"run": _Odd()}, r"extra\.run: got tests\.checkpoint\.test_resume\._Odd"),
        ([1, {"f": lambda: 0}], r"extra\.1\.f: got builtins\.function"),
        (numpy.float64(1.0), r"extra: got numpy\.float64"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "two tensors would have this name"),
    ):
        with pytest.raises(opendit.CheckpointError, match=match):
            opendit.save(tmp_path, trainer.model, step=0, extra=extra)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(opendit.CheckpointError, match="not one of the model's"):
        opendit.save(tmp_path, trainer.model, torch.optim.SGD(other.parameters()), step=0)
    assert not tmp_path.exists() or disk.names(tmp_path) == []


def test_extra_and_config_come_back_as_they_were(tmp_path):
    extra = {
        "tuple": (1, [2.5, None, True]),
        "floats": [float("inf"), -float("inf"), 0.1, 1e-320, -0.0],
        "keys": {3: "c", (1, 2): "d"},
        "!": "bang",
        "bytes": b"\x00\xff",
        "text": "ключ\n\u2028",
        "tensors": [torch.arange(5, dtype=torch.int16), torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0, 3)],
    }
    model = torch.nn.Linear(2, 2)
    opendit.save(tmp_path, model, step=3, extra=extra, config={"lr": 1e-4})
    loaded = opendit.load(tmp_path, model)
    tensors = extra.pop("tensors")
    found = loaded.extra.pop("tensors")
    assert loaded.extra == extra
    assert [type(v) for v in loaded.extra.values()] == [type(v) for v in extra.values()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
    assert loaded.config == {"lr": 1e-4}
    assert str(loaded.extra["floats"]) == str(extra["floats"])


def test_odd_tensors(tmp_path):
    model = torch.nn.Module()
    for name, value in {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "fp32 pairs": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
        "fp64": torch.randn(2, 3, dtype=torch.float64),
    }.items():
        model.register_buffer(name, value)
    model.weight = torch.nn.Parameter(torch.randn(3, 3))
    model.tied = model.weight
    saved = {n: v.clone() for n, v in model.state_dict().items()}
    opendit.save(tmp_path, model, step=0)
    for value in model.state_dict().values():
        value.zero_()
    opendit.load(tmp_path, model)
    assert all(torch.equal(v, saved[n]) for n, v in model.state_dict().items())
    model.weight = model.tied = torch.nn.Parameter(torch.randn(4, 3).t())
    with pytest.raises(opendit.CheckpointError, match="row-major"):
        opendit.save(tmp_path, model, step=1)


@pytest.mark.parametrize("dtype", [name for name in shards._DTYPES if name not in ("complex64", "bool")])
def test_every_dtype_that_is_allowed_comes_back(tmp_path, dtype):
    model = torch.nn.Module()
    model.register_buffer("values", torch.tensor([1.0, 2.0, 4.0]).to(getattr(torch, dtype)))
    opendit.save(tmp_path, model, step=0, extra=model.values.clone())
    model.values.view(torch.uint8).fill_(1)
    found = opendit.load(tmp_path, model).extra
    for value in (model.values, found):
        assert value.dtype == getattr(torch, dtype)
        assert value.double().tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_a_dtype_that_could_not_be_read_is_not_written(tmp_path, dtype):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("odd", torch.zeros(3).to(dtype))
    with pytest.raises(opendit.CheckpointError, match=rf"model/odd is {dtype}; allowed in a checkpoint: float64, "):
        opendit.save(tmp_path, model, step=0)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_8_bits_are_looked_at(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.low = torch.nn.Parameter(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(opendit.CheckpointError, match="model/low: holds numbers that are not finite"):
        opendit.save(tmp_path, model, step=0)


@pytest.mark.parametrize("where", ["model", "moment", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path, where, value):
    trainer = Trainer(0)
    trainer.train(2)
    trainer.save(tmp_path)
    target = {
        "model": trainer.model.final_layer.linear.weight,
        "ema": trainer.ema.final_layer.linear.weight,
        "moment": trainer.optimizer.state[trainer.model.final_layer.linear.weight]["exp_avg_sq"],
    }[where]
    with torch.no_grad():
        target[3, 1] = value
    trainer.step = 3
    for background in (False, True):
        with pytest.raises(opendit.CheckpointError, match=r"final_layer\.linear\.weight.* not finite"):
            trainer.save(tmp_path, background=background)
    assert disk.names(tmp_path) == ["step-00000002"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_buffers_need_not_be_finite(tmp_path):
    def built(value):
        model = torch.nn.Linear(2, 2)
        model.register_buffer("mask", torch.full((2, 2), value))
        return model

    for ema in (None, built(-float("inf"))):
        opendit.save(tmp_path, built(-float("inf")), step=0, ema=ema)
        model, averages = built(0.0), ema and built(0.0)
        opendit.load(tmp_path, model, ema=averages)
        assert all(m.mask.isneginf().all() for m in (model, averages or model))


def test_arguments(tmp_path):
    model = torch.nn.Linear(2, 2)
    for kwargs, error, match in (
        ({"step": -1}, ValueError, "step: got -1"),
        ({"step": 1.5}, ValueError, "step: got 1.5"),
        ({"step": 1, "keep": 0}, ValueError, "keep: got 0"),
        ({"step": 1, "scheduler": 3}, TypeError, "scheduler: got int"),
        ({"step": 1, "ema": {}}, TypeError, "ema: got dict"),
        ({"step": 1, "optimizer": 3}, TypeError, "optimizer: got int"),
    ):
        with pytest.raises(error, match=match):
            opendit.save(tmp_path, model, **kwargs)
    with pytest.raises(TypeError, match="model: got int"):
        opendit.save(tmp_path, 3, step=1)
    with pytest.raises(opendit.CheckpointError, match="holds no checkpoint"):
        opendit.load(tmp_path / "nowhere", model)
    assert opendit.latest_checkpoint(tmp_path) is None
    assert attached(model) == {}


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(opendit.CheckpointError, match=r"pip install 'opendit\[checkpoint\]'"):
        opendit.save(tmp_path, torch.nn.Linear(2, 2), step=1)
    assert list(tmp_path.iterdir()) == []


def test_loading_draws_nothing(tmp_path):
    """Loading draws nothing: the random states are those that were saved, wherever they are looked at."""
    model = torch.nn.Linear(2, 2)
    opendit.save(tmp_path, model, step=0)
    expected = (torch.rand(3), random.random(), numpy.random.rand())
    opendit.load(tmp_path, model)
    found = (torch.rand(3), random.random(), numpy.random.rand())
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    opendit.load(tmp_path, model, leave=("rng",))
    assert not torch.equal(torch.rand(3), expected[0])
