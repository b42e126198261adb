"""The pages say what the result files give, and tables are made sensibly of whatever files there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import charts, fill_tables
from benchmarks.fill_tables import TABLES
from benchmarks.records import load, newest


def write(folder: Path, theme: str, rows: list, date: str = "2030-01-01", **facts) -> Path:
    path = folder / f"{theme}_h200_{date}.json"
    data = {
        "theme": theme,
        "date": date.partition("_")[0],
        "commit": "0123456789abcdef",
        "hardware": {"gpu": "NVIDIA H200"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    }
    path.write_text(json.dumps(data | facts | {"results": rows}))
    return path


def step(variant: str, ms: float | None, **more) -> dict:
    row = {"variant": variant, "model": "DiT-XL/2", "image_size": 256, "batch": 64, "booster": None}
    if variant.startswith(("opendit", "+")):
        row["booster"] = "train"
    if ms is not None:
        row |= {"ms": ms, "images_per_s": 64000 / ms, "peak_gib": 30.0, "reserved_gib": 31.0, "host_ms": 9.0}
    return row | more


ERRORS = {"gradients": 9e-3, "worst_gradient": 2e-2, "worst_name": "blocks.0.w", "losses": 1e-4}
PARITY = {"steps": 20, "ours": ERRORS, "autocast": ERRORS, "bf16_weights": ERRORS | {"gradients": 3e-2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        step("torch.compile", 120.0),
        step("torch.compile bf16 weights", 100.0, first_step_s=60.0),
        step("opendit", 80.0, parity=PARITY),
        step("opendit compiled", None, error="gradients off | by 1: no speed is reported"),
        step("eager", None, error="out of memory"),
    ]
    write(tmp_path, "train_step_dit-xl-2_256px_b64", rows, cold=True)
    ladder = [rows[0], step("+ whole block", 90.0), step("+ bf16 residual", 81.0)]
    write(tmp_path, "ablation_dit-xl-2_256px_b64", ladder)
    largest = [
        {"variant": "opendit full", "model": "DiT-XL/2", "image_size": 256, "limit_gib": 139.8, "batch": 4000}
        | {"images_per_s": 650.0, "peak_gib": 130.0},
        {"variant": "torch.compile", "model": "DiT-XL/2", "image_size": 256, "limit_gib": 139.8, "error": "no"},
    ]
    write(tmp_path, "largest_batch_dit-xl-2_256px", largest)
    curves = [
        {"variant": name, "seed": seed, "batch": 4, "final": 1.0, "curve": [2.0, 1.5, 1.0]}
        for name in ("inherit", "bf16")
        for seed in range(2)
    ]
    verdict = {"variant": "bf16", "baseline": "inherit", "difference": 1e-4, "spread": 1e-2, "verdict": "less"}
    write(tmp_path, "loss_curves", curves, verdicts=[verdict], setting="a small DiT", smoothed_over=20)
    kernel = {"kernel": "k", "direction": "forward", "residual": "fp32", "B_L_D": [1, 2, 3]}
    shares = [kernel | {"contender": name, "share_of_copy": 0.9} for name in ("ours", "eager", "compile")]
    write(tmp_path, "kernels", shares, copy_tb_per_s=4.2)
    return tmp_path


def table(folder: Path, name: str) -> str:
    return TABLES[name](load(folder), lambda record: record.path.name)


def test_the_pages_are_what_the_files_give(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fill_tables", "--check"])
    assert fill_tables.main() == 0


@pytest.mark.parametrize("name", TABLES)
def test_without_files_nothing_was_measured(tmp_path, name):
    assert TABLES[name]([], lambda record: "") == ""
    page = fill_tables.fill(f"a\n<!-- table: {name} -->\nold\n<!-- end -->\nb\n", [], tmp_path)
    assert page == f"a\n<!-- table: {name} -->\nNot measured.\n<!-- end -->\nb\n"


def test_ratios_are_to_the_best_torch_compile(folder):
    lines = table(folder, "speed").splitlines()
    assert '| **`accelerate(model, "train")`** | 800 | 1.25× | 30.0 |' in lines
    assert "| `torch.compile`, bf16 autocast | 533 | 0.83× | 30.0 |" in lines
    assert "| eager, bf16 autocast | out of memory | – | – |" in lines
    assert any("refused" in line for line in lines)


def test_the_other_tables(folder):
    assert "| 640 | 800 | 1.25× | 30.0 | 30.0 |" in table(folder, "configurations")
    assert "| 60.0 |" in table(folder, "steps")
    assert "| refused | – | – |" in table(folder, "steps")
    assert "| out of memory | – | – |" in table(folder, "steps")
    assert "| 81.0 | 790 | 1.11× | 1.48× |" in table(folder, "ablation")
    assert "9.0e-3" in table(folder, "parity")
    assert "3.0e-2" in table(folder, "parity")
    assert "| 4000 | 650 | 130.0 |" in table(folder, "largest-batch")
    assert "| +1.00e-04 | 1.00e-02 | less |" in table(folder, "loss-curves")


def test_engines_that_differ_in_size_stand_beside_each_other(tmp_path):
    case = {"model": "DiT-XL/2", "image_size": 256, "batch": 64, "processes": 2, "cap_gib": None}
    plain = case | {"variant": "ddp", "ms": 100.0, "update_ms": 6.0, "states_gib": 7.5}
    save = {"stall_s": [2.5, 0.3], "written_s": 9.0, "ms_meanwhile": 110.0, "gib": 10.1}
    averaged = plain | {"variant": "ddp ema", "update_ms": 6.5, "ema_gib": 1.25, "save": save}
    write(tmp_path, "engines_dit-xl-2_256px", [plain, averaged])
    write(tmp_path, "engines_dit-xl-2_256px", [plain | {"processes": 1}], date="2030-01-02")
    write(tmp_path, "engines_dit-xl-2_256px", [plain | {"cap_gib": 8.0, "error": "no"}], date="2030-01-03")
    write(tmp_path, "engines_dit-xl-2_256px", [plain | {"variant": "ddp by hand", "ms": 99.0}], date="2030-01-01_2")
    lines = table(tmp_path, "engines")
    for said in (
        "2 GPUs, 64 each | ddp by hand | 99.0",
        "2 GPUs, 64 each |",
        "1 GPU, 64 each |",
        "64 each, at most 8 GiB | ddp | no |",
    ):
        assert said in lines
    assert "| ddp ema | 6.00 | 6.50 | 0.50 % |" in table(tmp_path, "engine-updates")
    assert "| ddp ema | 10.1 | 2.50 | 0.30 | 9.0 | 100.0 | 110.0 |" in table(tmp_path, "engine-saves")


def test_models_are_taken_from_the_newest_file_of_each(tmp_path):
    model = {"part": "model", "model": "DiT-XL/2", "tokens": 4096, "frames": 0}

    def row(variant: str, rate: float, times: float | None, **more) -> dict:
        return model | {"variant": variant} | more | {"train": {"samples_per_s": rate, "times_one": times, "gib": 9.0}}

    old = [row("one", 1.0, 1.0), row("sp=2", 1.5, 1.5), row("one", 7.0, 1.0, tokens=256, frames=16)]
    write(tmp_path, "sequence_parallel", old)
    sample = {"samples_per_s": 30.0, "times_one": None, "gib": 3.0}
    newer = [row("sp=2", 2.0, None), model | {"variant": "sp=2", "sample": sample}, model | {"variant": "dp=2"}]
    newer[-1]["train"] = {"failed": "out of memory"}
    write(tmp_path, "sequence_parallel", newer, date="2030-01-02")
    lines = table(tmp_path, "spread-models").splitlines()
    assert "| DiT-XL/2 | 16 × 256 | one | 7.00, 1.00, 9.0 | – |" in lines
    assert "| DiT-XL/2 | 4096 | sp=2 | 2.00, –, 9.0 | 30.00, –, 3.0 |" in lines
    assert "| DiT-XL/2 | 4096 | dp=2 | out of memory | – |" in lines
    assert not any("1.50" in line for line in lines)


def test_the_newest_complete_file_counts(folder):
    theme = "train_step_dit-xl-2_256px_b64"
    write(folder, theme, [step("opendit", 1.0)], date="2030-01-03")  # without anything to compare it with
    assert "1.25×" in table(folder, "speed")
    newer = [step("torch.compile", 100.0), step("opendit", 50.0)]
    write(folder, theme, newer, date="2030-01-01_10")
    write(folder, theme, [step("torch.compile", 100.0), step("opendit", 75.0)], date="2030-01-01_9")
    assert "2.00×" in table(folder, "speed")
    assert len(newest(load(folder), "train_step")) == 1


def test_check_sees_an_old_page_and_filling_mends_it(folder, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: speed -->\nby hand\n<!-- end -->\n")
    options = ["--results", str(folder), "--pages", str(page)]
    for more, status in (["--check"], 1), ([], 0), (["--check"], 0):
        monkeypatch.setattr(sys, "argv", ["fill_tables", *options, *more])
        assert fill_tables.main() == status
    page.write_text("<!-- table: unheard-of -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="unheard-of"):
        fill_tables.main()


def test_every_chart_is_drawn(folder):
    pytest.importorskip("matplotlib")
    written = {path.name for path in charts.draw_all(folder)}
    assert written == {"training_speed.png", "ablation.png", "kernels.png", "loss_curves.png"}
    assert "![training speed](training_speed.png)" in table(folder, "configurations")


def test_charts_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    assert charts.draw_all(tmp_path) == []
