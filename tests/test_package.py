"""The wheel: it builds, it installs where only its dependencies are, and it accelerates a model there."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("opendit-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "opendit/py.typed" in names
    assert "opendit/kernels/layernorm_modulate.py" in names
    assert "opendit/patch/families/dit.py" in names
    assert "opendit/bench/dit.py" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} - {"opendit"} == {
        name.split("/")[0] for name in names if ".dist-info" in name
    }


def test_wheel_accelerates_a_model_in_a_clean_environment(wheel, tmp_path):
    # torch itself is lent to the new environment, package by package, instead of being downloaded again.
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    lend = "import opendit, sys; print(opendit.__file__)"
    without_torch = subprocess.run([python, "-c", lend], capture_output=True, text=True)
    assert "No module named" in without_torch.stderr, "the environment is not clean"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    lend_torch(site)
    code = (
        "import torch, opendit, tiny_models\n"
        "assert 'env' in opendit.__file__, opendit.__file__\n"
        "model = tiny_models.UserDiT()\n"
        "model, optimizer = opendit.accelerate(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))\n"
        "x, t, y = torch.randn(2, 4, 6, 6), torch.tensor([1, 2]), torch.tensor([0, 1])\n"
        "model(x, t, y).square().mean().backward(); optimizer.step()\n"
        "print(opendit.explain(model).family)"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", env={"PATH": "", "HOME": "/"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("dit")
    measure = ["-m", "opendit", "bench", "--step", "train", "--variants", "plain", "opendit", "--repeats", "1"]
    done = subprocess.run(
        [python, *measure, "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HOME": "/"},
    )
    assert done.returncode == 0, done.stderr
    assert "training step" in done.stdout


def lend_torch(site: Path) -> None:
    """Links torch and what torch needs to run into `site`; nothing else becomes importable."""
    import importlib.metadata as metadata

    pending, linked = ["torch"], set()
    while pending:
        name = pending.pop()
        distribution = metadata.distribution(name)
        if distribution.name in linked:
            continue
        linked.add(distribution.name)
        for file in distribution.files or ():
            top = file.parts[0]
            source = Path(str(distribution.locate_file(top)))
            target = site / top
            if top not in ("..", "__pycache__") and source.exists() and not target.exists():
                target.symlink_to(source)
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                needed = requirement.split(";")[0].split("[")[0].split(" ")[0].split(">")[0].split("<")[0]
                needed = needed.split("=")[0].split("!")[0].split("~")[0].strip("()")
                try:
                    metadata.distribution(needed)
                except metadata.PackageNotFoundError:
                    continue
                pending.append(needed)
