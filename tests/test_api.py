from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

import opendit
from opendit.patch import registry
from opendit.patch.core import Patched
from opendit.patch.registry import Family, Trait
from tests.comparing import build, run, twin, worst
from tests.tiny_models import TINY, UserDiT, randomise

DIT = TINY[0]


def text_of(model, *args):
    text = io.StringIO()
    opendit.explain(model, *args, file=text)
    return text.getvalue()


def test_returns_the_model_itself():
    model = build(DIT)
    assert opendit.accelerate(model) is model


def test_explain_names_every_change_and_every_module_left(capsys):
    model = opendit.accelerate(randomise(UserDiT(depth=3)))
    plan = opendit.explain(model)
    printed = capsys.readouterr().out
    for line in (
        "UserDiT: family dit, accelerated",
        "blocks.{0-2} (3): LayerNorm+modulate",
        "blocks.{0-2}.attn (3): q, k, v go to",
        "final_layer: LayerNorm+modulate",
        "t_embedder: casts its sinusoid",
        "blocks.{0-2}.mlp (3): GELU: one pass",
        "kernel layernorm_modulate: reference (auto:",
        "attention: auto",
        "x_embedder: its own code",
        "y_embedder: its own code",
    ):
        assert line in printed
    assert "blocks.{0-2}.adaLN_modulation" not in printed  # it is a part of what was changed
    assert {edit.fqn for edit in plan.edits} >= {"blocks.0", "blocks.1.attn", "final_layer"}


def test_explain_before_accelerating_changes_nothing():
    model = build(DIT)
    kinds = [type(m) for m in model.modules()]
    text = text_of(model, {"kernels": "reference"})
    assert "not accelerated yet" in text
    assert "would change:" in text
    assert "kernel gate_residual: reference (asked for)" in text
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(ValueError, match="already accelerated"):
        opendit.explain(opendit.accelerate(model), "train")


def test_every_module_is_in_the_plan_or_inside_one_that_is():
    model = UserDiT(gated=True)
    model.blocks[0].extra = nn.Linear(2, 2)
    model.extra = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Identity()})
    plan = opendit.explain(model, {"sequence_parallel": "ring"}, file=io.StringIO())
    named = {row.fqn for row in (*plan.edits, *plan.kept)}
    for fqn, module in model.named_modules():
        above = {fqn.rsplit(".", i)[0] for i in range(fqn.count(".") + 1)}
        parts = [name for name in named if name.startswith(f"{fqn}.")]
        assert not fqn or type(module) is nn.Identity or above & (named - {"blocks"}) or parts, fqn


def test_a_method_of_sequence_parallelism_without_processes_is_said():
    assert "no sequence is spread (sequence_parallel='ring'): sp_size is 1" in text_of(
        build(DIT), {"sequence_parallel": "ring"}
    )
    assert "no sequence is spread" not in text_of(build(DIT))


def test_explain_says_what_auto_attention_took():
    model = opendit.accelerate(build(DIT))
    run(model, DIT)
    assert "so far on cpu, float32, head_dim 12, 0 or more tokens, forward and backward: sdpa (" in text_of(model)


def test_named_parts_of_the_kernels_mapping():
    model = opendit.accelerate(build(DIT), {"kernels": {"layernorm_modulate": "reference"}})
    assert "kernel layernorm_modulate: reference (asked for)" in text_of(model)
    assert "kernel gate_residual: reference (auto:" in text_of(model)


@pytest.mark.parametrize("cls", [nn.Linear(3, 3), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))])
def test_unknown_model(cls):
    with pytest.raises(
        ValueError, match=r"no known family. Known: .*diffusers_dit \(.*; dit \(.*Nearest.*register_family"
    ):
        opendit.accelerate(cls)


def test_unknown_model_names_the_test_that_failed_for_the_nearest():
    model = UserDiT()
    del model.final_layer.norm_final
    with pytest.raises(ValueError, match="Nearest: dit, but it does not hold that final_layer has norm_final"):
        opendit.accelerate(model)


def test_latte_is_not_taken_for_dit():
    model = UserDiT()
    model.temp_embed = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="temp_embed"):
        opendit.accelerate(model)


def test_a_model_inside_another_is_pointed_at():
    outer = nn.Module()
    outer.network = UserDiT()
    with pytest.raises(ValueError, match="Its part 'network' is of family dit: pass that"):
        opendit.accelerate(outer)


def test_a_model_in_which_nothing_fits_is_refused():
    model = UserDiT(gated=True)
    for i, block in enumerate(model.blocks):
        block.extra = nn.Identity()
        block.attn.attn_drop.p = 0.1 * (i + 1)
        block.mlp.act = nn.SiLU()
    model.final_layer.extra = nn.Identity()
    with pytest.raises(ValueError, match=r"nothing in it can be accelerated: blocks.0: its parts are not exactly"):
        opendit.accelerate(model)


@pytest.mark.parametrize("what", [None, "DiT-XL/2", 3, torch.nn.Parameter(torch.zeros(1)), UserDiT])
def test_wrong_types(what):
    with pytest.raises(TypeError, match="model: got"):
        opendit.accelerate(what)


def test_a_scripted_model_is_refused_by_every_verb():
    scripted = torch.jit.script(nn.Linear(2, 2))
    for verb in (opendit.accelerate, opendit.explain):
        with pytest.raises(TypeError, match=r"model: got RecursiveScriptModule; allowed: .* not scripted"):
            verb(scripted)
    with pytest.raises(ValueError, match="is not accelerated"):
        opendit.restore(scripted)


def test_twice_is_refused_also_for_parts_and_copies():
    model = opendit.accelerate(build(DIT))
    for again in (model, twin(model), torch.compile(model)):
        with pytest.raises(ValueError, match=r"already accelerated; call opendit.restore"):
            opendit.accelerate(again)
    opendit.restore(model)
    opendit.accelerate(model)


def test_restore_of_what_was_never_accelerated():
    with pytest.raises(ValueError, match="is not accelerated"):
        opendit.restore(build(DIT))


@pytest.mark.parametrize(
    ("sp_size", "error"),
    [
        (0, ValueError),
        (-2, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        ("2", TypeError),
        (2, ValueError),  # no process group and no torchrun
    ],
)
def test_sp_size(sp_size, error):
    with pytest.raises(error, match="sp_size"):
        opendit.accelerate(build(DIT), sp_size=sp_size)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        ({"kernels": {"layernorm_modulat": "triton"}}, "kernel name 'layernorm_modulat'; allowed: gate_residual"),
        ({"kernels": {"gate_residual": "apex"}}, "gate_residual='apex' can't run here"),
        ({"kernels": {"gate_residual": "cuda"}}, "gate_residual: .*'cuda'.*'auto', 'triton', 'reference'"),
        ({"attention": "flash"}, "attention: got 'flash'; allowed: auto"),
        ({"attention": "flash-attn"}, "attention: 'flash-attn' can't run here.*(pip install|CUDA)"),
        ({"attention": "sdpa-cudnn"}, "attention: 'sdpa-cudnn' can't run here"),
    ],
)
def test_requests_that_cannot_be_met(cfg, says):
    if torch.cuda.is_available() and "sdpa-cudnn" in str(cfg):
        pytest.skip("this machine can")
    model = build(DIT)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=says):
        opendit.accelerate(model, cfg)
    assert [type(m) for m in model.modules()] == kinds


def test_triton_on_cpu_without_the_interpreter_is_refused():
    code = (
        "import opendit; from tests.tiny_models import UserDiT\n"
        "try: opendit.accelerate(UserDiT(), {'kernels': 'triton'})\n"
        "except ValueError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_interpreter())
    assert "='triton' can't run here" in out.stdout, out.stderr


def without_interpreter():
    import os

    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("options", "cfg", "says"),
    [
        (
            {"gated": True},
            {"attention": "sdpa"},
            "attention: got 'sdpa', but nothing in this model would use attention",
        ),
        ({}, {"kernels": {"layernorm": "reference"}}, "but nothing in this model would use layernorm; allowed here:"),
    ],
)
def test_requests_that_nothing_would_use(options, cfg, says):
    with pytest.raises(ValueError, match=says):
        opendit.accelerate(UserDiT(**options), cfg)


def test_copies_of_parts_can_be_restored():
    model = opendit.accelerate(build(DIT))
    part = nn.Sequential(*(twin(block) for block in model.blocks))
    opendit.restore(part)
    assert not any(isinstance(m, Patched) for m in part.modules())


def test_restore_refuses_where_someone_holds_on_to_our_forward():
    model = opendit.accelerate(build(DIT))
    ours = model.blocks[1].forward
    model.blocks[1].forward = lambda *args: ours(*args)
    with pytest.raises(ValueError, match=r"forward of blocks.1 was replaced after accelerate"):
        opendit.restore(model)


@pytest.mark.parametrize("cfg", [{"precision": "bf16"}, "sample"])
def test_a_forward_on_the_instance_would_hide_what_is_asked_of_the_model(cfg):
    model = build(DIT)
    kinds, upstream = [type(m) for m in model.modules()], model.forward
    model.forward = lambda *args: upstream(*args)
    for verb in (opendit.accelerate, opendit.explain):
        with pytest.raises(ValueError, match=r"forward of the model itself was replaced on the instance"):
            verb(model, cfg)
    assert [type(m) for m in model.modules()] == kinds
    opendit.accelerate(model)  # blocks are called all the same


def test_restore_after_a_compiled_block_is_gone():
    model = opendit.accelerate(build(DIT), {"compile": True})
    copied = twin(model)
    assert "no longer compiled (a copy is not)" in text_of(copied)
    del model.blocks[1]
    assert not any(isinstance(m, Patched) for m in opendit.restore(model).modules())


def test_a_trait_that_looks_for_what_is_not_there_does_not_hold():
    family = Family(
        "layered", "has layers", (Trait("layers", lambda m: len(m.layers) > 0),), lambda m, p: None, "layers"
    )
    opendit.register_family(family)
    try:
        assert opendit.explain(build(DIT), file=io.StringIO()).family == "dit"
    finally:
        registry._registered.pop("layered")
    with pytest.raises(ValueError, match="has no traits"):
        opendit.register_family(Family("all", "everything", (), lambda m, p: None, ""))


def test_a_model_that_refuses_new_attributes():
    class Locked(UserDiT):
        def __setattr__(self, name, value):
            assert not self.__dict__.get("locked")
            super().__setattr__(name, value)

    model = randomise(Locked())
    model.__dict__["locked"] = True
    assert opendit.explain(opendit.accelerate(model), file=io.StringIO()).family == "dit"
    assert not any(isinstance(m, Patched) for m in opendit.restore(model).modules())


def test_several_threads_may_accelerate_at_once():
    models = [build(DIT) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(opendit.accelerate, models))
    assert [len(opendit.explain(m, file=io.StringIO()).edits) for m in models] == [8] * 4


class Doubling(Patched):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture
def linear_family():
    def plan(model, planner):
        planner.offer("0", model[0], Doubling, "by hand", lambda dtype: (torch.randn(2, 3, dtype=dtype),))

    family = Family(
        name="pair",
        describes="two linears",
        traits=(Trait("it is a Sequential of two", lambda m: isinstance(m, nn.Sequential) and len(m) == 2),),
        plan=plan,
        blocks="",
    )
    opendit.register_family(family)
    yield family
    registry._registered.pop("pair")


def test_register_family(linear_family):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = model(x)
    opendit.accelerate(model)
    assert isinstance(model[0], Doubling)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="the name 'pair' is taken"):
        opendit.register_family(linear_family)
    with pytest.raises(TypeError, match="family: got str"):
        opendit.register_family("pair")


def test_a_failing_call_leaves_no_trace(monkeypatch):
    from opendit.patch import core

    model = build(DIT)
    kinds = [type(m) for m in model.modules()]
    made = []

    def fails_at_the_third(*args):
        made.append(args)
        if len(made) == 3:
            raise RuntimeError("planted")
        return original(*args)

    original = core.patched_class
    monkeypatch.setattr(core, "patched_class", fails_at_the_third)
    with pytest.raises(RuntimeError, match="planted"):
        opendit.accelerate(model)
    assert [type(m) for m in model.modules()] == kinds
    assert core.plan_of(model) is None


def test_training_goes_the_same_way():
    # In fp64 and with a large eps: Adam turns the rounding noise of gradients that are zero into whole steps.
    model = build(DIT, torch.float64)
    reference = twin(model)
    adam = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    model, optimizer = opendit.accelerate(model, optimizer=adam)
    optimizers = [(model, optimizer), (reference, adam(reference.parameters()))]
    for _ in range(5):
        for m, o in optimizers:
            run(m, DIT)
            o.step()
    error, name = worst(dict(model.state_dict()), dict(reference.state_dict()))
    assert error <= 1e-8, name
