"""Checkpoints of what `accelerate` made whole: an engine, a precision with its loss scale, averages, a schedule."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import opendit
from opendit.stepping import stepper_of
from opendit.wrapping import unwrap
from tests.launch import of_every_rank
from tests.tiny_models import UserDiT, randomise

DECAYS = (0.5, 0.9)


class Run:
    def __init__(self, seed: int, **cfg: Any) -> None:
        torch.manual_seed(seed)
        model = randomise(UserDiT(size=4, dim=16, heads=2, depth=2), seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.model, self.optimizer = opendit.accelerate(model, {"ema": DECAYS, **cfg}, optimizer=optimizer)
        self.schedule = opendit.schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        self.step = 0

    def train(self, until: int, overflow: int | None = None) -> None:
        ranks, rank = opendit.data_parallel_size(self.model), opendit.data_parallel_rank(self.model)
        while self.step < until:
            ids = torch.arange(4) + 4 * self.step
            mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
            x = opendit.noise((4, 4, 4), 7, self.step, ids)[mine]
            # No label is dropped at random: that would draw differently in each layout of processes.
            out = self.model.eval()(x, opendit.timesteps(1000, 7, self.step, ids)[mine], ids[mine] % 5)
            loss = out.square().mean()
            (loss * float("inf") if self.step == overflow else loss).backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.step += 1

    def facts(self) -> dict[str, Any]:
        model = unwrap(self.model)
        found: dict[str, Any] = {f"model {n}": whole(v) for n, v in model.state_dict().items()}
        for name, p in model.named_parameters():
            found |= {f"{k} {name}": whole(v) for k, v in self.optimizer.state.get(p, {}).items()}
        for decay in DECAYS:
            found |= {f"ema {decay} {n}": v for n, v in opendit.ema_state_dict(self.model, decay).items()}
        found["rule"] = stepper_of(model).state()
        found["lr"] = self.optimizer.param_groups[0]["lr"]
        return found


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys()
    pairs = ((name, found[name], expected[name]) for name in expected)
    return [n for n, a, b in pairs if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resumed_is_uninterrupted(tmp_path: Path, precision: str) -> None:
    kept = Run(0, precision=precision)
    kept.train(4, overflow=2)
    opendit.save(tmp_path, kept.model, kept.optimizer, scheduler=kept.schedule, step=kept.step)
    saved = kept.facts()
    assert saved["rule"]["skipped"] >= 1  # a loss scale may begin too high besides
    kept.train(7)

    resumed = Run(1, precision=precision)
    resumed.train(1)
    loaded = opendit.load(tmp_path, resumed.model, resumed.optimizer, scheduler=resumed.schedule)
    assert differing(resumed.facts(), saved) == []
    resumed.step = loaded.step
    resumed.train(7)
    assert differing(resumed.facts(), kept.facts()) == []


def cases(world: int):
    return {"elsewhere": _saved_by_one_engine_loaded_by_another}


def _saved_by_one_engine_loaded_by_another() -> dict[str, Any]:
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    first = Run(0, plugin="zero3")
    first.train(3)
    opendit.save(folder, first.model, first.optimizer, scheduler=first.schedule, step=first.step)
    saved = first.facts()
    found = {"folder": str(folder), "saved": saved}
    for plugin in ("ddp", "zero2"):
        other = Run(1, plugin=plugin)
        other.train(1)
        opendit.load(folder, other.model, other.optimizer, scheduler=other.schedule)
        found[plugin] = differing(other.facts(), saved)
    return found


def test_saved_by_one_engine_is_loaded_by_another_and_by_one_process() -> None:
    first, second = of_every_rank(__name__, 2, "elsewhere")
    for found in (first, second):
        assert found["ddp"] == found["zero2"] == []
    alone = Run(2)
    alone.train(1)
    opendit.load(first["folder"], alone.model, alone.optimizer, scheduler=alone.schedule)
    assert any(name.startswith("ema 0.9") for name in first["saved"])
    assert differing(alone.facts(), first["saved"]) == []


def test_averages_do_not_load_into_a_model_without_any(tmp_path: Path) -> None:
    run = Run(0)
    run.train(1)
    opendit.save(tmp_path, run.model, run.optimizer, step=1)
    plain = UserDiT(size=4, dim=16, heads=2, depth=2)
    with pytest.raises(opendit.CheckpointError, match=r"stepping|ema"):
        opendit.load(tmp_path, plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad]))


def test_a_restored_model_has_no_averages_to_save(tmp_path: Path) -> None:
    run = Run(0)
    run.train(1)
    opendit.restore(run.model)
    opendit.save(tmp_path, run.model, run.optimizer, step=1)
    plain = UserDiT(size=4, dim=16, heads=2, depth=2)
    opendit.load(tmp_path, plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad]))


def test_averages_that_stand_in_are_not_saved_as_the_model(tmp_path: Path) -> None:
    run = Run(0)
    run.train(1)
    opendit.save(tmp_path, run.model, run.optimizer, step=1)
    with opendit.ema_weights(run.model):
        with pytest.raises((ValueError, opendit.CheckpointError), match=r"an EMA.s just now"):
            opendit.save(tmp_path, run.model, run.optimizer, step=2)
        with pytest.raises((ValueError, opendit.CheckpointError), match=r"an EMA.s just now"):
            opendit.load(tmp_path, run.model, run.optimizer)
    assert opendit.latest_checkpoint(tmp_path).name == "step-00000001"


def test_colossalais_gemini_is_refused(tmp_path: Path) -> None:
    class GeminiDDP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = UserDiT(size=4, dim=16, heads=2, depth=2)

    for call in (lambda model: opendit.save(tmp_path, model, step=1), lambda model: opendit.load(tmp_path, model)):
        with pytest.raises(ValueError, match=r"model: it is on ColossalAI's 'gemini', whose fp32 masters"):
            call(GeminiDDP())
