"""Saves in the background: what is on the disk is what was there when `save` returned; what goes wrong is told."""

from __future__ import annotations

import threading

import pytest
import torch

import opendit
from opendit.checkpoint import disk, shards, writing
from tests.checkpoint.running import Trainer, differences


@pytest.fixture
def gate(monkeypatch):
    """Holds the writing back until it is opened."""
    opened = threading.Event()
    write = shards.write

    def held(*args):
        assert opened.wait(30)
        return write(*args)

    monkeypatch.setattr(shards, "write", held)
    return opened


def test_training_goes_on_while_the_past_is_written(tmp_path, gate):
    trainer = Trainer(0)
    trainer.train(2)
    saved = trainer.facts()
    saving = trainer.save(tmp_path, background=True)
    assert disk.names(tmp_path) == []
    trainer.train(5)
    with torch.no_grad():
        for p in (*trainer.model.parameters(), *trainer.ema.parameters()):
            p.fill_(float("nan"))
        for state in trainer.optimizer.state.values():
            for value in state.values():
                value.fill_(float("nan"))
    trainer.losses.clear()
    gate.set()
    assert saving.wait().name == "step-00000002"
    trainer.load(tmp_path)
    assert differences(trainer.facts(), saved) == []


def test_without_the_copy_the_snapshot_would_be_torn(tmp_path, gate, monkeypatch):
    """A mutant: what the test above sees without the copy."""
    monkeypatch.setattr(writing, "copied", lambda job: job)
    trainer = Trainer(0)
    trainer.train(2)
    saved = trainer.facts()
    saving = trainer.save(tmp_path, background=True)
    trainer.train(5)
    gate.set()
    saving.wait()
    trainer.load(tmp_path)
    assert differences(trainer.facts(), saved)


def test_an_error_surfaces_at_wait_and_at_the_next_save(tmp_path, monkeypatch):
    trainer = Trainer(0)
    trainer.train(1)
    trainer.save(tmp_path)
    trainer.train(2)

    def full(*args):
        raise OSError(28, "No space left on device")

    for again in (
        lambda saving: saving.wait(),
        lambda saving: opendit.wait(),
        lambda saving: trainer.save(tmp_path),
        lambda saving: trainer.load(tmp_path),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "write", full)
            saving = trainer.save(tmp_path, background=True)
            saving._thread.join()
        with pytest.raises(opendit.CheckpointError, match="No space left"):
            again(saving)
        opendit.wait()  # told once
        with pytest.raises(opendit.CheckpointError, match="it failed"):
            saving.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    trainer.save(tmp_path)
    assert opendit.latest_checkpoint(tmp_path).name == "step-00000002"


def test_saves_follow_each_other(tmp_path):
    trainer = Trainer(0)
    for until in range(1, 6):
        trainer.train(until)
        trainer.save(tmp_path, background=True, keep=2)
    opendit.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000004", "step-00000005"]
    saved = trainer.facts()
    trainer.train(7)
    trainer.load(tmp_path)
    assert differences(trainer.facts(), saved) == []


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Moments and weights of a GPU are copied before `save` returns, and come back; GPUs' random states too."""
    model = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 64, device="cuda")).sum().backward()
    optimizer.step()

    def held():
        moments = {(i, key): v for i, p in enumerate(model.parameters()) for key, v in optimizer.state[p].items()}
        return moments | dict(model.named_parameters())

    saved = {key: v.clone() for key, v in held().items()}
    for _ in range(2):  # the second goes through the host memory of the first
        saving = opendit.save(tmp_path, model, optimizer, step=1, background=True)
        drawn = torch.rand(5, device="cuda")
        with torch.no_grad():
            for value in held().values():
                value.fill_(3.0)
        saving.wait()
        opendit.load(tmp_path, model, optimizer)
        found = held()
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], v) and found[key].device == v.device for key, v in saved.items())
        assert torch.equal(torch.rand(5, device="cuda"), drawn)
        torch.rand(3, device="cuda")
