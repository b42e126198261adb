"""`python -m opendit bench`: figures of what is right, none of what is wrong, one line for mistakes."""

from __future__ import annotations

import json
import math

import pytest
import torch

import opendit
import opendit.patch.adaln
from examples.models import dit as examples
from opendit import bench
from opendit.__main__ import main
from opendit.bench import dit, measuring
from opendit.bench.jobs import evaluate
from tests.tiny_models import UserDiT

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--repeats", "1"]


def arguments(batch: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(batch, 4, 6, 6), "t": torch.rand(batch) * 1000, "y": torch.randint(10, (batch,))}


def for_verify():
    """What verify's target returns: adaLN-Zero's zeros included."""
    model = UserDiT()
    with torch.no_grad():
        model.blocks[0].adaLN_modulation[1].weight.zero_()
    return {"model": model, "batch": tuple(arguments().values())}


def of_numbers():
    return 3


def no_model():
    return {"model": torch.nn.Linear(3, 3), "batch": [torch.randn(2, 3)]}


def test_the_model_is_the_examples():
    """Same names, same numbers, same gradients: what is measured is the DiT that people have."""
    torch.manual_seed(0)
    ours = dit.DiT("DiT-Tiny/2", 8).eval()
    depth, hidden, heads, patch = dit.MODELS["DiT-Tiny/2"]
    theirs = examples.DiT(8, patch, 4, hidden, depth, heads, learn_sigma=False).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3) * 1000, torch.tensor([1, 999, 1000])
    out, expected = ours(x, t, y), theirs(x, t, y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, msg=name)
    published = {name: (size["depth"], size["hidden_size"], size["num_heads"]) for name, size in examples.SIZES.items()}
    assert {name: size for name, size in dit.SIZES.items() if name != "Tiny"} == {
        name: published[name] for name in ("XL", "L", "B", "S")
    }


def test_what_is_right_is_timed(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", *QUICK, "--step", "train", "--variants", "plain", "opendit", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "DiT-Tiny/2, 64 px, batch 4, fp32; CPU" in said
    assert "training step" in said
    assert "sampling step" not in said
    found = json.loads(out.read_text())
    assert [(row["variant"], row["refused"]) for row in found["rows"]] == [("plain", None), ("opendit", None)]
    for row in found["rows"]:
        assert row["per_s"] == pytest.approx(4 / row["ms"] * 1e3)
        assert 0 < row["errors"]["gradients"] < 1e-5
        assert f"{row['ms']:.2f}" in said


def test_sampling_under_autocast_and_in_bf16_weights():
    for job in (
        bench.job_of_name("DiT-Tiny/4", 64, 2, CPU),
        bench.job_of_model("mine", for_verify(), CPU),
    ):
        rows = list(
            bench.measure(job, ("sample",), ("plain", "opendit"), precision="bf16", sample_config={}, repeats=1)
        )
        assert [row.refused for row in rows] == [None, None]
        for row in rows:
            assert 1e-4 < row.errors["output"] < 0.1
            assert row.per_s == pytest.approx(job.drawn / row.ms * 1e3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_recipe_for_sampling_is_judged_by_its_own_precision(precision: str):
    for job in (bench.job_of_name("DiT-Tiny/4", 64, 2, CPU), bench.job_of_model("mine", for_verify(), CPU)):
        rows = list(bench.measure(job, ("sample",), ("plain", "opendit"), precision=precision, repeats=1))
        assert [row.refused for row in rows] == [None, None]


def test_guidance_evaluates_every_sample_twice():
    job = bench.job_of_name("DiT-Tiny/4", 64, 3, CPU)
    assert evaluate(job.model.eval(), job.evaluated).shape == (6, 4, 8, 8)
    assert job.evaluated["y"].tolist()[3:] == [1000] * 3
    assert job.drawn == 3


def test_own_models_are_measured_and_left_alone():
    given = for_verify()
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    rows = list(bench.measure(bench.job_of_model("mine", given, CPU), variants=("plain", "opendit"), precision="fp32",
                              sample_config={}, repeats=1))  # fmt: skip
    assert [(row.step, row.variant, row.refused) for row in rows] == [
        ("train", "plain", None), ("train", "opendit", None), ("sample", "plain", None), ("sample", "opendit", None),
    ]  # fmt: skip
    for name, value in given["model"].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_wrong_kernel_gets_no_speed(monkeypatch, capsys):
    """A gate that is 0.1 % off, after `accelerate`'s own probes."""
    right, accelerate = opendit.patch.adaln.gate_residual, opendit.accelerate

    def then_break(*args, **kwargs):
        monkeypatch.setattr(opendit.patch.adaln, "gate_residual", right)
        accelerated = accelerate(*args, **kwargs)
        wrong = lambda x, y, gate, backend: right(x, y, 1.001 * gate, backend=backend)  # noqa: E731
        monkeypatch.setattr(opendit.patch.adaln, "gate_residual", wrong)
        return accelerated

    monkeypatch.setattr(opendit, "accelerate", then_break)
    assert main(["bench", *QUICK, "--variants", "plain", "opendit", "--step", "train"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  opendit"))
    assert "gradients off by" in line
    assert "no speed is reported" in line


def test_errors_are_those_of_their_kind():
    one, zero = torch.ones(2), torch.zeros(2)
    wanted = {"gradients": {"a": one, "b": one}, "losses": [1.0, 2.0]}
    found = {"gradients": {"a": 1.1 * one, "b": one}, "losses": [1.0, 2.2]}
    errors = measuring.errors_of(found, wanted)
    assert errors["gradients"] == pytest.approx(0.1 / math.sqrt(2))
    assert errors["losses"] == pytest.approx(0.05)
    missing = measuring.errors_of({"gradients": {"a": one}, "losses": [1.0, 2.0]}, wanted)
    assert math.isinf(missing["gradients"])
    assert measuring.errors_of({"output": zero}, {"output": one})["output"] == pytest.approx(1)


def test_who_may_be_timed():
    plain = {"gradients": 1e-2, "losses": 1e-3}
    assert measuring.too_far({"gradients": 1.19e-2, "losses": 1.2e-3}, plain, "bf16") is None
    assert "gradients" in measuring.too_far({"gradients": 1.21e-2, "losses": 0.0}, plain, "bf16")
    assert "losses" in measuring.too_far({"gradients": 0.0, "losses": 2e-3}, plain, "bf16")
    assert "gradients" in measuring.too_far({"gradients": float("nan"), "losses": 0.0}, plain, "bf16")
    assert "plain model did not run" in measuring.too_far(plain, {}, "bf16")
    # What a reordered fp32 sum makes, and what bf16 makes, judged as fp32.
    assert measuring.too_far({"output": 3e-6}, {"output": 1e-7}, "fp32") is None
    assert measuring.too_far({"output": 1e-3}, {"output": 1e-7}, "fp32") is not None


def test_a_variant_that_fails_says_so_and_the_others_go_on(monkeypatch):
    def no_compiler(model, mode=None):
        raise RuntimeError("no working C++ compiler\nand more")

    monkeypatch.setattr(measuring, "_compiled", no_compiler)
    job = bench.job_of_name("DiT-Tiny/8", 64, 2, CPU)
    rows = list(bench.measure(job, ("train",), precision="fp32", repeats=1))
    assert [row.refused for row in rows] == [None, "did not run: RuntimeError: no working C++ compiler", None]
    said = bench.table(job, rows, "fp32")
    assert "no working C++ compiler" in said
    (line,) = (line for line in said.splitlines() if line.startswith("  plain"))
    assert "1.00×" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "DiT-Z/2"], "model: got 'DiT-Z/2'; allowed: DiT-XL/2"),
        (["--image-size", "100"], "image_size: got 100; allowed: a multiple of 8"),
        (["--image-size", "0"], "image_size: got 0; allowed: a multiple of 8"),
        (["--json", "/nowhere/bench.json"], "json: got '/nowhere/bench.json'; allowed: a file in a folder that exists"),
        (["--json", "."], "json: got '.'; allowed: a file"),
        (["--image-size", "8"], "no multiple of DiT-Tiny/2's patch"),
        (["--batch", "0"], "batch: got 0; allowed: 1 or more"),
        (["--repeats", "0"], "repeats: got 0"),
        (["--model", "no_such_module:f"], "that can be imported"),
        (["--model", f"{__name__}:of_numbers"], "returned int; allowed: a mapping"),
        (["--model", f"{__name__}:for_verify", "--batch", "3"], "batch: got 3 for"),
        (["--config", "trian", "--variants", "opendit", "--step", "train"], "Did you mean 'train'?"),
        (["--model", f"{__name__}:no_model", "--variants", "opendit", "--step", "train"], "is of no known family"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert main(["bench", *QUICK, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]


@pytest.mark.slow
def test_all_variants_of_both_steps(tmp_path):
    out = tmp_path / "bench.json"
    assert main(["bench", *QUICK, "--model", "DiT-Tiny/4", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["step"], row["variant"]) for row in rows] == [
        (s, v) for s in measuring.STEPS for v in measuring.VARIANTS
    ]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_on_a_gpu(precision):
    job = bench.job_of_name("DiT-S/2", 256, 8, torch.device("cuda"))
    rows = list(bench.measure(job, precision=precision, repeats=6))
    assert [row.refused for row in rows] == [None] * 6
    assert all(row.memory_gib > 0 for row in rows)
