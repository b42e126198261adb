"""The forward in a chosen precision, fp32 masters, and fp16's loss scale."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import opendit
from opendit import loss_scale, stepping
from opendit.patch import precision
from tests.comparing import build, relative_errors, run, twin
from tests.launch import of_every_rank
from tests.stepping_cases import KINDS, MUTANTS, loss_of, made, samples
from tests.tiny_models import TINY, UserDiT, randomise

CASES = "tests.stepping_cases"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("tiny", [t for t in TINY if t.name in ("dit", "latte", "diffusers")], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_is_as_exact_as_the_models_own(tiny, name):
    plain = build(tiny)
    truth = run(twin(plain).double(), tiny)
    theirs = relative_errors(run(twin(plain), tiny, autocast=DTYPES[name]), truth)
    model, _ = opendit.accelerate(twin(plain), {"precision": name}, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    if name == "fp16":
        stepping.stepper_of(model).scale._set(2.0**4)  # gradients of about 1 enter here
    ours = relative_errors(run(model, tiny), truth)
    middle = sorted(theirs.values())[len(theirs) // 2]
    assert ours["output"] <= 1.2 * theirs["output"]
    # Single tensors scatter either way.
    assert sorted(ours.values())[len(ours) // 2] <= 1.2 * middle
    assert max(ours.values()) <= 1.2 * max(theirs.values())


def test_outputs_are_fp32_and_the_callers_autocast_does_not_matter():
    plain = build(TINY[0]).eval()
    inputs = samples(0)
    wanted = plain(*inputs)
    for name in DTYPES:
        model = opendit.accelerate(twin(plain), {"precision": name}).eval()
        out = model(*inputs)
        assert out.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(*inputs), out)
        error = (out - wanted).norm() / wanted.norm()
        assert (error < 1e-5) == (name == "fp32")
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_other_shapes_of_output_are_widened_too():
    tiny = next(t for t in TINY if t.name == "diffusers")
    model = opendit.accelerate(build(tiny), {"precision": "bf16"})
    args, kwargs = tiny.inputs(torch.float32, torch.device("cpu"))
    assert model(*args, **kwargs).sample.dtype == torch.float32
    assert model(*args, **kwargs, return_dict=False)[0].dtype == torch.float32


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masters_that_are_not_fp32_are_refused(name, dtype):
    model = build(TINY[0])
    model.blocks[1].mlp.to(dtype)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=rf"precision: got '{name}', but 4 parameters are not fp32, such as blocks.1.mlp"
    ):
        opendit.accelerate(model, {"precision": name})
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("name", DTYPES)
def test_compiled_copied_pickled_and_restored(name):
    plain = randomise(UserDiT()).eval()
    inputs = samples(0)
    model, optimizer = opendit.accelerate(
        twin(plain), {"precision": name, "kernels": "reference"}, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    model(*inputs).square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    out = model(*inputs).detach()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for scale in (2.0**16, 2.0**10) if name == "fp16" else ():  # read anew by what was compiled
        stepping.stepper_of(model).scale._set(scale)
        optimizer.zero_grad()
        compiled(*inputs).square().mean().backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                assert torch.allclose(p.grad, wanted[n], rtol=1e-3, atol=1e-6), n
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    assert all(torch.equal(c(*inputs), out) for c in copies)
    opendit.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(model(*inputs), plain(*inputs))
    optimizer.zero_grad()
    model(*inputs).square().mean().backward()
    plain(*inputs).square().mean().backward()
    assert all(
        p.grad is None or torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_a_copy_for_training_is_not_scaled(caplog):
    model, _ = made("alone", {"precision": "fp16"})
    other = copy.deepcopy(model)
    loss_of(model, 0).backward()
    with caplog.at_level("WARNING", "opendit"):
        loss_of(other, 0).backward()
    assert "in a backward without loss scaling" in caplog.text
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=0.1, atol=1e-3)
    key = id(model)
    assert key in precision.SCALES
    opendit.restore(model)
    assert key not in precision.SCALES


def test_gradients_that_leave_through_the_inputs_are_true_ones():
    plain = build(TINY[0]).eval()
    model, _ = made("alone", {"precision": "fp16"})
    x, t, y = samples(0)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(found, t, y).square().mean().backward()
    plain(wanted, t, y).square().mean().backward()
    assert ((found.grad - wanted.grad).norm() / wanted.grad.norm()).item() <= 5e-3


def test_the_scale_moves_as_torchs_does(monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    ours = loss_scale.LossScale(nn.Linear(2, 2))
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        overflow = torch.rand((), generator=generator).item() < 0.2
        weight.grad = torch.full((1,), float("inf") if overflow else 1.0)
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.value == theirs.get_scale()
        again = loss_scale.LossScale(nn.Linear(2, 2))
        again.load(ours.state())
        assert again.state() == ours.state()


@pytest.mark.parametrize("kind", [*KINDS, "replicas"])
def test_gradients_are_true_ones_accumulated_and_clipped(kind):
    for ours, theirs in of_every_rank(CASES, 2, f"gradients/{kind}"):
        assert theirs < 0.01
        assert ours <= 1.2 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_overflow_on_one_process_skips_the_step_on_all(kind):
    assert of_every_rank(CASES, 2, f"overflow/{kind}") == [[], []]


@pytest.mark.slow
def test_over_four_processes():
    for ours, theirs in of_every_rank(CASES, 4, "gradients/hybrid", 500.0):
        assert ours <= 1.2 * theirs
    assert of_every_rank(CASES, 4, "overflow/hybrid", 500.0) == [[]] * 4


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "scale" in m])
def test_mutants_are_noticed(mutant):
    for noticed in of_every_rank(CASES, 2, f"mutant/{mutant}"):
        assert noticed


@pytest.mark.parametrize(("config", "what"), [({"precision": "fp16"}, "precision='fp16'"), ({"ema": 0.5}, "ema")])
def test_a_parameter_that_thaws_is_noticed(config, what):
    model = build(TINY[0]).eval()
    model.blocks[0].requires_grad_(False)
    model, optimizer = opendit.accelerate(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    model.blocks[0].requires_grad_(True)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=rf"'blocks.0.*' was frozen when {what} was set up"):
        optimizer.step()
    optimizer.zero_grad()
    opendit.attach(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()


def test_a_parameter_that_is_added_is_noticed():
    """Of fp16 it would be the loss scale times too far; that averages have it is in test_ema."""
    model = build(TINY[0]).eval()
    config = {"precision": "fp16"}
    model, optimizer = opendit.accelerate(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    linear = model.blocks[0].mlp.fc2
    linear.added = torch.nn.Linear(linear.out_features, linear.out_features)
    optimizer.add_param_group({"params": linear.added.parameters()})
    linear.register_forward_hook(lambda linear, args, output: linear.added(output))
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"'blocks.0.mlp.fc2.added.weight' was added after precision='fp16'"):
        optimizer.step()
    optimizer.zero_grad()
    opendit.attach(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"precision": "fp16", "skip_nonfinite": False}, ValueError, "got False with precision='fp16'"),
    ],
)
def test_what_is_not_there_is_said(config, error, says):
    with pytest.raises(error, match=says):
        opendit.BoosterConfig.of(config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_on_a_gpu(name):
    plain = build(TINY[0]).cuda().eval()
    x, t, y = (s.cuda() for s in samples(0))
    model, optimizer = opendit.accelerate(
        twin(plain), {"precision": name, "ema": 0.9}, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
    )
    plain(x, t, y).square().mean().backward()
    model(x, t, y).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is None or (p.grad - q.grad).norm() <= 0.1 * q.grad.norm() + 1e-6
    optimizer.step()
    assert stepping.stepper_of(model).state()["taken"] == 1


def test_verify_compares_in_the_configs_precision():
    report = opendit.verify(randomise(UserDiT()), samples(0), {"precision": "bf16", "ema": 0.9}, quiet=True)
    assert report, report
    assert "gradients, bfloat16" in [row.what for row in report.rows]
