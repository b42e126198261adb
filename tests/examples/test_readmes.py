"""The commands of the READMEs under examples/, run as they stand there on small files."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.examples.making import captioned_folder, clip, image_folder, tiny_text_encoder, tiny_vae, video_table

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"./preprocess.sh": "preprocess", "./eval.sh": "evaluate"}


def commands(readme: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "examples" / readme / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reader")
    image_folder(root / "photos", per_class=2)
    image_folder(root / "samples", per_class=3)
    captioned_folder(root / "captioned", 4)
    video_table(root / "videos")
    (root / "videos" / "videos.csv").rename(root / "videos" / "t.csv")
    for path in (root / "videos").glob("*.mp4"):
        path.rename(root / path.name)
    (root / "videos" / "t.csv").rename(root / "videos.csv")
    for i in range(3):
        clip(root / "clips" / f"{i}.mp4", 5 + i)
    tiny_vae(root / "vae")
    tiny_text_encoder(root / "t5", "t5")
    tiny_text_encoder(root / "clip", "clip")
    return root


def run(command: str, folder: Path, monkeypatch) -> None:
    words = shlex.split(command)
    program, kind, *arguments = [word for word in words if not word.startswith("NPROC=")]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{PROGRAMS[program]}.py", *arguments])
    importlib.import_module(f"examples.{kind}.{PROGRAMS[program]}").main()


@pytest.mark.parametrize("command", commands("data"))
def test_preprocessing(command, folder, monkeypatch):
    """Several processes are test_preprocess.py's and the next test's."""
    run(command, folder, monkeypatch)
    out = folder / re.search(r"--out (\S+)", command)[1]
    assert (out / "index.json").is_file()
    shutil.rmtree(out)


@pytest.mark.slow
def test_preprocessing_under_torchrun(folder):
    command = next(command for command in commands("data") if command.startswith("NPROC=2"))
    arguments = shlex.split(command)[3:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ROOT / "examples/image/preprocess.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), *arguments, "--shard_size", "2", "--device", "cpu"],
        cwd=folder, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wrote latents/two: 4 samples" in done.stdout
    assert len(list((folder / "latents/two").glob("latents-*.safetensors"))) == 2


@pytest.mark.parametrize("command", [command for command in commands("evaluate") if "inception" not in command])
def test_scoring(command, folder, monkeypatch):
    run(command, folder, monkeypatch)  # in their order: one writes the statistics that the next one reads
    if "--generated" in command:
        assert (folder / "scores.json").is_file()
        (folder / "scores.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands("evaluate") if "inception" in command])
def test_scoring_with_inception(command, folder, monkeypatch):
    from examples.evaluate.inception import Inception

    torch.manual_seed(0)
    state = {k: v for k, v in Inception().state_dict().items() if not k.endswith(("bn.weight", "tracked"))}
    save_file(state, folder / "inception.safetensors")
    run(command, folder, monkeypatch)
    assert '"fid"' in (folder / "scores.json").read_text()


SMALL = ["--depth", "1", "--hidden_size", "32", "--num_heads", "2", "--steps", "1", "--batch_size", "2"]
SMALL += ["--sample_steps", "1", "--ckpt_every", "0"]


@pytest.mark.slow
def test_from_a_folder_to_samples(folder, monkeypatch, tmp_path):
    """The commands for images, in their order, with models and networks that are tiny; torchrun's in one process."""
    for name in ("captioned", "vae", "t5"):
        (tmp_path / name).symlink_to(folder / name)
    image_folder(tmp_path / "photos", per_class=2, classes=("bird", "cat", "dog"))
    monkeypatch.chdir(tmp_path)
    local = {"stabilityai/sd-vae-ft-ema": "vae", "google/flan-t5-base": "t5"}
    programs = {"./preprocess.sh": "preprocess", "./train_img.sh": "train", "./sample_img.sh": "sample"}
    ran = []
    for command in commands(""):
        program, *words = (local.get(word, word) for word in shlex.split(command))
        if program == "torchrun" and "examples/image/train.py" in words:
            program, words = "./train_img.sh", words[words.index("examples/image/train.py") + 1 :]
            at = words.index("--plugin")
            del words[at : at + 2]
        if program not in programs or "video" in words:
            continue
        if program == "./preprocess.sh":
            words = words[1:]
        if program == "./train_img.sh":
            words += SMALL
        if program == "./sample_img.sh":
            words += ["--steps", "1", "--per_class", "1"]
        script = programs[program]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, "--device", "cpu"])
        importlib.import_module(f"examples.image.{script}").main()
        ran.append(script)
    assert ran == ["sample", "preprocess", "train", "sample", "sample", "train", "sample", "train"]
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3
    assert '"pixels": false' in (tmp_path / "outputs/latents-flow/config.json").read_text()
