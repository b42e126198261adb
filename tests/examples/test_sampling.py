"""What sample.py makes of opendit's sampling: timesteps as announced, the step cache, guidance over two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.diffusion import SAMPLERS, sample, timesteps_of
from examples.image import sample as script
from examples.models.checkpoint import save_checkpoint
from examples.models.dit import DiT
from tests.tiny_models import randomise

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
    "learn_sigma": False,
}


class Asked(nn.Module):
    """It notes the timesteps that it is called at."""

    sample_shape, in_channels, learn_sigma = (1, 2, 2), 1, True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.times: list[float] = []

    def forward(self, x, t, y):
        assert len(set(t.tolist())) == 1
        self.times.append(t[0].item())
        return torch.cat([0.1 * x, 0.0 * x], 1) if self.learn_sigma else 0.1 * x


@pytest.mark.parametrize("sampler", sorted({name for names in SAMPLERS.values() for name in names}))
@pytest.mark.parametrize("steps", [1, 7])
def test_samplers_call_the_model_at_the_timesteps_announced(sampler, steps):
    model = Asked()
    model.learn_sigma = sampler not in SAMPLERS["flow"]
    sample(model, torch.tensor([0, 1]), sampler=sampler, steps=steps)
    assert model.times == pytest.approx(timesteps_of(sampler, steps), rel=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = randomise(DiT(**MODEL))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.6)
    config = {"architecture": "DiT", "model": MODEL, "objective": "flow", "pixels": True}
    save_checkpoint(folder, model.state_dict(), config)
    return folder


@pytest.fixture
def drawn(checkpoint, monkeypatch, tmp_path):
    """drawn(flags): the samples that sample.py draws, as it hands them to the picture."""

    def call(*flags: object) -> torch.Tensor:
        kept = []
        monkeypatch.setattr(script, "save_grid", lambda path, images, columns: kept.append(images))
        words = ["--checkpoint", checkpoint, "--classes", 1, 2, "--per_class", 3, "--steps", 6, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*words, "--out", tmp_path / "x.png", *flags])])
        script.main()
        return kept[0]

    return call


def test_sampling_is_the_same_as_without_opendit_and_in_any_batch(drawn):
    plain = drawn("--no_accelerate")
    for flags in ([], ["--batch_size", 4], ["--batch_size", 1]):
        torch.testing.assert_close(drawn(*flags), plain, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(drawn("--seed", 1), plain, atol=1e-2)


def test_the_step_cache_keeps_its_budget_in_any_batch(drawn, capsys):
    plain = drawn()
    cached = drawn("--cache_psnr", 25)
    said = capsys.readouterr().out
    assert "step cache: " in said
    assert "asked: PSNR of at least 25 dB" in said
    difference = (cached - plain)[:4].square().mean()  # the first four are those that it was calibrated on
    assert 0 < difference <= 4 * 10**-2.5
    torch.testing.assert_close(drawn("--cache_psnr", 25, "--batch_size", 4), cached, atol=2e-5, rtol=1e-4)
    assert not torch.equal(drawn("--cache_distance", 0.5), plain)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cache_psnr", 30, "--no_accelerate"], "--cache_psnr: is opendit's"),
        (["--cache_psnr", 30, "--cache_distance", 0.1], "--cache_distance: contradicts --cache_psnr"),
        (["--cache_psnr", 30, "--compile"], "--cache_psnr: compiled blocks can't be left out"),
        (["--cfg_parallel"], "--cfg_parallel: needs 2 processes"),
        (["--cfg_parallel", "--no_accelerate"], "--cfg_parallel: is opendit's"),
    ],
)
def test_mistakes_cost_one_line(drawn, capsys, flags, said):
    with pytest.raises(SystemExit):
        drawn(*flags)
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--cfg_parallel"], ["--cfg_parallel", "--cache_psnr", "25"], []])
def test_two_processes_draw_what_one_does(checkpoint, tmp_path, flags):
    """Byte for byte the same picture."""
    base = ["examples/image/sample.py", "--checkpoint", str(checkpoint), "--classes", "1", "2", "--per_class", "3"]
    base += ["--steps", "6", "--device", "cpu"]
    alone = [f for f in flags if f != "--cfg_parallel"]
    subprocess.run([sys.executable, *base, *alone, "--out", str(tmp_path / "1.png")], cwd=ROOT, check=True, timeout=600)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, *base, *flags, "--out", str(tmp_path / "2.png")], cwd=ROOT, check=True, timeout=600)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
