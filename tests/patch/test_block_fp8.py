"""A block with products in 8 bits: against a block whose products are the same, written in ordinary autograd.

There, a product's operands are rounded by rows as the library's specification rounds them, its input's gradient is a
product of rounded rows too, and its weight's gradient is one of operands that are not rounded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opendit.kernels import fp8
from opendit.patch import block as sound
from opendit.patch.block import KEEP, PARAMETERS, Static
from tests.kernels.conftest import poisoned_memory  # noqa: F401
from tests.mutating import load_mutant
from tests.patch.test_block import BF16, BIASES, F32, Case, Named, errors, formula, make, results, whole

pytest.importorskip("triton")

# Widths are multiples of 16; odd lengths; two samples with modulations of their own; fp32 parameters and residual.
CASE = Case(B=2, L=7, H=2, K=16, F=80, C=16, dtype=F32, compute=F32, keep="selective")
LOW = replace(CASE, compute=BF16)
# A code is a neighbour's now and then, a sixteenth off, where what is rounded differs in its last bit.
NEAR, FAR = 3e-3, 0.1


def rounded(x: Tensor) -> Tensor:
    return fp8.cast(fp8.quantize_rows_reference(x)).to(x.dtype)


class Product8(torch.autograd.Function):
    """x·wᵀ; see above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w).mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        dx = rounded(dy) @ rounded(w.mT.contiguous()).mT
        return dx, dy.flatten(0, -2).mT @ x.flatten(0, -2)


def formula8(leaves: Named, case: Case) -> Tensor:
    (x,), (c,) = leaves["x"], leaves["c"]
    D = x.shape[-1]

    def product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = Product8.apply(h, weight)
        return y if bias is None else y + bias

    modulation = F.linear(F.silu(c), *leaves["ada_w"], whole(leaves, "ada_b"))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].chunk(6, dim=-1)
    h = F.layer_norm(x, (D,), eps=case.eps[0]) * (1 + scale_a) + shift_a
    qkv = product(h, torch.cat(leaves["qkv_w"]), whole(leaves, "qkv_b"))
    q, k, v = qkv.unflatten(-1, (3, case.H, case.K)).permute(2, 0, 3, 1, 4)
    o = ((q @ k.mT) * case.K**-0.5).softmax(-1) @ v
    x = x + gate_a * F.linear(o.transpose(1, 2).flatten(2), *leaves["proj_w"], whole(leaves, "proj_b"))
    h = F.layer_norm(x, (D,), eps=case.eps[1]) * (1 + scale_m) + shift_m
    g = F.gelu(product(h, *leaves["w1"], whole(leaves, "b1")), approximate="tanh" if case.tanh else "none")
    return x + gate_m * product(g, *leaves["w2"], whole(leaves, "b2"))


def ours(leaves: Named, case: Case, module: ModuleType = sound, in_fp8: bool = True) -> Tensor:
    groups = [leaves[name] for name in PARAMETERS]
    counts = tuple(len(group) for group in groups)
    static = Static(case.H, *case.eps, case.tanh, case.attention, case.keep, case.compute, counts, in_fp8)
    return module.adaln_block(leaves["x"][0], leaves["c"][0], groups, static)


def check(case: Case, module: ModuleType = sound) -> dict[str, float]:
    leaves = make(case)
    dout = torch.randn_like(leaves["x"][0]) * torch.logspace(-2, 2, case.B)[:, None, None]
    expected = results(formula8(leaves, case), leaves, dout)
    found = errors(results(ours(leaves, case, module), leaves, dout), expected, case.projections)
    off = {name: error for name, error in found.items() if not error <= NEAR}
    assert not off, f"off by {off}"
    return found


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, projections=3), replace(CASE, biases=(), tanh=False), replace(CASE, B=3, L=1, biases=("b2",))],
    ids=str,
)
def test_is_what_it_says(case: Case, keep: str) -> None:
    check(replace(case, keep=keep))


def test_rounds_as_8_bits_do() -> None:
    """With bf16 besides: further from the exact block than bf16 is, and no further than bf16 and such products are."""
    leaves = make(LOW)
    dout = torch.randn_like(leaves["x"][0])
    exact = results(formula(leaves, LOW), leaves, dout)
    eight = errors(results(ours(leaves, LOW), leaves, dout), exact, 1)
    alone = errors(results(formula8(leaves, LOW), leaves, dout), exact, 1)
    sixteen = errors(results(ours(leaves, LOW, in_fp8=False), leaves, dout), exact, 1)
    assert eight["d_x"] > 2 * sixteen["d_x"]
    assert max(eight.values()) <= FAR
    for name in exact:
        assert eight[name] <= 1.2 * (alone[name] ** 2 + sixteen[name] ** 2) ** 0.5, name


@pytest.mark.parametrize("unwanted", ["x", "c", *PARAMETERS])
def test_a_gradient_nobody_wants(unwanted: str) -> None:
    wanted = tuple(name for name in ("x", "c", *PARAMETERS) if name != unwanted)
    check(replace(CASE, needs=wanted))


def test_weights_changed_before_the_backward_are_an_error() -> None:
    leaves = make(replace(CASE, projections=3))
    out = ours(leaves, replace(CASE, projections=3))
    with torch.no_grad():
        leaves["qkv_w"][1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("keep", KEEP)
def test_under_compile(keep: str) -> None:
    case = replace(CASE, keep=keep, attention="sdpa-flash")
    leaves = make(case)
    dout = torch.randn_like(leaves["x"][0])
    expected = results(ours(leaves, case), leaves, dout)
    torch.compiler.reset()
    compiled = torch.compile(lambda leaves: ours(leaves, case), fullgraph=True, backend="aot_eager")
    found = results(compiled(leaves), leaves, dout)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    flat = [p for name in PARAMETERS for p in leaves[name]]
    static = (case.H, *case.eps, case.tanh, case.attention, keep, case.compute)
    arguments = (leaves["x"][0], leaves["c"][0], flat, *static, [len(leaves[name]) for name in PARAMETERS], True, False)
    torch.library.opcheck(sound._operator, arguments)


MUTANTS = {
    "weights-by-rows-in-the-backward": ("fp8.quantize_columns(w1)", "fp8.quantize_rows(w1.t().contiguous() * 1.1)"),
    "dg-of-another-weight": ("fp8.quantize_columns(w2t)", "fp8.quantize_columns(w1.t().contiguous())"),
    "scales-of-the-other-norm": ("run.norm(x, shift_a, scale_a, None, None, static.eps_a, low, **rows_a)", None),
    "bias-lost": ("product(self.h_m.view(M, D), w1, b1, **rows_m)", "product(self.h_m.view(M, D), w1, None, **rows_m)"),
    "scales-of-other-rows": ("fp8.scaled_product(dp8,", "fp8.scaled_product((dp8[0], dp8[1].flip(0)),"),
    "dqkv-in-16-bits-scaled-twice": (
        "fp8.scaled_product(fp8.quantize_rows(dqkv)",
        "2 * fp8.scaled_product(fp8.quantize_rows(dqkv)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTANTS[name]
    text = Path(sound.__file__ or "").read_text()
    if new is None:
        new = old.replace("rows_a", "rows_m")
    module = load_mutant(sound, [(old, new, 1)], tmp_path, monkeypatch)
    assert old in text
    with pytest.raises(AssertionError, match="off by"):
        check(replace(CASE, biases=BIASES), module)
