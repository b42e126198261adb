"""`family="generic"`: any model keeps its code; what is recognised in it is edited, the rest is named."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import opendit
from opendit.patch.registry import GENERIC, Family, Trait, register_family
from tests.comparing import Results, build, run, twin, worst
from tests.patch.test_families import first_of_each_family
from tests.tiny_models import Mlp, NewAttention, OldAttention, Tiny, UserDiT, randomise


class Layer(nn.Module):
    """No adaLN: a pre-norm block, with timm's parts and one of its own making."""

    def __init__(self, dim: int, kind: type[nn.Module]):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = kind(dim, 4)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HomemadeAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Stranger(nn.Module):
    def __init__(self, dim: int = 24):
        super().__init__()
        self.embed = nn.Linear(5, dim)
        self.stages = nn.ModuleList([Layer(dim, OldAttention), Layer(dim, NewAttention), Layer(dim, HomemadeAttention)])
        self.head = nn.Linear(dim, 2)

    def forward(self, x):
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def _inputs(dtype: torch.dtype, device: torch.device):
    return (torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).to(device, dtype),), {}


STRANGER = Tiny("stranger", "generic", Stranger, _inputs)


def explained(model: nn.Module, *args, **options) -> str:
    text = io.StringIO()
    opendit.explain(model, *args, file=text, **options)
    return text.getvalue()


def close(actual: Results, expected: Results, tolerance: float) -> None:
    error, name = worst(actual, expected)
    assert error <= tolerance, name


def test_without_the_word_it_is_refused():
    with pytest.raises(ValueError, match=r"no known family.*family='generic'"):
        opendit.accelerate(Stranger())


def test_what_is_recognised_is_edited_and_the_rest_is_named():
    model = build(STRANGER, torch.float64)
    expected, keys = run(model, STRANGER), list(model.state_dict())
    fast = opendit.accelerate(twin(model), family="generic")
    close(run(fast, STRANGER), expected, 1e-10)
    assert list(fast.state_dict()) == keys
    changed = {edit.fqn for edit in opendit.explain(fast, file=io.StringIO()).edits}
    mlps = {f"stages.{i}.mlp" for i in range(3)}
    assert changed == {"stages.0.mixer", "stages.1.mixer", *mlps}
    said = explained(fast)
    assert "no family describes it, so LayerNorm, modulation, gate and residual run as its own forward has them" in said
    assert "stages.2.mixer: its attention is a tests.patch.test_generic.HomemadeAttention" in said
    assert "a LayerNorm on its own stays torch's" in said


@first_of_each_family
def test_known_models_as_strangers(tiny: Tiny):
    model = build(tiny, torch.float64)
    fast = opendit.accelerate(twin(model), family="generic")
    plan = opendit.explain(fast, file=io.StringIO())
    assert plan.family == "generic"
    blocks = [fqn for fqn in (edit.fqn for edit in plan.edits) if fqn.count(".") == 1]
    assert not blocks, "a block was fused"
    assert plan.edits
    close(run(fast, tiny), run(model, tiny), 1e-10)


def test_nothing_recognised_still_works():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(5, 5) for _ in range(5)))

        def forward(self, x):
            return self.layers(x)

    model = Nothing()
    x = torch.randn(3, 5)
    expected = model(x)
    fast, _ = opendit.accelerate(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), family="generic")
    assert torch.equal(fast(x), expected)
    assert "changed:\n  nothing" in explained(fast)
    with pytest.raises(ValueError, match="already accelerated"):
        opendit.accelerate(fast, family="generic")
    opendit.restore(fast)
    assert "would change:\n  nothing" in explained(fast, family="generic")


def test_copies_pickles_and_restore():
    model = build(STRANGER)
    expected, types = run(model, STRANGER), [type(m) for m in model.modules()]
    fast = opendit.accelerate(model, family="generic")
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert [type(m) for m in other.modules()] == [type(m) for m in fast.modules()]
        close(run(other, STRANGER), expected, 1e-5)
    opendit.restore(fast)
    assert [type(m) for m in fast.modules()] == types


def test_compile_takes_the_blocks_it_finds(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = opendit.accelerate(Stranger(), {"compile": True}, family="generic")
    assert compiled == list(model.stages)
    with pytest.raises(ValueError, match=r"compile: got True, but this model has no list of blocks"):
        opendit.accelerate(nn.Linear(2, 2), {"compile": True}, family="generic")


def test_lists_of_lists_are_no_blocks(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    pairs = [nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2)]
    model = opendit.accelerate(nn.ModuleList(pairs), {"compile": True}, family="generic")
    assert compiled == [linear for both in model for linear in both]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"activation_checkpointing": "full"}, "activation_checkpointing"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"residual": "bf16"}, "residual"),
        ({"fusion": "block"}, "fusion"),
        ({"kernels": {"layernorm_modulate": "reference"}}, "kernels"),
    ],
)
def test_what_only_fused_blocks_can_do_is_refused(asked, field):
    model = Stranger()
    with pytest.raises(ValueError, match=f"^{field}: got"):
        opendit.accelerate(model, asked, family="generic")
    assert type(model.stages[0].mlp) is Mlp


def test_an_attention_backend_needs_attention():
    with pytest.raises(ValueError, match="nothing in this model would use attention; allowed here: none"):
        opendit.accelerate(nn.Sequential(nn.Linear(2, 2)), {"attention": "sdpa"}, family="generic")
    fast = opendit.accelerate(build(STRANGER), {"attention": "sdpa"}, family="generic")
    assert "attention: sdpa (asked for)" in explained(fast)


def test_a_recipes_unused_parts_are_said():
    assert "no CUDA graphs and no selective checkpointing: no block is one function" in explained(
        opendit.accelerate(Stranger(), "train", family="generic")
    )


def test_it_has_no_sequence_parallelism():
    from opendit.patch.planner import Planner
    from opendit.patch.spreading import plan_spread

    with pytest.raises(NotImplementedError, match="family generic"):
        plan_spread(Planner(), Stranger(), GENERIC)


def test_a_name_insists():
    fast = opendit.accelerate(randomise(UserDiT()), family="dit")
    assert opendit.explain(fast, file=io.StringIO()).family == "dit"
    with pytest.raises(
        ValueError, match=r"family: got 'latte', but of UserDiT it does not hold that it has temp_embed"
    ):
        opendit.accelerate(UserDiT(), family="latte")
    with pytest.raises(ValueError, match=r"family: got 'ditt'; allowed: .*dit.*generic"):
        opendit.accelerate(UserDiT(), family="ditt")
    with pytest.raises(TypeError, match="family: got 3"):
        opendit.accelerate(UserDiT(), family=3)
    with pytest.raises(ValueError, match="family: the model is already accelerated"):
        opendit.explain(fast, family="generic", file=io.StringIO())
    with pytest.raises(ValueError, match="the name 'generic' is taken"):
        register_family(Family("generic", "", (Trait("it is there", lambda m: True),), lambda m, p: None, "blocks"))
