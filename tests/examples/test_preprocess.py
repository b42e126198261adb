"""Preprocessing as users run it: what is written, kills and resumes, several processes; training on what it wrote."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.common import Process
from examples.data import open_data
from examples.encoders import load_text_encoder, load_vae
from examples.loading import loader_for
from tests.examples import preparing
from tests.examples.making import captioned_folder, clip, image_folder, tiny_text_encoder, tiny_vae, video_table
from tests.launch import of_every_rank

ROOT = Path(__file__).resolve().parents[2]
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nets")
    tiny_vae(root / "vae")
    tiny_text_encoder(root / "text", "t5")
    return root


def preprocess(monkeypatch, kind: str, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *map(str, arguments), "--device", "cpu"])
    importlib.import_module(f"examples.{kind}.preprocess").main()


def contents(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def test_training_from_latents_is_training_from_pixels_to_the_bit(nets, tmp_path, monkeypatch, capfd):
    """Over two epochs, with flips, captions, a broken file, other batch sizes than preprocess's, and workers."""
    root = captioned_folder(tmp_path / "data", 8)
    (root / "3.png").write_bytes(b"no image")
    options = ["--image_size", 16, "--flip", "--global_seed", 5, "--batch_size", 3, "--shard_size", 3]
    networks = ["--vae", nets / "vae", "--text_encoder", nets / "text", "--text_length", 6]
    preprocess(monkeypatch, "image", "--data_path", root, "--out", tmp_path / "latents", *options, *networks)
    assert "7 samples, 3 captions" in capfd.readouterr().out
    vae, text = load_vae(nets / "vae"), load_text_encoder(nets / "text", length=6)
    shape = {"image_size": 16, "flip": True, "seed": 5}
    pixels, latents = open_data(root, **shape), open_data(tmp_path / "latents", **shape)
    assert len(latents) == len(pixels) == 8
    assert latents.classes == pixels.classes == ["bird", "cat", "dog"]
    assert [why.partition(":")[0] for why in latents.skipped] == ["3.png"]

    def train(from_latents: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 4, 3, padding=1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        options = {"batch_size": 4, "seed": 1, "workers": int(from_latents), "device": ALONE.device}
        sampler, loader = loader_for(latents if from_latents else pixels, model, **options)
        stream = sampler.over(loader)
        for step in range(4):
            batch = next(stream)
            mean, std = (batch["mean"], batch["std"]) if from_latents else vae.encode(batch["pixels"])
            tokens = batch["text"] if from_latents else text.encode(batch["caption"])[0]
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
            z = mean + std * noise
            loss = (model(z) * tokens.mean((1, 2)).view(-1, 1, 1, 1) - batch["label"].view(-1, 1, 1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))
    tokens, mask, pooled = text.encode(["", "a blue dog"])
    assert all(torch.equal(a, b[0]) for a, b in zip(latents.text().values(), (tokens, mask, pooled), strict=True))
    assert torch.equal(latents[4]["text_mask"], mask[1])
    assert torch.equal(latents[4]["pooled"], pooled[1])


def test_windows_of_videos_and_their_variants(nets, tmp_path, monkeypatch, capfd):
    table = video_table(tmp_path / "data", frames=14)
    clip(tmp_path / "data" / "short.mp4", 3)
    with table.open("a") as file:
        file.write("short.mp4,too short\n")
    shape = {"image_size": 16, "num_frames": 3, "frame_interval": 2, "flip": True, "seed": 1}
    options = [f"--{name}={value}" for name, value in shape.items() if name not in ("flip", "seed")]
    options += ["--flip", "--global_seed=1", "--variants=4", "--vae", nets / "vae", "--shard_size=2"]
    preprocess(monkeypatch, "video", "--data_path", table, "--out", tmp_path / "latents", *options)
    written = capfd.readouterr()
    assert "3 samples" in written.out
    assert "1 could not be used and are named in index.json" in written.out
    pixels, latents = open_data(table, **shape), open_data(tmp_path / "latents", **shape)
    vae = load_vae(nets / "vae")
    for epoch, i in ((0, 0), (1, 2), (3, 1), (2, 3)):
        mean, std = vae.encode(pixels[epoch, i]["pixels"][None])
        sample = latents[epoch, i]
        assert sample["mean"].shape == (3, 4, 8, 8)
        assert torch.equal(sample["mean"], mean[0])
        assert torch.equal(sample["std"], std[0])
        assert torch.equal(latents[epoch + 4, i]["mean"], mean[0])
    assert not torch.equal(latents[0, 0]["mean"], latents[1, 0]["mean"])
    assert json.loads((tmp_path / "latents" / "index.json").read_text())["holes"] == [
        {"id": 3, "why": "short.mp4: too short: 3 frames, 3 at an interval of 2 need 5"}
    ]


def test_a_killed_run_goes_on_where_it_was(nets, tmp_path, monkeypatch, capfd):
    root = image_folder(tmp_path / "data", per_class=12)
    arguments = ["--data_path", root, "--image_size", 16, "--vae", nets / "vae", "--shard_size", 2, "--batch_size", 2]
    arguments = list(map(str, arguments))
    out = tmp_path / "killed"
    # As from the shell; each shard takes a while, so that the kill comes in the middle.
    slow = (
        "import sys, time; import examples.data.prepare as p; save = p.save\n"
        "def slowly(*a, **k):\n    time.sleep(0.3); return save(*a, **k)\n"
        "p.save = slowly\n"
        f"sys.argv = ['preprocess.py', '--out', {str(out)!r}, '--device', 'cpu', *{arguments!r}]\n"
        "from examples.image.preprocess import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(out.glob("latents-*.safetensors"))) < 3 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("latents-*.safetensors")}
    assert 3 <= len(done) < 12
    assert not (out / "index.json").exists()
    (out / "latents-00007.safetensors.part").write_bytes(b"half a shard")
    with pytest.raises(ValueError, match=r"preprocessing of .*killed was not finished\. Run the same"):
        open_data(out, image_size=16)

    preprocess(monkeypatch, "image", "--out", out, *arguments)
    assert all((out / name).stat().st_mtime_ns == when for name, when in done.items())
    preprocess(monkeypatch, "image", "--out", tmp_path / "whole", *arguments)
    assert same(contents(out), contents(tmp_path / "whole"))
    assert (out / "index.json").read_text() == (tmp_path / "whole" / "index.json").read_text()
    assert not list(out.glob("*.part"))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # shards are as readable as the index

    # Again, and nothing is left to do; with other settings, it is refused.
    preprocess(monkeypatch, "image", "--out", out, *arguments)
    assert all((out / name).stat().st_mtime_ns == when for name, when in done.items())
    for changed, words in (
        (["--flip"], "was begun with "),
        (["--vae", nets], "was begun with vae "),
        (["--shard_size", 3], "was begun with shard_size 2, not 3"),
    ):
        assert words in mistake(monkeypatch, capfd, "image", "--out", out, *arguments, *changed)
    (root / "cat" / "00.png").unlink()
    assert "was begun with data " in mistake(monkeypatch, capfd, "image", "--out", out, *arguments)

    # A shard that is lost or cut is noticed before training, and made again.
    (root / "cat" / "00.png").write_bytes((root / "cat" / "03.png").read_bytes())
    shard = out / "latents-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"latents-00004.safetensors is missing or not \d+ bytes long"):
        open_data(out, image_size=16)
    shard.unlink()
    preprocess(monkeypatch, "image", "--out", out, *arguments)
    assert same(contents(out), contents(tmp_path / "whole"))


def test_two_processes_share_the_work_and_write_the_same(nets, tmp_path, monkeypatch):
    captioned_folder(tmp_path / "data", 9)
    (tmp_path / "data" / "4.png").write_bytes(b"no image")
    for name in ("vae", "text"):
        shutil.copytree(nets / name, tmp_path / name)
    for name, seed in (("real", 0), ("generated", 1)):
        image_folder(tmp_path / name, per_class=6 + seed, classes=("a", "b"))
    (tmp_path / "generated" / "a" / "01.jpg").write_bytes(b"no image")
    monkeypatch.setenv("PREPARING", str(tmp_path))
    alone = preparing.prepare(tmp_path, tmp_path / "out1", ALONE)
    ranks = of_every_rank("tests.examples.preparing", 2, "prepare")
    assert sorted(ranks[0]["made"] + ranks[1]["made"]) == sorted(alone["made"])
    assert abs(len(ranks[0]["made"]) - len(ranks[1]["made"])) <= 1
    assert ranks[0]["index"] == ranks[1]["index"] == alone["index"]
    assert [hole["id"] for hole in alone["index"]["holes"]] == [4]
    assert same(contents(tmp_path / "out1"), contents(tmp_path / "out2"))

    one = preparing.score(tmp_path, ALONE)
    for found in of_every_rank("tests.examples.preparing", 2, "score"):
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert found[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
    assert (one["real"], one["generated"], len(one["skipped"])) == (12, 13, 1)


def mistake(monkeypatch, capfd, kind: str, *arguments) -> str:
    """The one line that the script writes."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        preprocess(monkeypatch, kind, *arguments)
    assert stop.value.code == 2
    written = capfd.readouterr().err.strip()
    assert "\n" not in written
    assert written.startswith("preprocess.py: error: ")
    return written


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("image", ["--text_length", 5], "--text_length: without --text_encoder"),
        ("image", ["--text_encoder", "x"], "text_encoder: got x, but"),
        ("image", ["--num_frames", 4], "unrecognized arguments: --num_frames 4"),
        ("image", ["--dtype", "fp8"], "invalid choice: 'fp8'"),
        ("image", ["--image_size", "-3"], "--image_size"),
        ("image", ["--data_path", "/nowhere"], "data_path: /nowhere does not exist"),
        ("image", ["--vae", "/nowhere"], "vae: the folder /nowhere does not exist"),
        ("image", ["--out", str(ROOT)], "is not empty, and was not made by preprocess"),
        ("image", ["--image_size", "15"], "image_size: got 15; allowed with"),
        ("video", ["--num_frames", 1], "a clip has at least 2 frames"),
        ("video", ["--flip", "--variants", 3], "--variants: 3 with --flip"),
        ("video", [], "holds no videos; it has images"),
    ],
)
def test_mistakes_cost_one_line(nets, tmp_path, monkeypatch, capfd, kind, arguments, words):
    root = image_folder(tmp_path / "data", per_class=1)
    if "--vae" not in arguments and "15" not in arguments:  # nothing may be loaded before the line is there
        monkeypatch.setattr(f"examples.{kind}.preprocess.load_vae", None)
    fixed = ["--data_path", root, "--out", tmp_path / "out", "--vae", nets / "vae"]
    assert words in mistake(monkeypatch, capfd, kind, *fixed, *arguments)


def test_latents_are_opened_only_as_what_they_are(nets, tmp_path, monkeypatch, capfd):
    root = image_folder(tmp_path / "data", per_class=1)
    out = tmp_path / "out"
    mistake(monkeypatch, capfd, "image", "--data_path", root, "--out", out, "--vae", nets / "typo")  # spoils nothing
    preprocess(
        monkeypatch,
        "image",
        "--data_path",
        root,
        "--out",
        out,
        "--vae",
        nets / "vae",
        "--image_size",
        16,
        "--dtype",
        "bf16",
    )
    assert load_file(out / "latents-00000.safetensors")["mean"].dtype == torch.bfloat16
    assert open_data(out, image_size=16)[0]["mean"].dtype == torch.float32
    for change, words in (
        ({"image_size": 32}, "image_size: got 32; the latents in .* were made with 16"),
        ({"flip": True}, "flip: got True; the latents in .* were made with False"),
        ({"num_frames": 2}, "num_frames: got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            open_data(out, **{"image_size": 16, **change})
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "format": "other"}))
    with pytest.raises(ValueError, match="has format 'other'; allowed: 'opendit-latents-1'"):
        open_data(out, image_size=16)


@pytest.mark.parametrize(("script", "program"), [("preprocess.sh", "preprocess.py"), ("eval.sh", "evaluate.py")])
def test_shell_scripts_start_the_programs(tmp_path, script, program):
    """With tools/venv.sh replaced: it installs packages."""
    shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "venv.sh").write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(*arguments, **more):
        environment = {**os.environ, "PATH": path, **more}
        return subprocess.run([tmp_path / script, *arguments], capture_output=True, text=True, env=environment)

    assert run("video", "--x", "a b").stdout == f"python {tmp_path}/examples/video/{program} --x a b\n"
    two = run("image", "--x", NPROC="2").stdout
    assert two == f"torchrun --standalone --nproc_per_node=2 {tmp_path}/examples/image/{program} --x\n"
    wrong = run("audio")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"{script}: error: the first argument is image or video, not 'audio'\n",
    )
    for kind in ("image", "video"):
        assert (ROOT / "examples" / kind / program).is_file()
