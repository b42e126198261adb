"""`opendit.verify`: certifies what is right, refuses what is not, on four processes and on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import opendit
from opendit.__main__ import main
from opendit.patch.core import plan_of
from tests.fastseq import verifying
from tests.launch import of_every_rank
from tests.tiny_models import Mlp

ROOT = Path(__file__).parent.parent.parent


def found(case: str):
    return of_every_rank("tests.fastseq.verifying", 4, case)


@pytest.mark.parametrize("case", verifying.HONEST)
def test_certifies_what_is_right(case: str):
    for certified, said in found(case):
        assert certified, said


@pytest.mark.parametrize("case", verifying.WRONG)
def test_catches(case: str):
    for certified, said in found(case):
        assert not certified, said


def test_the_ratio_rule_compares_rounding():
    lines = [line for line in found("sp 4, bf16")[0][1].splitlines() if "bfloat16" in line]
    assert [line.split(",")[0] for line in lines] == ["output", "gradients", "any of them"]
    for line, allowed in zip(lines, (1.2, 1.2, 2.0), strict=True):
        error, said = line.split("bfloat16")[1].split()[1:3]
        assert float(said) == allowed
        assert 0.2 < float(error) != 1.0


def test_the_ratio_rule_sees_what_twice_the_error_would_let_pass():
    for _, said in found("residual in bf16"):
        wrong = [line for line in said.splitlines() if "WRONG" in line]
        assert wrong
        assert all(1.2 < float(line.split("bfloat16")[1].split()[1]) < 2 for line in wrong)


def test_a_residual_in_bf16_is_held_against_a_plain_model_that_has_one():
    assert found("bf16 residual")[0][0], found("bf16 residual")[0][1]


def test_says_who_is_wrong():
    assert "blocks." in found("q and k mixed up")[0][1]
    assert "such as" in found("stale ema")[0][1]
    assert all("one process fails" in said for _, said in found("one process fails"))


def test_one_process_and_the_certificate(tmp_path, capsys):
    path = tmp_path / "certificate.json"
    arguments = verifying.arguments()
    before = {name: p.clone() for name, p in arguments["model"].named_parameters()}
    report = opendit.verify(**arguments, booster_cfg="train", certificate=path)
    assert report, str(report)
    assert "certified" in capsys.readouterr().out
    certificate = json.loads(path.read_text())
    assert certificate["certified"] is True
    assert certificate["plan"]["family"] == "dit"
    assert {row["what"] for row in certificate["rows"]} == {"output", "loss", "gradients", "parameters"}
    assert certificate["hashes"]
    assert certificate["versions"]["torch"] == torch.__version__
    assert all(torch.equal(p, before[name]) for name, p in arguments["model"].named_parameters())


def test_the_certificate_is_json_where_errors_are_infinite(tmp_path):
    def loss(model, *args):
        if plan_of(model) is not None:
            raise ValueError("not today")
        return verifying.diffusion_loss(model, *args)

    path = tmp_path / "c.json"
    report = opendit.verify(**verifying.arguments(), quiet=True, loss=loss, certificate=path)
    assert "not today" in str(report)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    certificate = json.loads(path.read_text(), parse_constant=refuse)
    assert not certificate["certified"]
    assert {row["error"] for row in certificate["rows"]} == {"inf"}


def stranger():
    """Of no known family; with a part that is recognised, so that there is something to compare."""
    model = nn.Sequential(nn.Linear(5, 8), Mlp(8, 16))
    return {"model": model, "batch": (torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)),)}


def test_a_model_that_nobody_describes(tmp_path, capsys):
    with pytest.raises(ValueError, match="no known family"):
        opendit.verify(**stranger())
    path = tmp_path / "c.json"
    command = ["verify", f"{__name__}:stranger", "--family", "generic", "--autocast", "bf16"]
    assert main([*command, "--certificate", str(path)]) == 0
    plan = json.loads(path.read_text())["plan"]
    assert plan["family"] == "generic"
    assert [fqn for fqn, _ in plan["edits"]] == ["1"]


def test_adaln_zero_is_not_compared_as_zero():
    arguments = verifying.arguments()
    model: nn.Module = arguments["model"]
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    report = opendit.verify(**arguments, quiet=True)
    gradients = next(row for row in report.rows if row.what == "gradients")
    assert report
    assert gradients.compared == sum(p.requires_grad for p in model.parameters())


def test_refuses_to_certify_nothing():
    arguments = verifying.arguments()
    report = opendit.verify(**arguments, quiet=True, loss=lambda model, *args: (model(*args) * 0).sum())
    assert not report
    assert "no gradient was compared" in str(report)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"batch": ()}, TypeError),
        ({"batch": (torch.zeros(3, 4, 6, 6), torch.zeros(2), torch.zeros(2))}, ValueError),
        ({"optimizer": 3}, TypeError),
        ({"loss": lambda model, *args: 1.0}, TypeError),
        ({"booster_cfg": {"optimizer": torch.optim.SGD}}, ValueError),
    ],
    ids=["nothing", "sizes", "optimizer", "loss", "config"],
)
def test_bad_arguments(wrong, error):
    with pytest.raises(error, match=next(iter(wrong))):
        opendit.verify(**{**verifying.arguments(), "quiet": True, **wrong})


def test_command_line_under_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "opendit", "verify", "tests.fastseq.verifying:arguments", "--sp-size=2"]
    config = ["--config", '{"sequence_parallel": "fastseq"}', "--certificate", str(tmp_path / "c.json")]
    out = subprocess.run([*command, *config], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("certified") == 1  # one process speaks
    plan = json.loads((tmp_path / "c.json").read_text())["plan"]
    assert (plan["sp_size"], plan["dp_size"], plan["method"]) == (2, 1, "fastseq")


@pytest.mark.parametrize(
    ("target", "status"),
    [("tests.fastseq.verifying:arguments", 0), ("tests.fastseq.verifying:nowhere", 2)],
)
def test_command_line(target: str, status: int, tmp_path):
    command = [sys.executable, "-m", "opendit", "verify", target, "--certificate", str(tmp_path / "c.json")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == status, out.stderr
    assert ("certified" in out.stdout) == (status == 0)
