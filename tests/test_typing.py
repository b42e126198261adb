"""What a type checker makes of `accelerate`'s overloads, in a user's own file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SNIPPET = """
from functools import partial

import torch
from typing_extensions import assert_type

import opendit


class Model(torch.nn.Module):
    pass


model = Model()
adam = torch.optim.AdamW(model.parameters())

assert_type(opendit.accelerate(model), Model)
assert_type(opendit.accelerate(model, "train"), Model)
assert_type(opendit.accelerate(model, {"kernels": "auto"}, sp_size=1), Model)
assert_type(opendit.accelerate(model, opendit.BoosterConfig(compile=True)), Model)
assert_type(opendit.accelerate(model, optimizer=adam), tuple[Model, torch.optim.AdamW])
sgd = partial(torch.optim.SGD, lr=0.1)
assert_type(opendit.accelerate(model, "train", optimizer=sgd), tuple[Model, torch.optim.SGD])
assert_type(opendit.accelerate(model, opendit.BoosterConfig(optimizer=adam)), tuple[Model, torch.optim.AdamW])
assert_type(opendit.restore(model), Model)
assert_type(opendit.attach(model, adam), torch.optim.AdamW)
step_lr = torch.optim.lr_scheduler.StepLR(adam, 1)
assert_type(opendit.schedule(step_lr), torch.optim.lr_scheduler.StepLR)
assert_type(opendit.ema_state_dict(model, 0.9999), dict[str, torch.Tensor])
opendit.accelerate(model, optimiser=adam)  # type: ignore[call-overload]
"""


def test_overloads(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(SNIPPET)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        f"--cache-dir={tmp_path / 'cache'}",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout
