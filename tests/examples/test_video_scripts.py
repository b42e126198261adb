"""video/train.py and sample.py on real files, tiny: train, resume, draw, by class and by text; the shell scripts."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from examples.models.checkpoint import load_checkpoint

pytest.importorskip("av", reason="clips are read with PyAV")

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--depth", 2, "--hidden_size", 32, "--num_heads", 2, "--batch_size", 4, "--device", "cpu", "--num_frames", 4,
        "--image_size", 8, "--sample_steps", 2, "--lr", 1e-2, "--warmup", 1]  # fmt: skip
MOTIONS = {"left": (-1, 0), "down": (0, 1)}


def clip(motion: tuple[int, int], start: int, frames: int = 6) -> list[Image.Image]:
    """A square that moves over a dark ground."""
    images = []
    for t in range(frames):
        image = Image.new("RGB", (24, 16), (20, 20, 40))
        x, y = 10 + start % 3 + 2 * t * motion[0], 6 + start % 2 + 2 * t * motion[1]
        ImageDraw.Draw(image).rectangle((x, y, x + 5, y + 5), fill=(250, 200, 40 * (start % 5)))
        images.append(image)
    return images


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder per class, and a table of captions beside it."""
    root = tmp_path_factory.mktemp("clips")
    with (root / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "text"])
        for name, motion in MOTIONS.items():
            (root / "all" / name).mkdir(parents=True)
            for i in range(6):
                path = root / "all" / name / f"{i}.gif"
                first, *rest = clip(motion, i)
                first.save(path, save_all=True, append_images=rest, duration=100)
                rows.writerow([path, f"a square goes {name}"])
    return root


@pytest.fixture
def call(monkeypatch):
    def call_main(script: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(f"examples.video.{script.removesuffix('.py')}").main()

    return call_main


def frames_of(path: Path) -> np.ndarray:
    with Image.open(path) as gif:
        return np.stack([np.asarray(_frame(gif, i)).astype(int) for i in range(gif.n_frames)])


def _frame(gif: Image.Image, i: int) -> Image.Image:
    gif.seek(i)
    return gif.convert("RGB")


@pytest.mark.parametrize("model", ["VDiT-Digits/2x2x2", "Latte-Digits/4"])
@pytest.mark.parametrize("by", ["class", "text"])
def test_train_resume_and_sample_end_to_end(tmp_path, clips, call, model, by):
    """The resumed run is the whole one to the bit, and what it draws does not depend on batch size or on opendit."""
    data = [clips / "all"] if by == "class" else [clips / "texts.csv", "--text_encoder", "words"]
    options = [*TINY, "--model", model, "--ckpt_every", 2, "--outputs", tmp_path, "--data_path", *data]
    call("train.py", *options, "--steps", 4, "--name", "whole", "--sample_every", 2)
    load = ["--load", tmp_path / "whole/checkpoints/step-00000002"]
    call("train.py", *options, "--steps", 4, "--name", "resumed", *load)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    _, config = load_checkpoint(tmp_path / "whole", kind="video")
    assert config["classes"] == (["down", "left"] if by == "class" else [])
    shown = frames_of(tmp_path / "whole/samples.gif")
    assert len(shown) == 4
    assert (tmp_path / "whole/samples/step-000002.gif").exists()
    assert "clips" not in json.loads((tmp_path / "whole/metrics.json").read_text())

    what = ["--classes", 0, 1] if by == "class" else ["--prompts", "a square goes left", "a square goes down"]
    common = ["--checkpoint", tmp_path / "whole", *what, "--per_class", 2, "--device", "cpu", "--steps", 2]
    drawn = []
    for name, flags in (("a", []), ("b", ["--batch_size", 3, "--no_accelerate"]), ("c", ["--seed", 1])):
        call("sample.py", *common, *flags, "--out", tmp_path / f"{name}.gif")
        drawn.append(frames_of(tmp_path / f"{name}.gif"))
    assert drawn[0].shape[0] == 4
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.5  # a GIF has 256 colours, which a last bit may move
    assert np.abs(drawn[0] - drawn[2]).mean() > 1


def test_a_clip_that_is_too_short_is_named_and_skipped(tmp_path, clips, call, capsys):
    folder = shutil.copytree(clips / "all", tmp_path / "some")
    first, second = clip((0, 1), 0, frames=2)
    first.save(folder / "left" / "short.gif", save_all=True, append_images=[second])
    call("train.py", *TINY, "--steps", 6, "--data_path", folder, "--outputs", tmp_path)
    metrics = json.loads((tmp_path / "some-flow/metrics.json").read_text())
    assert [Path(name).name for name in metrics["unreadable_files"]] == ["short.gif"]
    assert "1 files could not be read" in capsys.readouterr().out


def test_samples_as_files_are_data_again(tmp_path, clips, call):
    from examples.data import open_data

    call("train.py", *TINY, "--steps", 1, "--data_path", clips / "all", "--outputs", tmp_path, "--name", "v")
    call("sample.py", "--checkpoint", tmp_path / "v", "--steps", 2, "--device", "cpu", "--out_dir", tmp_path / "drawn")
    data = open_data(tmp_path / "drawn", image_size=8, num_frames=4)
    assert [data[i]["label"] for i in range(2)] == [0, 1]


def test_samples_as_mp4(tmp_path):
    import av

    from examples.video.report import save_clips

    clips = torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1).expand(3, 4, 3, 9, 9)
    save_clips(tmp_path / "x.mp4", clips, columns=2)
    with av.open(str(tmp_path / "x.mp4")) as container:
        means = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert len(means) == 4
    assert means == sorted(means)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train", [], "--data_path: is needed"),
        ("train", ["--data_path", "/nowhere"], "/nowhere does not exist"),
        ("train", ["--data_path", "x", "--model", "DiT-S/2"], "DiT-S/2"),
        ("train", ["--data_path", "x", "--compare_steps", "3"], "--compare_steps"),
        ("train", ["--data_path", "CLIPS", "--num_frames", "3", "--model", "VDiT-S/2x2x2", "--image_size", "8"],
         "3 frames are not a multiple"),
        ("sample", ["--checkpoint", "/nowhere"], "/nowhere"),
        ("sample", ["--checkpoint", "x", "--out", "x.png"], "does not end in one of .gif, .mp4"),
    ],
)  # fmt: skip
def test_mistakes_cost_one_line(monkeypatch, capsys, tmp_path, clips, script, arguments, words):
    arguments = [str(clips / "all") if a == "CLIPS" else a for a in arguments]
    outputs = ["--outputs", str(tmp_path)] if script == "train" else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments, *outputs, "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"examples.video.{script}").main()
    assert stop.value.code == 2
    written = capsys.readouterr().err.strip()
    assert "\n" not in written
    assert words in written


def test_a_models_kind_decides_its_script(tmp_path, clips, call, capsys, monkeypatch):
    call("train.py", *TINY, "--steps", 1, "--data_path", clips / "all", "--outputs", tmp_path, "--name", "v")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(tmp_path / "v"), "--device", "cpu"])
    with pytest.raises(SystemExit):
        importlib.import_module("examples.image.sample").main()
    assert "a model for videos; take examples/video/sample.py" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shell_scripts_run_what_they_wrap(tmp_path, clips):
    """From another folder, with paths of it. Their environment is the one that runs this test."""
    root = tmp_path / "opendit"
    (root / "tools").mkdir(parents=True)
    (root / "tools/venv.sh").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    for name in ("examples", "opendit"):
        (root / name).symlink_to(ROOT / name)
    for script in ROOT.glob("*.sh"):
        shutil.copy(script, root)

    def run(script, *arguments, **env):
        done = subprocess.run([str(root / script), *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
                              timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **env})  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    image = [*TINY[:8], "--steps", 2, "--compare_steps", 0, "--sample_steps", 2]
    assert "wrote outputs/digits-flow/" in run("train_img.sh", *image, NPROC="2")
    for script in ("sample_img.sh", "sample.sh"):
        run(script, "--checkpoint", "outputs/digits-flow", "--classes", 1, "--out", f"{script}.png", "--device", "cpu")
        assert (tmp_path / f"{script}.png").exists()
    run("train_video.sh", *TINY, "--steps", 2, "--data_path", clips / "all", "--name", "v")
    run("sample_video.sh", "--checkpoint", "outputs/v", "--steps", 2, "--out", "v.gif", "--device", "cpu")
    assert (tmp_path / "v.gif").exists()
