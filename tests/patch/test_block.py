"""The hand-written backward of a whole block, against the formula in ordinary autograd.

First its algebra alone: in float64, with plain formulas in place of the kernels, so that nothing but a wrong term could
be off. Then with the kernels, in the interpreter. Then broken on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opendit.kernels.attention_backward import attention_backward_reference
from opendit.patch import block as sound
from opendit.patch.block import KEEP, PARAMETERS, Static
from tests.kernels.conftest import poisoned_memory  # noqa: F401  (what a backward forgets to write again shows)
from tests.mutating import Edit, load_mutant
from tests.patch.plain_kernels import use_plain_kernels
from tests.patch.test_families import total

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
BIASES = ("ada_b", "qkv_b", "proj_b", "b1", "b2")


@dataclass(frozen=True)
class Case:
    """A block and its input. `needs`: of x, c and PARAMETERS, what gets a gradient; None: all."""

    B: int = 2
    L: int = 7
    H: int = 2
    K: int = 6
    F: int = 20
    C: int = 10  # width of the condition
    projections: int = 1  # how many tensors q's, k's and v's weight are
    biases: tuple[str, ...] = BIASES
    tanh: bool = True
    eps: tuple[float, float] = (1e-6, 1e-6)
    keep: str = "all"
    attention: str = "sdpa-math"
    needs: tuple[str, ...] | None = None
    dtype: torch.dtype = F64  # of x, c and parameters
    compute: torch.dtype = F64

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return (
            ",".join(f"{k}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items()) or "-"
        )


Named = dict[str, list[Tensor]]


def make(case: Case, device: torch.device | str = "cpu") -> Named:
    """x, c and the parameters, each a list of tensors: leaves, of the order of trained values."""
    D = case.H * case.K
    shapes: dict[str, list[tuple[int, ...]]] = {
        "x": [(case.B, case.L, D)],
        "c": [(case.B, case.C)],
        "ada_w": [(6 * D, case.C)],
        "ada_b": [(6 * D,)],
        "qkv_w": [(3 * D // case.projections, D)] * case.projections,
        "qkv_b": [(3 * D // case.projections,)] * case.projections,
        "proj_w": [(D, D)],
        "proj_b": [(D,)],
        "w1": [(case.F, D)],
        "b1": [(case.F,)],
        "w2": [(D, case.F)],
        "b2": [(D,)],
    }
    leaves: Named = {}
    for name, group in shapes.items():
        absent = name in BIASES and name not in case.biases
        needed = case.needs is None or name in case.needs
        size = [
            shape[1] ** -0.5 if len(shape) == 2 and name != "c" else 0.5 if len(shape) == 1 else 1 for shape in group
        ]
        values = [torch.randn(shape) * s for shape, s in zip(group, size, strict=True)]
        leaves[name] = [] if absent else [v.to(device, case.dtype).requires_grad_(needed) for v in values]
    return leaves


def whole(leaves: Named, name: str) -> Tensor | None:
    return torch.cat(leaves[name]) if leaves[name] else None


def formula(leaves: Named, case: Case) -> Tensor:
    """The block, written apart from the library."""
    (x,), (c,) = leaves["x"], leaves["c"]
    D = x.shape[-1]
    modulation = F.linear(F.silu(c), *leaves["ada_w"], whole(leaves, "ada_b"))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].chunk(6, dim=-1)
    h = F.layer_norm(x, (D,), eps=case.eps[0]) * (1 + scale_a) + shift_a
    qkv = F.linear(h, torch.cat(leaves["qkv_w"]), whole(leaves, "qkv_b"))
    q, k, v = qkv.unflatten(-1, (3, case.H, case.K)).permute(2, 0, 3, 1, 4)
    o = ((q @ k.mT) * case.K**-0.5).softmax(-1) @ v
    x = x + gate_a * F.linear(o.transpose(1, 2).flatten(2), *leaves["proj_w"], whole(leaves, "proj_b"))
    h = F.layer_norm(x, (D,), eps=case.eps[1]) * (1 + scale_m) + shift_m
    g = F.gelu(F.linear(h, *leaves["w1"], whole(leaves, "b1")), approximate="tanh" if case.tanh else "none")
    return x + gate_m * F.linear(g, *leaves["w2"], whole(leaves, "b2"))


def ours(leaves: Named, case: Case, module: ModuleType = sound, wide: bool = False) -> Tensor:
    groups = [leaves[name] for name in PARAMETERS]
    counts = tuple(len(group) for group in groups)
    static = Static(case.H, *case.eps, case.tanh, case.attention, case.keep, case.compute, counts, wide=wide)
    return module.adaln_block(leaves["x"][0], leaves["c"][0], groups, static)


def results(out: Tensor, leaves: Named, dout: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name; each in its leaf's own dtype and shape."""
    flat = {f"{name}.{i}" if i else name: leaf for name, group in leaves.items() for i, leaf in enumerate(group)}
    wanted = {name: leaf for name, leaf in flat.items() if leaf.requires_grad}
    for leaf in flat.values():
        leaf.grad = None
    out.backward(dout.to(out.dtype))
    for name, leaf in flat.items():
        if name in wanted:
            assert leaf.grad is not None, f"d_{name} is missing"
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype), name
        else:
            assert leaf.grad is None, f"d_{name} was not asked for"
    return {
        "out": out.detach(),
        **{f"d_{name}": leaf.grad.clone() for name, leaf in wanted.items() if leaf.grad is not None},
    }


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor], projections: int) -> dict[str, float]:
    """‖a − e‖ / ‖e‖. The bias of k has no gradient but rounding (softmax does not see a constant added to every key),
    so it is measured with those of q and v.
    """
    assert actual.keys() == exact.keys()
    if projections == 3 and "d_qkv_b" in exact:
        actual, exact = dict(actual), dict(exact)
        for side in (actual, exact):
            side["d_qkv_b"] = torch.cat(
                [side.pop(name) for name in ("d_qkv_b", "d_qkv_b.1", "d_qkv_b.2") if name in side]
            )
    found = {}
    for name, e in exact.items():
        assert e.norm() > 0, f"{name} is zero: the comparison would say nothing"
        error = ((actual[name].double() - e).norm() / e.norm()).item()
        found[name] = error if error == error else float("inf")
    return found


def exactly(leaves: Named, case: Case, dout: Tensor) -> dict[str, Tensor]:
    double = {
        name: [t.detach().double().requires_grad_(t.requires_grad) for t in group] for name, group in leaves.items()
    }
    return results(formula(double, case), double, dout.double())


def check(case: Case, tolerance: float, module: ModuleType = sound, device: torch.device | str = "cpu") -> None:
    leaves = make(case, device)
    dout = torch.randn(leaves["x"][0].shape).to(device, case.dtype)
    found = errors(results(ours(leaves, case, module), leaves, dout), exactly(leaves, case, dout), case.projections)
    problems = [f"{name} is off by {error:.1e}" for name, error in found.items() if not error <= tolerance]
    assert not problems, "; ".join(problems)


# -- the algebra, in float64 -------------------------------------------------------------------------------------------


@pytest.fixture
def algebra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes copies of block.py that run in float64: float32 accumulators read as float64, plain kernels."""
    made = []

    def load(edits: Iterable[Edit] = ()) -> ModuleType:
        source = Path(sound.__file__).read_text()
        wider = [
            (old, new, source.count(old))
            for old, new in (("torch.float32", "torch.float64"), (".float()", ".double()"))
        ]
        assert all(count for *_, count in wider)
        made.append(load_mutant(sound, [*edits, *wider], tmp_path, monkeypatch, f"_{len(made)}"))
        module = made[-1]
        use_plain_kernels(monkeypatch, module)
        return module

    return load


each_keep = pytest.mark.parametrize("keep", KEEP)
EVERYTHING = ("x", "c", *PARAMETERS)
WEIGHTS = tuple(name for name in PARAMETERS if name not in BIASES)
CASES = [
    Case(),
    Case(projections=3),
    Case(biases=()),
    Case(biases=(), projections=3),
    *[Case(biases=tuple(b for b in BIASES if b != absent)) for absent in BIASES],
    Case(tanh=False),
    Case(B=1, L=1, H=1),
    Case(B=5, L=13, H=3, K=4, F=48, C=12),
    Case(F=12),
    Case(eps=(0.3, 1e-6)),
    Case(eps=(1e-6, 0.3)),
    Case(attention="sdpa-flash"),
    Case(attention="reference"),
]
NEEDS = [
    *[("x",), ("c",), ("x", "c"), BIASES, WEIGHTS, PARAMETERS, ("x", *BIASES), ("c", *WEIGHTS)],
    *[(name,) for name in PARAMETERS],
    *[tuple(other for other in EVERYTHING if other != name) for name in EVERYTHING],
]


@each_keep
@pytest.mark.parametrize("case", CASES, ids=str)
def test_algebra(case: Case, keep: str, algebra) -> None:
    if (case.L, keep) == (1, "all"):  # q and k get no gradient from one token
        case = replace(case, needs=tuple(n for n in EVERYTHING if n != "qkv_b"))
    check(replace(case, keep=keep), 1e-10, algebra())


@each_keep
def test_only_what_needs_a_gradient_gets_one(keep: str, algebra) -> None:
    module = algebra()
    for needs in NEEDS:
        for projections in (1, 3):
            check(Case(needs=needs, keep=keep, projections=projections), 1e-10, module)


def short(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`module` with the attention backward of short sequences, as after cuDNN's forward on a GPU, in plain torch."""

    def backward(dout: Tensor, qkv: Tensor, *_: Tensor, query_sums: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            _, _, dqkv, sums = attention_backward_reference(dout, qkv)
        return dqkv.contiguous(), sums if query_sums else sums[:0]

    monkeypatch.setattr(module, "_short", lambda attention, qkv: True)
    monkeypatch.setattr(module.short_attention, "attention_backward", backward)
    return module


SHORT = Case(attention="sdpa-flash")


@each_keep
def test_short_attention(keep: str, algebra, monkeypatch: pytest.MonkeyPatch) -> None:
    """The biases of k and v get their gradients without a pass over dk and dv."""
    module = short(algebra(), monkeypatch)
    for case in (
        SHORT,
        replace(SHORT, projections=3),
        *[replace(SHORT, biases=tuple(b for b in BIASES if b != absent)) for absent in ("qkv_b", "proj_b")],
        *[replace(SHORT, needs=needs) for needs in (("qkv_b",), ("proj_b",), WEIGHTS, ("x",))],
    ):
        check(replace(case, keep=keep), 1e-10, module)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(sums, torch.zeros_like(sums), dv_sums)", "(sums, dv_sums, torch.zeros_like(sums))"),
        ("proj_w.float())[0]", "proj_w.t().float())[0]"),
        ("torch.mm(dy_a_sums[None], proj_w.float())[0]", "dy_a_sums + 0 * proj_w.float()[0]"),
    ],
    ids=["k-and-v-swapped", "projection-turned", "projection-left-out"],
)
def test_mutant_of_short_attention_is_caught(old: str, new: str, algebra, monkeypatch: pytest.MonkeyPatch) -> None:
    module = short(algebra([(old, new, 1)]), monkeypatch)
    with pytest.raises(AssertionError, match="d_qkv_b is off"):
        check(SHORT, 1e-10, module)


@each_keep
def test_one_of_three_projections_frozen(keep: str, algebra) -> None:
    case = Case(projections=3, keep=keep)
    leaves = make(case)
    for name in ("qkv_w", "qkv_b"):
        leaves[name][1].requires_grad_(False)
    dout = torch.randn(leaves["x"][0].shape, dtype=F64)
    found = errors(results(ours(leaves, case, algebra()), leaves, dout), exactly(leaves, case, dout), 3)
    assert max(found.values()) <= 1e-10


@each_keep
def test_parameters_in_another_dtype(keep: str, algebra) -> None:
    """Gradients come back in the parameters' dtype: rounded to it once, whatever was computed in."""
    module = algebra()
    for projections in (1, 3):
        case = Case(keep=keep, projections=projections)
        leaves = make(case)
        for name in PARAMETERS:
            leaves[name] = [p.detach().float().requires_grad_() for p in leaves[name]]
        dout = torch.randn(leaves["x"][0].shape, dtype=F64)
        found = errors(results(ours(leaves, case, module), leaves, dout), exactly(leaves, case, dout), projections)
        assert max(found[name] for name in ("out", "d_x", "d_c")) <= 1e-10
        assert max(found.values()) <= 1e-7


@each_keep
def test_w2_laid_out_anew(keep: str, algebra, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with many tokens."""
    module = algebra()
    monkeypatch.setattr(module, "_turned", lambda w2, tokens: True)
    check(Case(keep=keep, F=20), 1e-10, module)
    check(Case(keep=keep, F=12, projections=3), 1e-10, module)


def test_a_second_backward_adds_up(algebra) -> None:
    case = Case(projections=3, keep="selective")
    leaves, module = make(case), algebra()
    dout = torch.randn(leaves["x"][0].shape, dtype=F64)
    once = results(ours(leaves, case, module), leaves, dout)
    ours(leaves, case, module).backward(dout)
    assert torch.allclose(leaves["w2"][0].grad, 2 * once["d_w2"], rtol=1e-12)
    out = ours(leaves, case, module)
    first = torch.autograd.grad(out, leaves["w1"], dout, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(out, leaves["w1"], dout))


def test_gradients_without_strides(algebra) -> None:
    case = Case()
    leaves, module = make(case), algebra()
    ones = torch.ones((), dtype=F64).expand(leaves["x"][0].shape)
    found = errors(results(ours(leaves, case, module), leaves, ones), exactly(leaves, case, ones), 1)
    assert max(found.values()) <= 1e-10


def test_first_order_only(algebra) -> None:
    leaves = make(Case())
    (grad,) = torch.autograd.grad(ours(leaves, Case(), algebra()).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("keep", "values"), [("all", 18), ("selective", 12), ("full", 1)])
def test_what_is_kept(keep: str, values: int, algebra) -> None:
    """As many values for each token as documented, of the size of D, where F is 4·D; besides parameters."""
    case = Case(L=64, F=48, keep=keep)
    leaves, module, kept = make(case), algebra(), {}
    mine = {t.untyped_storage().data_ptr() for name in PARAMETERS for t in leaves[name]}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours(leaves, case, module)
    size = case.B * case.L * case.H * case.K
    assert values <= sum(kept.values()) / size < values + 1


# -- broken on purpose -------------------------------------------------------------------------------------------------

SQUARE = Case(F=12, projections=3)  # F = D, so that what lies the wrong way round still fits
CHUNK = "shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = s["
MUTANTS: dict[str, tuple[str, str, int, str, str]] = {
    "residual-path-dropped": ("        dr=dr,", "        dr=None,", 1, "all", "d_x is off"),
    "gates-swapped": (CHUNK, "shift_a, scale_a, gate_m, shift_m, scale_m, gate_a = s[", 1, "all", "d_x is off"),
    "scales-swapped": (CHUNK, "shift_a, scale_m, gate_a, shift_m, scale_a, gate_m = s[", 1, "all", "d_x is off"),
    "shifts-swapped": (CHUNK, "shift_m, scale_a, gate_a, shift_a, scale_m, gate_m = s[", 1, "selective", "d_w1 is off"),
    "shift-for-scale": ("torch.cat((sums_x, ", "torch.cat((sums_x.flip(1), ", 1, "all", "d_ada_w is off"),
    "shift-for-scale-m": ("sums_a[:, 1:3], ", "sums_a[:, 1:3].flip(1), ", 1, "all", "d_ada_b is off"),
    "gate-gradients-swapped": (
        "sums_a[:, :1], sums_a[:, 1:3], sums_m[:, :1]",
        "sums_m[:, :1], sums_a[:, 1:3], sums_a[:, :1]",
        1,
        "all",
        "d_c",
    ),
    "bias-without-its-gate": (
        "return torch.linalg.vecdot(gate.float(), total, dim=0)",
        "return (total + 0 * gate.float()).sum(0)",
        1,
        "all",
        "d_b2 is off",
    ),
    "bias-with-the-other-gate": ("_through_gate(gate_a", "_through_gate(gate_m", 1, "all", "d_proj_b is off"),
    "bias-of-another-sum": ("sums_a[:, -1]", "sums_a[:, -2]", 1, "all", "d_proj_b is off"),
    "h_m-not-written-again": ('modulated=None if keep == "all" else h_m', "modulated=None", 1, "selective", "d_w1"),
    "h_a-not-written-again": ("out=h_a if again else None", "out=None", 1, "selective", "d_qkv_w"),
    "g-not-written-again": ('None if keep == "all" else g, db1', "None, db1", 1, "selective", "d_w2"),
    "w2-not-turned": (
        "transpose_into(turned, ",
        "(lambda x, out: out.copy_(x.view_as(out)))(turned, ",
        1,
        "all",
        "d_w2 is off",
    ),
    "w1-turned": ("_product(dp.t(), h_m.view(M, D), ", "_product(h_m.view(M, D).t(), dp, ", 1, "all", "d_w1 is off"),
    "proj-turned": ("_product(dy_a.t(), ", "_product(dy_a.t().flip(0), ", 1, "all", "d_proj_w is off"),
    "q-and-k-swapped": (
        "dq.reshape(M, -1), dk.reshape(M, -1)",
        "dk.reshape(M, -1), dq.reshape(M, -1)",
        1,
        "all",
        "d_x",
    ),
    "k-and-v-swapped": (
        "dk.reshape(M, -1), dv.reshape(M, -1)",
        "dv.reshape(M, -1), dk.reshape(M, -1)",
        1,
        "all",
        "d_x",
    ),
    "attention-of-another-output": ("per_head), q, k, v, o.view", "per_head), k, q, v, o.view", 1, "all", "d_x is off"),
    "no-silu-before-ada": ("F.silu(c).to(dtype), to", "c.to(dtype), to", 1, "all", "d_ada_w is off"),
    "no-silu-in-the-gradient-of-c": (
        "torch.ops.aten.silu_backward(",
        "(lambda grad, _: grad)(",
        1,
        "all",
        "d_c is off",
    ),
    "projections-in-another-order": (
        "found += grad.split([shape[0] for shape in group])",
        "found += grad.split([shape[0] for shape in group])[::-1]",
        1,
        "all",
        "d_qkv_w is off",
    ),
    "eps-of-the-other-norm": (
        "scale_a, None, None, static.eps_a",
        "scale_a, None, None, static.eps_m",
        1,
        "all",
        "out is",
    ),
    "exact-gelu-in-the-backward": ('s["p"], static.tanh, dp', 's["p"], not static.tanh, dp', 1, "all", "d_b1 is off"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, algebra) -> None:
    old, new, count, keep, message = MUTANTS[name]
    case = replace(SQUARE, keep=keep, eps=(1e-6, 0.1))
    check(case, 1e-10, algebra())
    module = algebra([(old, new, count)])
    with pytest.raises(AssertionError, match=message):
        check(case, 1e-10, module)


# -- with the kernels --------------------------------------------------------------------------------------------------

INTERPRETED = Case(dtype=F32, compute=F32, attention="sdpa-flash")
WITH_KERNELS = [
    INTERPRETED,
    replace(INTERPRETED, projections=3, tanh=False, L=17, K=8),
    replace(INTERPRETED, biases=(), attention="sdpa-math"),
    replace(INTERPRETED, B=3, L=35, H=1, K=16, F=40, eps=(1e-3, 1e-5)),
]


@pytest.mark.parametrize("case", WITH_KERNELS, ids=str)
def test_fp32(case: Case, interpreter) -> None:
    check(replace(case, keep="selective"), 1e-5)


def test_every_keep_gives_the_same(interpreter) -> None:
    """What is computed again is what was not kept, bit for bit."""
    for compute in (F32, BF16):
        runs = []
        for keep in KEEP:
            torch.manual_seed(1)
            case = replace(INTERPRETED, L=17, compute=compute, keep=keep)
            leaves = make(case)
            runs.append(results(ours(leaves, case), leaves, torch.randn(leaves["x"][0].shape)))
        for other in runs[1:]:
            assert all(torch.equal(other[name], runs[0][name]) for name in runs[0])


@pytest.mark.parametrize(("stream", "low"), [(F32, BF16), (BF16, BF16), (F32, torch.float16)], ids=str)
def test_low_precision_errs_no_more_than_autocast(stream: torch.dtype, low: torch.dtype, interpreter) -> None:
    mine: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(2):
        torch.manual_seed(seed)
        case = replace(
            INTERPRETED, B=3, L=17, K=16, F=96, C=32, compute=low, keep="selective", projections=1 + 2 * seed
        )
        leaves = make(case)
        dout = torch.randn(leaves["x"][0].shape)
        exact = exactly(leaves, case, dout)
        rounded = {**leaves, "x": [leaves["x"][0].detach().to(stream).requires_grad_()]}
        with torch.autocast("cpu", low):
            plain = formula(rounded, case)
        for found, out in ((theirs, plain), (mine, ours(rounded, case))):
            for name, error in errors(results(out, rounded, dout), exact, case.projections).items():
                found[f"{seed} {name}"] = error
    assert total(mine) <= 1.2 * total(theirs)


def test_ambient_autocast_changes_nothing(interpreter) -> None:
    case = replace(INTERPRETED, compute=BF16, keep="full")
    leaves = make(case)
    dout = torch.randn(leaves["x"][0].shape)
    expected = results(ours(leaves, case), leaves, dout)
    with torch.autocast("cpu", BF16):
        found = results(ours(leaves, case), leaves, dout)  # its backward, too, runs inside
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- the operators for torch.compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "needs", "compute"),
    [("all", None, BF16), ("selective", None, F32), ("full", ("c", "w2"), BF16), ("selective", BIASES, BF16)],
    ids=str,
)
def test_compiles_as_one_graph(keep: str, needs: tuple[str, ...] | None, compute: torch.dtype, interpreter) -> None:
    case = replace(INTERPRETED, keep=keep, needs=needs, compute=compute, projections=3)
    leaves = make(case)
    dout = torch.randn(leaves["x"][0].shape)
    expected = results(ours(leaves, case), leaves, dout)
    torch.compiler.reset()
    compiled = torch.compile(lambda leaves: ours(leaves, case), fullgraph=True, backend="aot_eager")
    found = results(compiled(leaves), leaves, dout)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@each_keep
def test_the_middle_of_a_bf16_stream_may_be_fp32(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only x, out and their gradients are bf16 then, and what is rounded less is nearer to the truth."""
    use_plain_kernels(monkeypatch, sound)
    case = Case(B=4, L=17, K=16, F=128, keep=keep, attention="sdpa-flash", dtype=F32, compute=BF16)
    leaves = make(case)
    leaves["x"] = [leaves["x"][0].detach().to(BF16).requires_grad_()]
    dout = torch.randn(leaves["x"][0].shape).to(BF16)
    exact = exactly(leaves, case, dout)
    far = {}
    for wide in (False, True):
        found = results(ours(leaves, case, sound, wide), leaves, dout)
        assert found["out"].dtype == BF16
        far[wide] = errors(found, exact, 1)
        assert max(far[wide].values()) < 2e-2
    assert far[True]["out"] < 0.95 * far[False]["out"]
    assert sum(far[True].values()) < sum(far[False].values())


@each_keep
def test_operators_keep_their_promises(keep: str, interpreter) -> None:
    """Schema, shapes and dtypes of the stand-ins, autograd's registration, and no output that shares memory."""
    case = replace(INTERPRETED, keep=keep, L=3, biases=("b1",), projections=1 if keep == "all" else 3)
    if keep != "full":
        case = replace(case, compute=BF16)
    leaves = make(case)
    flat = [p for name in PARAMETERS for p in leaves[name]]
    static: tuple[Any, ...] = (case.H, *case.eps, case.tanh, case.attention, keep, case.compute)
    counts = [len(leaves[name]) for name in PARAMETERS]
    torch.library.opcheck(
        sound._operator, (leaves["x"][0], leaves["c"][0], flat, *static, counts, False, keep == "selective")
    )


def test_no_gradient_is_asked_for(interpreter) -> None:
    leaves = make(INTERPRETED)
    expected = ours(leaves, INTERPRETED).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = ours(leaves, INTERPRETED)
            assert not out.requires_grad
            assert torch.equal(out, expected)
