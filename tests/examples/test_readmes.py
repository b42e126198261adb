"""The commands of examples/data/README.md and examples/evaluate/README.md, run as they stand there on small files."""

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
    return [line for block in blocks for line in block.splitlines() if line.strip()]


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
