"""The training benchmarks run, and report no speed of what trains wrongly."""

from __future__ import annotations

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import opendit
import opendit.patch.adaln
from benchmarks import largest_batch, loss_curves, parity, train_step, training
from benchmarks.parity import Error, too_far
from benchmarks.records import load

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="smoke runs are for machines without a GPU")


def smoke(monkeypatch: pytest.MonkeyPatch, script, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--smoke", *options])
    return script.main()


def broken_once_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong where the probes of `accelerate` do not see it."""
    right, accelerate = opendit.patch.adaln.gate_residual, opendit.accelerate

    def wrong(x, y, gate, backend):
        return right(x, y, 1.02 * gate, backend=backend)

    def then_break(*args, **kwargs):
        monkeypatch.setattr(opendit.patch.adaln, "gate_residual", right)
        accelerated = accelerate(*args, **kwargs)
        monkeypatch.setattr(opendit.patch.adaln, "gate_residual", wrong)
        return accelerated

    monkeypatch.setattr(opendit, "accelerate", then_break)


@on_cpu
def test_smoke(monkeypatch, capsys):
    assert smoke(monkeypatch, train_step, "--ablate", "--variants", "eager", "torch.compile", "opendit") == 0
    table = capsys.readouterr().out.partition("ratios to")[2]
    for name in ("eager", "opendit", *training.LADDER):
        (line,) = (line for line in table.splitlines() if line.startswith(f"{name} "))
        assert "img/s" in line
        assert ("gradients" in line) == (name != "eager")


@on_cpu
def test_a_wrong_kernel_gets_no_speed(monkeypatch, capsys):
    broken_once_accelerated(monkeypatch)
    assert smoke(monkeypatch, train_step, "--variants", "eager", "opendit") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("opendit")]
    assert lines
    assert all("no speed is reported" in line and "img/s" not in line for line in lines)
    assert all("gradients off by" in line for line in lines)


@on_cpu
def test_what_fails_leaves_the_others_alone(monkeypatch, capsys):
    def fail(model):
        raise torch.OutOfMemoryError if "opendit" not in str(type(model)) else RuntimeError

    monkeypatch.setattr(training, "check_accelerated", fail)
    assert smoke(monkeypatch, train_step, "--parity", "0", "--variants", "opendit", "eager") == 0
    out = capsys.readouterr().out
    assert "out of memory" in out
    assert "img/s" in out


@on_cpu
def test_variants_see_the_same_numbers():
    """Whatever the variant, step i draws the same latents, noise, timesteps, labels and label drops."""
    losses = {}
    for name in ("as published", "eager", "opendit"):
        torch.manual_seed(len(name))
        steps = training.Training(
            training.make_model("smoke", 32, torch.device("cpu")), training.VARIANTS[name], batch=16
        )
        losses[name] = parity.losses(steps, 3)
    bf16 = training.Training(training.make_model("smoke", 32, torch.device("cpu")), training.BF16_WEIGHTS, batch=16)
    losses["bf16 weights"] = parity.losses(bf16, 3)
    assert bf16.parameters[0].dtype == torch.bfloat16
    assert bf16.masters[0].dtype == bf16.ema[0].dtype == torch.float32
    for name, found in losses.items():
        assert found == pytest.approx(losses["as published"], rel=2e-3), name


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (Error(1.1e-2, 1.0, "w", 0.0), None),
        (Error(1.3e-2, 1.0, "w", 0.0), "gradients"),
        (Error(float("nan"), 1.0, "w", 0.0), "gradients"),
        (Error(1e-2, 1.0, "w", 3e-3), "losses"),
        (Error(1e-2, 1.0, "w", float("nan")), "losses"),
    ],
)
def test_what_parity_allows(ours, reason):
    found = too_far(ours, Error(1e-2, 1.0, "w", 1e-3))
    assert (found is None) if reason is None else (reason in found)


def test_one_rung_is_the_recipe():
    last = training.LADDER["+ CUDA graphs"]
    assert last.same(training.VARIANTS["opendit"])
    assert not last.same(training.VARIANTS["opendit compiled"])


def test_the_files_that_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--out", str(tmp_path), "--batch", "256"])
    args = train_step.parse()
    assert train_step.parity_batch(args) == 16
    files, rows = {}, []
    for name in ("torch.compile", "opendit", "adaln only"):
        row = {"variant": name, "model": args.model, "image_size": 256, "batch": 256, "ms": 2.0 - len(rows) / 2}
        rows.append(row | {"images_per_s": 1.0, "booster": train_step.ALL[name].booster})
        train_step.compare(rows)
        train_step.write(rows, files, args, 256, True)
    again: dict = {}
    train_step.write(rows, again, args, 256, False)
    assert set(files) == set(again) == {"train_step", "ablation"}
    assert len(list(tmp_path.glob("*.json"))) == 4  # an older file is never overwritten
    whole, ladder = (json.loads(files[theme].read_text()) for theme in ("train_step", "ablation"))
    assert [r["variant"] for r in whole["results"]] == ["torch.compile", "opendit"]
    assert [r["ratio_to_compile"] for r in ladder["results"]] == pytest.approx([1, 2 / 1.5, 2])
    assert whole["theme"] == "train_step_dit-xl-2_256px_b256"
    assert whole["cold"]
    assert [record.complete for record in load(tmp_path)] == [True] * 4


@pytest.mark.parametrize("limit", [8.0, 20.0, 80.0, 139.8])
@pytest.mark.parametrize("per_sample", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("bend", [-0.1, 0.0, 0.1])
def test_the_largest_batch_is_found(limit, per_sample, bend):
    tried = []

    def memory(batch: int) -> float:
        return max(10.0, 8 + per_sample * batch * (1 + bend * min(batch, 500) / 500))

    def fits(batch: int) -> float | None:
        tried.append(batch)
        return memory(batch) if memory(batch) <= limit else None

    found = largest_batch.largest(fits, 0.97 * limit)
    assert found % 8 == 0
    assert found == 0 or memory(found) <= limit
    assert memory(found + 8) > limit
    assert len(tried) == len(set(tried)) <= 16


@on_cpu
def test_largest_batch_smoke(monkeypatch, capsys):
    assert smoke(monkeypatch, largest_batch) == 0
    assert capsys.readouterr().out.count("batch 24,") == 3


@pytest.mark.slow
@on_cpu
def test_loss_curves_smoke(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    assert smoke(monkeypatch, loss_curves) == 0
    assert "bf16 − inherit" in capsys.readouterr().out


@on_cpu
def test_loss_curves_differ_by_arithmetic_alone(monkeypatch):
    data = {"images": torch.randint(256, (20, 1, 8, 8)).byte(), "labels": torch.arange(20) % 10}
    curves = {}
    for variant, seed in (("autocast", 0), ("inherit", 0), ("bf16", 0), ("bf16", 1)):
        monkeypatch.setattr(sys, "argv", ["", "--smoke", "--variant", variant, "--seed", str(seed)])
        curves[variant, seed] = loss_curves.train(loss_curves.parse(), data)
    for variant in ("inherit", "bf16"):
        torch.testing.assert_close(curves[variant, 0], curves["autocast", 0], rtol=2e-3, atol=0)
    assert not torch.allclose(curves["bf16", 1], curves["bf16", 0], rtol=2e-2)


@on_cpu
def test_loss_curves_that_were_cut_go_on_to_the_bit(monkeypatch, tmp_path):
    data = {"images": torch.randint(256, (20, 1, 8, 8)).byte(), "labels": torch.arange(20) % 10}

    def trained(*more: str) -> torch.Tensor:
        monkeypatch.setattr(sys, "argv", ["", "--smoke", "--variant", "bf16", "--seed", "0", *more])
        return loss_curves.train(loss_curves.parse(), data)

    whole = trained()
    state = ("--state", str(tmp_path))
    monkeypatch.setattr(loss_curves, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    first = trained(*state, "--seconds", "3")  # of a clock that ticks once a look
    assert 1 < len(first) < len(whole) == 6
    assert torch.equal(trained(*state, "--seconds", "100"), whole)
    with pytest.raises(SystemExit):
        trained("--seconds", "3")


def test_the_verdict_on_loss_curves():
    finals = {"inherit": (1.0, 1.1, 1.2), "bf16": (1.01, 1.11, 1.21), "wrong": (1.3, 1.4, 1.5)}
    rows = [
        {"variant": name, "seed": seed, "final": value}
        for name, values in finals.items()
        for seed, value in enumerate(values)
    ]
    rows.append({"variant": "bf16", "seed": 3, "error": "killed"})
    verdicts = {(v["variant"], v["baseline"]): v for v in loss_curves.judge(rows)}
    assert verdicts["bf16", "inherit"]["difference"] == pytest.approx(0.01)
    assert verdicts["bf16", "inherit"]["verdict"].startswith("less")
    assert verdicts["wrong", "inherit"]["verdict"].startswith("more")
