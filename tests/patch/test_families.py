"""Every family, generically: the accelerated model computes what the model that came in computes."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import statistics

import pytest
import torch
from torch import nn

import opendit
from opendit.patch.registry import builtin, families
from tests.comparing import build, relative_errors, run, twin, worst
from tests.tiny_models import TINY, Tiny, randomise

each_model = pytest.mark.parametrize(
    "tiny", [pytest.param(t, id=t.name, marks=[pytest.mark.slow] if t.slow else []) for t in TINY]
)
first_of_each_family = pytest.mark.parametrize(
    "tiny", list({t.family: t for t in reversed(TINY)}.values()), ids=lambda t: t.name
)


def _first_but(*slow: str):
    firsts = {t.family: t for t in reversed(TINY)}.values()
    return pytest.mark.parametrize(
        "tiny", [pytest.param(t, id=t.name, marks=[pytest.mark.slow] if t.name in slow else []) for t in firsts]
    )


# Compiling takes long. Of diffusers' models of videos, one that is compiled in two ways is enough for the default run,
# and what SD3's blocks are made of, Flux's are too.
compiled_ones = _first_but("cogvideox", "hunyuan-video", "sd3")
compiled_otherwise = _first_but("cogvideox", "hunyuan-video", "wan", "sd3")


@pytest.fixture
def empty_compiler():
    torch.compiler.reset()


# What wraps the forwards of several of diffusers' models is one function, compiled at most eight times in a process.
from_scratch = pytest.mark.usefixtures("empty_compiler")


def accelerated(model: nn.Module, **cfg) -> nn.Module:
    return opendit.accelerate(twin(model), cfg)


def types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_every_family_has_a_tiny_model():
    assert {t.family for t in TINY} == set(builtin())


@each_model
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_fp64_with_reference_kernels(tiny: Tiny, train: bool):
    model = build(tiny, torch.float64)
    expected = run(model, tiny, train=train)
    actual = run(accelerated(model, kernels="reference", attention="reference"), tiny, train=train)
    error, name = worst(actual, expected)
    assert error <= 1e-10, name


@each_model
def test_fp32_with_interpreted_kernels(tiny: Tiny, interpreter):
    model = build(tiny)
    error, name = worst(run(accelerated(model, kernels="triton"), tiny), run(model, tiny))
    assert error <= 1e-5, name


@each_model
def test_bf16_autocast_is_as_exact_as_the_models_own(tiny: Tiny):
    theirs, ours = {}, {}
    for seed in range(5):  # in one draw, gradients of q and k and of norms on them may scatter by more than the rule
        model = randomise(build(tiny), seed)
        truth = run(twin(model).double(), tiny)
        for errors, candidate in ((theirs, model), (ours, accelerated(model))):
            found = relative_errors(run(candidate, tiny, autocast=torch.bfloat16), truth)
            errors.update({f"{seed} {name}": error for name, error in found.items()})
    assert total(ours) <= 1.2 * total(theirs)


@each_model
def test_bf16_weights(tiny: Tiny):
    theirs, ours = [], []
    for seed in range(3):  # in one draw, the gradients of a nearly uniform softmax may scatter by more than the rule
        model = randomise(build(tiny), seed)
        truth = run(twin(model).double(), tiny)
        for totals, candidate in ((theirs, twin(model).bfloat16()), (ours, accelerated(twin(model).bfloat16()))):
            totals.append(total(relative_errors(run(candidate, tiny), truth)))
    assert statistics.median(ours) <= 1.2 * statistics.median(theirs)


def total(errors: dict[str, float]) -> float:
    """Root mean square over all tensors: single gradients scatter, the whole does not."""
    return (sum(e * e for e in errors.values()) / len(errors)) ** 0.5


SUBLAYERS = ("attn", "attn1", "attn2", "mlp", "ff", "ffn", "ff_context")


@each_model
def test_plan_covers_every_block(tiny: Tiny):
    model = opendit.accelerate(build(tiny))
    plan = opendit.explain(model, file=io.StringIO())
    assert plan.family == tiny.family
    changed = {edit.fqn for edit in plan.edits}
    for name, block in families()[tiny.family].blocks_of(model):
        sublayers = [s for s in SUBLAYERS if getattr(block, s, None) is not None]
        assert len(sublayers) >= (1 if hasattr(block, "proj_mlp") else 2)  # whose linears stand in the block itself
        assert {name, *(f"{name}.{s}" for s in sublayers)} <= changed, f"left as it was: {plan.kept}"


@each_model
def test_planning_reseeds_nothing(tiny: Tiny, monkeypatch):
    # torch.manual_seed reseeds the GPUs as well: after it, every rank would draw the same noise.
    for seeded in ("torch.manual_seed", "torch.cuda.manual_seed_all", "torch.cuda.manual_seed"):
        monkeypatch.setattr(seeded, lambda seed, said=seeded: pytest.fail(f"{said}({seed}) was called"))
    model = tiny.build()
    state = torch.get_rng_state()
    opendit.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)


AMBIENT = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
}


@first_of_each_family
@pytest.mark.parametrize("ambient", AMBIENT)
def test_planning_does_not_depend_on_the_callers_modes(tiny: Tiny, ambient):
    model = build(tiny)
    edits = [(e.fqn, e.mixin) for e in opendit.explain(model, file=io.StringIO()).edits]
    with AMBIENT[ambient]():
        opendit.accelerate(model)
    assert [(e.fqn, e.mixin) for e in opendit.explain(model, file=io.StringIO()).edits] == edits


@each_model
def test_restore_is_exact(tiny: Tiny):
    model = build(tiny)
    before_types, before_keys, before = types(model), list(model.state_dict()), run(model, tiny)
    attributes = [set(m.__dict__) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    opendit.accelerate(model)
    assert types(model) != before_types
    assert list(model.state_dict()) == before_keys
    assert [id(p) for p in model.parameters()] == parameters
    run(model, tiny)
    assert opendit.restore(model) is model
    assert types(model) == before_types
    assert list(model.state_dict()) == before_keys
    assert [id(p) for p in model.parameters()] == parameters
    assert [set(m.__dict__) for m in model.modules()] == attributes
    after = run(model, tiny)
    assert all(torch.equal(after[name], before[name]) for name in before)


@each_model
def test_other_instances_are_untouched(tiny: Tiny):
    model, other = build(tiny), build(tiny)
    before_types, before = types(other), run(other, tiny)
    opendit.accelerate(model)
    assert types(other) == before_types
    after = run(other, tiny)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(isinstance(m, was) for m, was in zip(model.modules(), before_types, strict=True))


@each_model
def test_deepcopy_is_accelerated_and_independent(tiny: Tiny):
    model = opendit.accelerate(build(tiny))
    expected = run(model, tiny)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opendit.restore(model)
    assert types(ema) != types(model)
    assert relative_errors(run(ema, tiny), expected) == dict.fromkeys(expected, 0.0)


@each_model
def test_whole_model_through_torch_save(tiny: Tiny, tmp_path):
    model = opendit.accelerate(strip_hooks(build(tiny)))
    expected = run(model, tiny)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert types(loaded) == types(model)
    assert relative_errors(run(loaded, tiny), expected) == dict.fromkeys(expected, 0.0)
    opendit.restore(loaded)
    assert types(pickle.loads(pickle.dumps(loaded))) == types(loaded)


def strip_hooks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return model


@each_model
def test_state_dict_goes_both_ways(tiny: Tiny):
    source, target = build(tiny), opendit.accelerate(tiny.build())
    target.load_state_dict(source.state_dict())
    with contextlib.suppress(AttributeError):
        target.t_embedder.mlp.register_forward_pre_hook(next(iter(source.t_embedder.mlp._forward_pre_hooks.values())))
    error, name = worst(run(target, tiny), run(source, tiny))
    assert error <= 1e-5, name
    source.load_state_dict(target.state_dict())


@each_model
def test_gradient_checkpointing_of_the_blocks(tiny: Tiny):
    model = build(tiny)
    expected = run(accelerated(model), tiny)
    checkpointed = accelerated(model)
    if hasattr(checkpointed, "enable_gradient_checkpointing"):
        checkpointed.enable_gradient_checkpointing()
    else:
        checkpointed.checkpointing = True
    assert relative_errors(run(checkpointed, tiny), expected) == dict.fromkeys(expected, 0.0)


@compiled_ones
@from_scratch
def test_compile_after(tiny: Tiny):
    model = build(tiny)
    expected = run(model, tiny)
    compiled = torch.compile(accelerated(model), fullgraph=True, backend="aot_eager")
    error, name = worst(strip_prefix(run(compiled, tiny)), expected)
    assert error <= 1e-5, name


@compiled_otherwise
@from_scratch
def test_compile_after_with_interpreted_kernels(tiny: Tiny, interpreter):
    model = build(tiny)
    expected = run(model, tiny)
    compiled = torch.compile(accelerated(model, kernels="triton"), fullgraph=True, backend="aot_eager")
    error, name = worst(strip_prefix(run(compiled, tiny)), expected)
    assert error <= 1e-5, name


@compiled_otherwise
@from_scratch
def test_compile_before(tiny: Tiny):
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(build(tiny), fullgraph=True, backend=counting_backend)
    expected = run(compiled, tiny)
    run(compiled, tiny)
    assert len(graphs) == 1
    assert opendit.accelerate(compiled) is compiled
    error, name = worst(run(compiled, tiny), expected)
    assert error <= 1e-5, name
    assert len(graphs) == 2, "the compiled model still runs the old forward"
    opendit.restore(compiled)
    after = run(compiled, tiny)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def strip_prefix(results):
    return {name.removeprefix("_orig_mod."): value for name, value in results.items()}


@compiled_ones
def test_compile_field_compiles_each_block_and_restore_undoes_it(tiny: Tiny, monkeypatch):
    calls = []
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: (calls.append(self), original(self, backend="aot_eager"))[1])
    model = build(tiny)
    expected = run(model, tiny)
    opendit.accelerate(model, {"compile": True})
    blocks = [block for _, block in families()[tiny.family].blocks_of(model)]
    assert calls == blocks
    error, name = worst(run(model, tiny), expected)
    assert error <= 1e-5, name
    opendit.restore(model)
    assert all("_compiled_call_impl" not in block.__dict__ for block in blocks)
    after = run(model, tiny)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@each_model
def test_fully_replaced_on_meta_then_materialised(tiny: Tiny):
    with torch.device("meta"):
        model = tiny.build()
    opendit.accelerate(model)
    source = build(tiny)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    for name, buffer in source.named_buffers():
        model.get_buffer(name).copy_(buffer)
    error, name = worst(run(model, tiny), run(strip_hooks(source), tiny))
    assert error <= 1e-5, name
