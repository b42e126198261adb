"""Blocks fused as a whole inside models: same results, and every reason to compute them in parts instead."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendit
from opendit.patch import adaln
from opendit.patch import block as block_file
from tests.comparing import Results, build, relative_errors, run, twin, worst
from tests.patch.plain_kernels import use_plain_kernels
from tests.patch.test_families import strip_hooks, strip_prefix, total
from tests.tiny_models import TINY, Tiny, UserDiT, randomise

DIT = TINY[0]
DIFFUSERS = next(t for t in TINY if t.name == "diffusers")
WHOLE = {"kernels": "triton", "fusion": "block", "attention": "sdpa-flash"}
IN_PARTS = "fused in parts, not as a whole: "
# What these models have that a whole block does not: norms with weights of their own, normalised q and k.
PARTLY = {"dit-qk-norm": "it normalises q and k", "diffusers-affine": "its norms have weights of their own"}
BF16 = torch.bfloat16
each_model = pytest.mark.parametrize("tiny", [t for t in TINY if t.whole], ids=lambda t: t.name)


@pytest.mark.parametrize("tiny", [t for t in TINY if not t.whole], ids=lambda t: t.name)
def test_others_are_refused(tiny: Tiny):
    with pytest.raises(ValueError, match="fusion: got 'block'; allowed here: 'auto', 'adaln'"):
        fused(tiny.build(), kernels="reference")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `keep` every block computed as a whole was given, in the order they ran."""
    made: list[str] = []
    whole = adaln.adaln_block

    def counting(x, c, groups, static, graphed):
        made.append(static.keep)
        return whole(x, c, groups, static, graphed)

    monkeypatch.setattr(adaln, "adaln_block", counting)
    return made


@pytest.fixture
def plain(interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch for the kernels, where what is tested is what happens around them."""
    use_plain_kernels(monkeypatch, block_file)


def fused(model: nn.Module, **cfg) -> nn.Module:
    return opendit.accelerate(twin(model), {**WHOLE, **cfg})


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def blocks(model: nn.Module) -> nn.ModuleList:
    return getattr(model, "blocks", None) or model.transformer_blocks


def bit_equal(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


KEEPS = {"all": False, "selective": "selective", "full": "full"}


@pytest.mark.parametrize("tiny", [DIT, DIFFUSERS], ids=lambda t: t.name)
def test_fp32_with_interpreted_kernels(tiny: Tiny, calls: list[str], interpreter):
    model = build(tiny)
    error, name = worst(run(fused(model, activation_checkpointing="selective"), tiny), run(model, tiny))
    assert error <= 1e-5, name
    assert calls == ["selective"] * 2


@each_model
def test_fp32(tiny: Tiny, calls: list[str], request: pytest.FixtureRequest):
    # Norms with weights of their own are for the kernels themselves.
    request.getfixturevalue("interpreter" if tiny.name in PARTLY else "plain")
    model = build(tiny)
    expected = run(model, tiny)
    for keep, asked in KEEPS.items() if tiny.name not in PARTLY else [("selective", "selective")]:
        fast = fused(model, activation_checkpointing=asked)
        error, name = worst(run(fast, tiny), expected)
        assert error <= 1e-5, name
        if tiny.name in PARTLY:
            assert IN_PARTS in explained(fast)
            assert PARTLY[tiny.name] in explained(fast)
            assert not calls
        else:
            assert IN_PARTS not in explained(fast)
            again = 2 if tiny.name == "fast-dit-patch4" else 1  # that one checkpoints its blocks by itself
            assert calls == [keep] * again * len(blocks(fast))
        calls.clear()


@pytest.mark.parametrize("tiny", [DIT, DIFFUSERS], ids=lambda t: t.name)
def test_attention_without_a_pair_and_evaluation(tiny: Tiny, calls: list[str], plain):
    model = build(tiny)
    fast = fused(model, attention="sdpa-math")
    for train in (True, False):
        error, name = worst(run(fast, tiny, train=train), run(model, tiny, train=train))
        assert error <= 1e-5, name
    assert calls == ["all"] * 2 * len(blocks(fast))


@pytest.mark.parametrize("tiny", [DIT, DIFFUSERS], ids=lambda t: t.name)
def test_bf16_autocast_with_interpreted_kernels(tiny: Tiny, interpreter):
    no_worse_under_autocast(tiny, seeds=1)


@pytest.mark.parametrize("tiny", [t for t in TINY if t.whole and t.name not in PARTLY], ids=lambda t: t.name)
def test_bf16_autocast(tiny: Tiny, plain):
    no_worse_under_autocast(tiny, seeds=3)


def no_worse_under_autocast(tiny: Tiny, seeds: int) -> None:
    theirs, ours = {}, {}
    for seed in range(seeds):
        model = randomise(build(tiny), seed)
        truth = run(twin(model).double(), tiny)
        fast = fused(model, activation_checkpointing="selective")
        for errors, candidate in ((theirs, model), (ours, fast)):
            found = relative_errors(run(candidate, tiny, autocast=BF16), truth)
            errors.update({f"{seed} {name}": error for name, error in found.items()})
    assert total(ours) <= 1.2 * total(theirs)


@pytest.mark.parametrize("tiny", [DIT, DIFFUSERS], ids=lambda t: t.name)
def test_bf16_weights(tiny: Tiny, calls: list[str], plain):
    model = build(tiny)
    truth = run(twin(model).double(), tiny)
    theirs = relative_errors(run(twin(model).bfloat16(), tiny), truth)
    ours = relative_errors(run(fused(twin(model).bfloat16()), tiny), truth)
    assert total(ours) <= 1.2 * total(theirs)
    assert calls


def test_auto_is_parts_on_cpu(calls: list[str], plain):
    model = build(DIT)
    for fusion in ("auto", "adaln"):
        fast = fused(model, fusion=fusion)
        assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5
        assert IN_PARTS not in explained(fast)
    assert not calls


# -- the residual's dtype ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [{"kernels": "reference"}, WHOLE], ids=["in parts", "whole"])
@pytest.mark.parametrize("tiny", [DIT, DIFFUSERS], ids=lambda t: t.name)
def test_residual_under_autocast(tiny: Tiny, cfg: dict, plain):
    model = build(tiny)
    truth = run(twin(model).double(), tiny)
    theirs = total(relative_errors(run(model, tiny, autocast=BF16), truth))
    errors = {}
    own = BF16 if tiny is DIFFUSERS else torch.float32  # diffusers rounds where it adds the positions
    for residual, dtype in (("inherit", own), ("fp32", torch.float32), ("bf16", BF16)):
        fast = opendit.accelerate(twin(model), {**cfg, "residual": residual})
        seen: list[torch.dtype] = []
        for block in blocks(fast):
            block.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.dtype))
        errors[residual] = total(relative_errors(run(fast, tiny, autocast=BF16), truth))
        assert seen == [dtype] * len(blocks(fast))
        seen.clear()
        run(fast, tiny)
        assert seen == [torch.float32] * len(blocks(fast)), "without autocast the model's own dtype stays"
    if own is not BF16:  # where it is, whole blocks round it in their middle too, unless they are asked for bf16
        assert errors["inherit"] == errors["fp32"]
    assert max(errors.values()) <= 1.2 * theirs


# -- what stands around a block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "autocast"), [(False, None), ("selective", BF16), ("full", BF16)], ids=str)
def test_compiled(keep, autocast: torch.dtype | None, plain):
    torch.compiler.reset()
    fast = fused(build(DIT), activation_checkpointing=keep)
    expected = run(fast, DIT, autocast=autocast)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    found = strip_prefix(run(compiled, DIT, autocast=autocast))
    if autocast is None:
        error, name = worst(found, expected)
        assert error <= 1e-5, name
    else:  # outside the blocks a compiler may round elsewhere
        truth = run(opendit.restore(twin(fast)).double(), DIT)
        assert total(relative_errors(found, truth)) <= 1.2 * total(relative_errors(expected, truth))


def test_compiled_diffusers(plain):
    torch.compiler.reset()
    fast = fused(build(DIFFUSERS))
    expected = run(fast, DIFFUSERS)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    error, name = worst(strip_prefix(run(compiled, DIFFUSERS)), expected)
    assert error <= 1e-5, name


def test_compiled_without_a_pair_goes_in_parts(calls: list[str], plain):
    torch.compiler.reset()
    fast = fused(build(DIT), attention="sdpa-math")
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    found = strip_prefix(run(compiled, DIT))
    assert not calls
    assert worst(found, run(opendit.restore(fast), DIT))[0] <= 1e-5


def test_compile_field(plain, monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: original(self, backend="aot_eager"))
    model = build(DIT)
    assert worst(run(fused(model, compile=True), DIT), run(model, DIT))[0] <= 1e-5


def test_restore_is_exact(plain):
    model = build(DIT)
    before = run(model, DIT)
    attributes = [set(m.__dict__) for m in model.modules()]
    opendit.accelerate(model, {**WHOLE, "activation_checkpointing": "selective", "residual": "bf16"})
    run(model, DIT, autocast=BF16)
    opendit.restore(model)
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert bit_equal(run(model, DIT), before)


def test_copies(tmp_path, calls: list[str], plain):
    model = opendit.accelerate(strip_hooks(build(DIT)), {**WHOLE, "activation_checkpointing": "full"})
    expected = run(model, DIT)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        calls.clear()
        assert bit_equal(run(other, DIT), expected)
        assert calls == ["full"] * 2


def test_gradient_accumulation(plain):
    model = build(DIT)
    fast = fused(model, activation_checkpointing="selective")
    (x, t, y), _ = DIT.inputs(torch.float32, torch.device("cpu"))
    for m in (model, fast):
        m.eval()
        for scale in (1.0, -0.3):
            m(x, t, y).square().mul(scale).sum().backward()
    for (name, expected), found in zip(model.named_parameters(), fast.parameters(), strict=True):
        if expected.grad is not None:
            assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name


FROZEN = {
    "qkv of one block": lambda name: name.startswith("blocks.0.attn.qkv"),
    "all but biases": lambda name: not name.endswith("bias"),
    "all but one weight": lambda name: name != "blocks.0.mlp.fc1.weight",
    "all blocks": lambda name: "blocks" in name,
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters(frozen: Callable[[str], bool], calls: list[str], plain):
    model = build(DIT)
    fast = fused(model, activation_checkpointing="selective")
    (x, t, y), _ = DIT.inputs(torch.float32, torch.device("cpu"))
    for m in (model, fast):
        m.eval()
        for name, p in m.named_parameters():
            p.requires_grad_(p.requires_grad and not frozen(name))
        m(x, t, y).square().sum().backward()
    for (name, expected), found in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name
    assert calls == ["selective"] * 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS.keys())
def test_checkpointed_from_outside(reentrant: bool, keep, plain):
    fast = fused(build(DIT), activation_checkpointing=keep)
    expected = run(fast, DIT)
    for block in blocks(fast):
        inner = block.forward
        block.forward = lambda x, c, inner=inner: checkpoint(inner, x, c, use_reentrant=reentrant)
    assert bit_equal(run(fast, DIT), expected)


def test_without_gradients(calls: list[str], plain):
    model = build(DIT).eval()
    fast = fused(model, activation_checkpointing="full")
    args, _ = DIT.inputs(torch.float32, torch.device("cpu"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(fast(*args), model(*args), rtol=1e-5, atol=1e-5)
    assert len(calls) == 4
    assert IN_PARTS not in explained(fast)


# -- in parts after all ------------------------------------------------------------------------------------------------


class Recorder:
    """A hook of any kind, which counts and changes nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: object) -> None:
        self.count += 1


HOOKED = {
    "attn": "attention: a hook or another forward was put on it",
    "attn.qkv": "attention: its linears are not torch's own, or something was put on them",
    "attn.proj": "attention: its linears are not torch's own, or something was put on them",
    "attn.proj_drop": "attention: dropout active or a hook inside",
    "mlp": "MLP: a hook or another forward was put on it",
    "mlp.fc1": "MLP: its linears are not torch's own, or something was put on them",
    "mlp.act": "MLP: dropout, a norm or a hook inside",
    "adaLN_modulation": "its modulation is not SiLU and torch's own Linear",
    "adaLN_modulation.0": "its modulation is not SiLU and torch's own Linear",
    "adaLN_modulation.1": "its modulation is not SiLU and torch's own Linear",
}
KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_registered_later_are_called(path: str, calls: list[str], plain):
    model = build(DIT)
    expected = run(model, DIT)
    fast = fused(model)
    for kind in KINDS if path in ("attn", "mlp.fc1", "adaLN_modulation") else ["forward"]:
        hook = Recorder()
        handle = getattr(fast.blocks[0].get_submodule(path), f"register_{kind}_hook")(hook)
        assert worst(run(fast, DIT), expected)[0] <= 1e-5
        assert hook.count == 1, kind
        assert len(calls) == 1, "the other block is computed as a whole"
        calls.clear()
        handle.remove()
    text = explained(fast)
    assert "while running, since then:" in text
    assert f"  blocks.0: {IN_PARTS}{HOOKED[path]}" in text
    assert f"blocks.1: {IN_PARTS}" not in text
    assert worst(run(fast, DIT), expected)[0] <= 1e-5
    assert len(calls) == 2, "without its hook it is whole again"


def test_a_hook_that_changes_something_does(plain):
    model = build(DIT)
    fast = fused(model)
    for m in (model, fast):
        m.blocks[0].mlp.fc1.register_forward_hook(lambda m, args, out: out * 1.5)
        m.blocks[1].attn.register_forward_hook(lambda m, args, out: out + 1)
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5


@pytest.mark.parametrize("where", ["attn.proj_drop", "mlp.drop1"])
def test_dropout_switched_on_later(where: str, calls: list[str], plain):
    model = build(DIT)
    fast = fused(model)
    for m in (model, fast):
        m.blocks[0].get_submodule(where).p = 0.4
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5
    assert f"blocks.0: {IN_PARTS}" in explained(fast)
    assert "dropout" in explained(fast)
    assert len(calls) == 1
    calls.clear()
    assert worst(run(fast, DIT, train=False), run(model, DIT, train=False))[0] <= 1e-5
    assert len(calls) == 2, "in evaluation it does nothing"


class LowRank(nn.Linear):
    """A Linear and a product of two thin ones, as adapters add it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(3, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 3) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("attn.qkv", "attention: its linears are not torch's own"),
        ("mlp.fc2", "MLP: its linears are not torch's own"),
        ("adaLN_modulation.1", "its modulation is not SiLU and torch's own Linear"),
    ],
)
def test_adapters_put_in_later(path: str, reason: str, calls: list[str], plain):
    model = build(DIT)
    fast = fused(model)
    for m in (model, fast):
        torch.manual_seed(3)
        parent, _, name = path.rpartition(".")
        base = m.blocks[1].get_submodule(path)
        setattr(m.blocks[1].get_submodule(parent), name, LowRank(base))
    error, name = worst(run(fast, DIT), run(model, DIT))
    assert error <= 1e-5, name
    assert f"blocks.1: {IN_PARTS}{reason}" in explained(fast)
    assert len(calls) == 1


def test_parametrised_weight(calls: list[str], plain):
    model = build(DIT)
    fast = fused(model)
    for m in (model, fast):
        nn.utils.parametrizations.weight_norm(m.blocks[0].mlp.fc1)
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5
    assert len(calls) == 1


def test_another_forward_put_on_later(calls: list[str], plain):
    model = build(DIT)
    fast = fused(model)
    for m in (model, fast):
        inner = m.blocks[0].attn.forward
        m.blocks[0].attn.forward = lambda x, inner=inner: 2 * inner(x)
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5
    assert len(calls) == 1


def test_reference_kernels_asked_for(calls: list[str], plain):
    model = build(DIT)
    fast = fused(model, kernels={"gelu": "reference"})
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5
    assert f"blocks.{{0-1}} (2): {IN_PARTS}its kernels are not all triton's" in explained(fast)
    assert not calls


def test_float64_goes_in_parts(calls: list[str]):
    model = build(DIT, torch.float64)
    fast = opendit.accelerate(twin(model), {"fusion": "block", "attention": "sdpa-math"})
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-10
    assert not calls


# -- checkpointing of blocks in parts ----------------------------------------------------------------------------------


def saved_elements(model: nn.Module, tiny: Tiny) -> int:
    """How many distinct elements a forward keeps, besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    args, kwargs = tiny.inputs(torch.float32, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tiny.output(model.eval()(*args, **kwargs)).sum()
    return sum(kept.values())


@pytest.mark.parametrize("tiny", [DIT, DIFFUSERS], ids=lambda t: t.name)
def test_full_checkpointing_in_parts(tiny: Tiny):
    model = build(tiny)
    plain = opendit.accelerate(twin(model), {"kernels": "reference"})
    expected = run(plain, tiny)
    kept = saved_elements(plain, tiny)
    for asked in ("full", True):
        fast = opendit.accelerate(twin(model), {"kernels": "reference", "activation_checkpointing": asked})
        assert bit_equal(run(fast, tiny), expected)
        assert bit_equal(run(fast, tiny, autocast=BF16), run(plain, tiny, autocast=BF16))
        assert saved_elements(fast, tiny) < 0.4 * kept
    same = opendit.accelerate(twin(model), {"kernels": "reference", "activation_checkpointing": "selective"})
    assert bit_equal(run(same, tiny), expected)
    assert saved_elements(same, tiny) == kept


def test_full_checkpointing_in_parts_draws_dropout_once():
    model = build(DIT)
    for block in model.blocks:
        block.attn.proj_drop.p = block.mlp.drop2.p = 0.3
    fast = opendit.accelerate(twin(model), {"kernels": "reference", "activation_checkpointing": "full"})
    assert worst(run(fast, DIT), run(model, DIT))[0] <= 1e-5


def test_whole_blocks_keep_less_and_less(plain):
    model = build(DIT)
    kept = [saved_elements(fused(model, activation_checkpointing=asked), DIT) for asked in KEEPS.values()]
    assert kept[0] > kept[1] > kept[2]


def test_a_weight_that_lies_in_columns(interpreter):
    model = build(DIT)
    for block in model.blocks:
        for linear in (block.mlp.fc1, block.mlp.fc2, block.attn.qkv, block.attn.proj, block.adaLN_modulation[1]):
            linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    error, name = worst(run(fused(model), DIT), run(model, DIT))
    assert error <= 1e-5, name


def test_an_empty_batch(plain, calls):
    model = build(DIT)
    whole = fused(model).blocks[0]
    out = whole(torch.randn(0, 5, whole.norm1.normalized_shape[0]), torch.randn(0, whole.norm1.normalized_shape[0]))
    assert out.shape[0] == 0
    assert not calls


def test_what_is_put_into_attention_later_is_honoured(plain, calls):
    model = build(DIT)
    width = model.blocks[0].attn.proj.weight.shape[0]
    torch.manual_seed(0)
    norm = nn.LayerNorm(width)
    accelerated = fused(model)
    for one in (model, accelerated):
        one.blocks[0].attn.norm = copy.deepcopy(norm)
    x, c = torch.randn(2, 5, width), torch.randn(2, width)
    expected = model.blocks[0](x, c)
    assert torch.allclose(accelerated.blocks[0](x, c), expected, atol=1e-5)
    assert not calls
    assert "gates or normalises" in explained(accelerated)


def test_a_scale_changed_later_is_honoured(plain, calls):
    model = randomise(UserDiT(timm="old"))
    width = model.blocks[0].attn.proj.weight.shape[0]
    accelerated = fused(model)
    for one in (model, accelerated):
        one.blocks[0].attn.scale = 0.9
    x, c = torch.randn(2, 5, width), torch.randn(2, width)
    assert torch.allclose(accelerated.blocks[0](x, c), model.blocks[0](x, c), atol=1e-5)
    assert not calls
    assert "its scale is not 1/√K" in explained(accelerated)
    accelerated.blocks[1](x, c)
    assert calls


def test_hooks_on_all_modules_see_the_parts(plain, calls):
    accelerated = fused(build(DIT))
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(accelerated, DIT)
    finally:
        hook.remove()
    assert accelerated.blocks[0].attn.qkv in seen
    assert not calls
    run(accelerated, DIT)
    assert calls


def test_mixed_dtypes_without_autocast_are_left_to_upstream(plain, calls):
    model = build(DIT)
    model.blocks[0].mlp.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        run(fused(model), DIT)


def test_a_bias_on_some_projections_only(plain, calls):
    model = build(DIFFUSERS)
    accelerated = fused(model)
    for one in (model, accelerated):
        for block in one.transformer_blocks:
            block.attn1.to_k.bias = None
    error, name = worst(run(accelerated, DIFFUSERS), run(model, DIFFUSERS))
    assert error <= 1e-5, name
    assert not calls
    assert "not all a bias" in explained(accelerated)


@pytest.mark.parametrize("other", [{"compile": True}, {"fusion": "adaln"}], ids=str)
def test_graphs_that_would_never_run_are_refused(other):
    with pytest.raises(ValueError, match="cuda_graphs: got True with"):
        opendit.BoosterConfig(cuda_graphs=True, **other)
