"""The checkpoints that come with the project: small, described, and good, as a newcomer meets them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from examples import options
from examples.diffusion import sample
from examples.image import sample as script
from examples.image.judge import judge_digits
from examples.models.checkpoint import load_checkpoint
from examples.models.export import export, main

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "examples/checkpoints").glob("*/model.safetensors"))
MEGABYTES = 15


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_is_small_and_described(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MEGABYTES * 1e6
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (folder / "README.md").read_text()
    for word in ("Training:", "Data:", "Measured", "parameters", "Licence:"):
        assert word in card
    model, config = load_checkpoint(folder, kind="image")
    assert f"{sum(value.numel() for value in model.state_dict().values()):,}" in card
    assert len(config["classes"]) == model.num_classes


def test_those_that_sample_takes_are_there():
    assert options.shipped_checkpoint() in FOLDERS
    assert [folder for folder in FOLDERS if folder not in options.SHIPPED] == []


def test_digits_are_digits():
    model, _ = load_checkpoint(ROOT / "examples/checkpoints/digits")
    labels = torch.arange(10).repeat_interleave(10)
    images = sample(model, {"y": labels}, sampler="heun", steps=10, cfg_scale=2.0, seed=1)
    assert judge_digits(images, labels)["requested_class_share"] >= 0.97


def test_without_a_checkpoint_images_come_within_a_minute(tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.png"
    monkeypatch.setattr(sys, "argv", ["sample.py", "--per_class", "2", "--out", str(out), "--device", "cpu"])
    start = time.perf_counter()
    script.main()
    assert time.perf_counter() - start < 60
    assert "its README.md describes" in capsys.readouterr().out
    assert np.asarray(Image.open(out)).std() > 30


def test_one_that_is_better_drops_in(tmp_path, monkeypatch):
    better, digits = tmp_path / "cifar10", ROOT / "examples/checkpoints/digits"
    monkeypatch.setattr(options, "SHIPPED", (better, digits))
    assert options.shipped_checkpoint() == digits
    state = load_file(digits / "model.safetensors")
    export(better, state, json.loads((digits / "config.json").read_text()), "Better", "text")
    assert options.shipped_checkpoint() == better


def test_export_rounds_once(tmp_path, monkeypatch):
    """From what train.py writes, in fp32, to bf16; again, and nothing changes."""
    digits = ROOT / "examples/checkpoints/digits"
    full = {name: value.float() * 1.001 for name, value in load_file(digits / "model.safetensors").items()}
    config = json.loads((digits / "config.json").read_text())
    (tmp_path / "card.md").write_text("- Training: none.\n")
    export(tmp_path / "once", full, config, "Title", "- Training: none.")
    words = [str(tmp_path / "once"), str(tmp_path / "twice"), "--title", "Title", "--card", str(tmp_path / "card.md")]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    main()
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name
    found = load_file(tmp_path / "twice" / "model.safetensors")
    for name, value in full.items():
        assert torch.equal(found[name], value.bfloat16()), name
    assert (tmp_path / "once/README.md").read_text().startswith("# Title\n\n- Training: none.")
