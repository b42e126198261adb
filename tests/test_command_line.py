"""`python -m opendit`: what it prints, what it converts, how mistakes end. `verify` has tests of its own."""

from __future__ import annotations

import pytest
import torch

import opendit
from opendit.__main__ import main
from tests.tiny_models import UserDiT, randomise


def test_info_names_what_can_run_and_why_not(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for word in (
        "torch " + torch.__version__.split("+")[0],
        "layernorm_modulate:",
        "sdpa-math: yes",
        "ulysses",
        "zero2",
    ):
        assert word in said
    if not torch.cuda.is_available():
        assert "flash-attn-4: no; " in said
        assert "no CUDA device" in said
    assert "families: " in said


def model():
    return UserDiT(size=4, dim=16, heads=2, depth=1)


def no_model():
    return 3


def test_convert_there_and_back(tmp_path, capsys):
    weights = randomise(model(), 3)
    averages = randomise(model(), 4)
    opendit.save_weights(tmp_path / "a.pt", weights, ema=averages)
    this = f"{__name__}:model"
    for which, expected in (("model", weights), ("ema", averages)):
        assert (
            main(["convert", f"{tmp_path}/a.pt", f"{tmp_path}/b.safetensors", "--model", this, "--which", which]) == 0
        )
        assert main(["convert", f"{tmp_path}/b.safetensors", f"{tmp_path}/c.pt", "--model", this]) == 0
        found = model()
        opendit.load_weights(tmp_path / "c.pt", found)
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
    assert "values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.pt", "b.safetensors", "--model", f"{__name__}:model"], "nothing.pt"),
        (["nothing.pt", "b.safetensors", "--model", f"{__name__}:no_model"], "allowed: a torch.nn.Module"),
        (["nothing.pt", "b.safetensors", "--model", "no_such_module:f"], "that can be imported"),
        (["nothing.pt", "b.safetensors", "--model", "no_such_module"], "that can be imported"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    assert main(["convert", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
