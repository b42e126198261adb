"""What a block's backward asks three launches for besides their gradients: the residual's gradient added in, the
forward's modulated output written again, and S = Σ_L dr. Each from the same pass, against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import opendit.kernels.gate_residual as gating
import opendit.kernels.gate_residual_layernorm_modulate as fused
import opendit.kernels.layernorm_modulate as norm
from opendit.kernels._rows import Tile
from tests.kernels.checking import TOLERANCE, relative_error
from tests.mutating import load_mutant

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-5


class Shape(NamedTuple):
    B: int
    L: int
    D: int
    dtype: torch.dtype = F32  # of the residual stream
    low: torch.dtype = F32  # of all else


# One row; odd lengths; two programs for each sample in the interpreter; mixed dtypes.
SHAPES = [
    *[Shape(1, 1, 8), Shape(3, 7, 12), Shape(2, 71, 20), Shape(2, 5, 100)],
    *[Shape(3, 9, 24, F32, BF16), Shape(3, 9, 24, BF16, BF16), Shape(2, 17, 40, F16, F16), Shape(2, 5, 12, BF16, F32)],
    *[Shape(2, 9, 1152, F32, BF16), Shape(2, 9, 1152, BF16, BF16)],
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.B}x{s.L}x{s.D}-{s.dtype}-{s.low}")


def tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape[:3], device=device).to(dtype)


def modulation(shape: Shape, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(shift, scale, gate): chunks of one tensor, each sample's its own."""
    return torch.randn(shape.B, 4 * shape.D, device=device).to(shape.low).chunk(4, 1)[:3]


def normalize(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


class Problems:
    """Collects what is off. `coarse`: the coarsest dtype that went in."""

    def __init__(self, shape: Shape) -> None:
        self.found: list[str] = []
        self.coarse = max((shape.dtype, shape.low), key=TOLERANCE.__getitem__)

    def compare(self, name: str, actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
        error = relative_error(actual, exact.detach())
        if not error <= TOLERANCE[dtype]:
            self.found.append(f"{name} is off by {error:.1e}")

    def same(self, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        # On a GPU a lane with a single element of a row adds its square unrounded to the others', so that lanes may
        # hold a variance of another last bit. Rows of 128 and more give every lane several.
        if actual.is_cuda and expected.shape[-1] < 128:
            self.compare(name, actual, expected, expected.dtype)
        elif not torch.equal(actual, expected):
            self.found.append(f"{name} is not the forward's, bit for bit")

    def close(self) -> None:
        assert not self.found, "; ".join(self.found)


def check_norm(shape: Shape, device: torch.device, module: ModuleType = norm, tile: Tile | None = None) -> None:
    x, dr, dout = (tokens(shape, dtype, device) for dtype in (shape.dtype, shape.dtype, shape.low))
    shift, scale, _ = modulation(shape, device)
    forward, mean, rstd = norm.launch_forward(x, shift, scale, None, None, EPS, shape.low)
    again = torch.empty_like(forward)
    dx, sums = module.launch_backward(
        dout, x, scale, None, mean, rstd, F32, True, True, tile=tile, dr=dr, shift=shift, out=again
    )
    x64, shift64, scale64 = doubles(x, shift, scale)
    exact = normalize(x64) * (1 + scale64[:, None]) + shift64[:, None]
    exact_dx, dshift, dscale = torch.autograd.grad(exact, (x64, shift64, scale64), dout.double())
    problems = Problems(shape)
    problems.compare("dx", dx, exact_dx + dr.double(), shape.dtype)
    problems.compare("S0", sums[:, 0], dshift, F32)
    problems.compare("S1", sums[:, 1], dscale, F32)
    problems.same("the output again", again, forward)
    bare, _ = module.launch_backward(dout, x, scale, None, mean, rstd, F32, True, False, tile=tile)
    problems.compare("dx without dr", bare, exact_dx, shape.dtype)
    only, none = module.launch_backward(
        dout, x, scale, None, mean, rstd, F32, False, False, tile=tile, shift=shift, out=again.fill_(float("nan"))
    )
    assert only.numel() == none.numel() == 0
    problems.same("the output alone", again, forward)
    problems.close()


def check_fused(shape: Shape, device: torch.device, module: ModuleType = fused, tile: Tile | None = None) -> None:
    x, dr = (tokens(shape, shape.dtype, device) for _ in range(2))
    y, dm = (tokens(shape, shape.low, device) for _ in range(2))
    shift, scale, gate = modulation(shape, device)
    residual, forward, mean, rstd = fused.launch_forward(x, y, gate, shift, scale, None, None, EPS, shape.low)
    again = torch.empty_like(forward)
    given = (dr, dm, residual, y, gate, scale, None, mean, rstd, shape.dtype, F32)
    dx, dy, sums = module.launch_backward(*given, [True] * 4, tile=tile, want_sum=True, shift=shift, modulated=again)
    r64, y64, gate64, shift64, scale64 = doubles(residual, y, gate, shift, scale)
    exact = normalize(r64) * (1 + scale64[:, None]) + shift64[:, None]
    through, dshift, dscale = torch.autograd.grad(exact, (r64, shift64, scale64), dm.double())
    total = dr.double() + through
    problems = Problems(shape)
    problems.compare("dx", dx, total, shape.dtype)
    problems.compare("dy", dy, gate64[:, None] * total, shape.low)
    names = ("dgate", "S0", "S1", "S")
    for i, expected in enumerate(((total * y64).sum(1), dshift, dscale, total.sum(1))):
        problems.compare(names[i], sums[:, i], expected, F32)
    problems.same("the output again", again, forward)
    *_, alone = module.launch_backward(*given, [True, True, False, False], tile=tile, want_sum=True)
    assert alone.shape == (shape.B, 1, shape.D)
    problems.compare("S alone", alone[:, 0], total.sum(1), F32)
    problems.close()


def check_gate(shape: Shape, device: torch.device, module: ModuleType = gating, tile: Tile | None = None) -> None:
    dr, y = tokens(shape, shape.dtype, device), tokens(shape, shape.low, device)
    _, _, gate = modulation(shape, device)
    exact = {"dgate": (dr.double() * y.double()).sum(1), "S": dr.double().sum(1)}
    problems = Problems(shape)
    for wanted in (("dgate", "S"), ("S",), ("dgate",), ()):
        dy, sums = torch.empty_like(y), torch.empty(shape.B, len(wanted), shape.D, device=device)
        module.launch_backward_sums(dr, y, gate, dy, sums, "dgate" in wanted, tile=tile)
        problems.compare("dy", dy, gate.double()[:, None] * dr.double(), shape.low)
        for i, name in enumerate(wanted):
            problems.compare(name, sums[:, i], exact[name], F32)
    sums = torch.empty(shape.B, 1, shape.D, device=device)
    module.launch_backward_sums(dr, y, gate, dy.new_empty(0), sums, False, tile=tile)
    problems.compare("S alone", sums[:, 0], exact["S"], F32)
    problems.close()


CHECKS: list[Callable[..., None]] = [check_norm, check_fused, check_gate]
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__[6:])


@each_check
@each_shape
def test_agrees_with_float64(check: Callable[..., None], shape: Shape, device: torch.device) -> None:
    check(shape, device)


@each_check
def test_any_launch_gives_the_same(check: Callable[..., None], device: torch.device) -> None:
    for tile in (Tile(1, 3, 64, 4, 1), Tile(4, 4, 64, 4, 2)):
        check(Shape(2, 11, 20, F32, BF16), device, tile=tile)


@each_check
def test_wide(check: Callable[..., None], device: torch.device) -> None:
    check(Shape(2, 19, 1152, F32, BF16), device)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, int, int], device: torch.device) -> None:
    B, L, D = shape
    x, c, row = torch.randn(shape, device=device), torch.randn(B, D, device=device), torch.empty(B, L, device=device)
    _, sums = norm.launch_backward(x, x, c, None, row, row, F32, True, True, dr=x, shift=c, out=torch.empty_like(x))
    assert torch.equal(sums, torch.zeros(B, 2, D, device=device))
    given = (x, x, x, x, c, c, None, row, row, F32, F32, [True] * 4)
    *_, sums = fused.launch_backward(*given, want_sum=True, shift=c, modulated=torch.empty_like(x))
    assert torch.equal(sums, torch.zeros(B, 4, D, device=device))
    sums = torch.empty(B, 2, D, device=device)
    gating.launch_backward_sums(x, x, c, torch.empty_like(x), sums, True)
    assert torch.equal(sums, torch.zeros_like(sums))


MUTANTS: dict[str, tuple[Callable[..., None], ModuleType, str, str, int, str]] = {
    "norm-dr-dropped": (check_norm, norm, "dx_h + dr_h, dx_t + dr_t", "dx_h, dx_t", 1, "dx is off"),
    "norm-dr-without-its-tail": (check_norm, norm, "dx_h + dr_h, dx_t + dr_t", "dx_h + dr_h, dx_t", 1, "dx is off"),
    "norm-shift-by-program": (check_norm, norm, "shift_ptr + b * ", "shift_ptr + (pid // 65536) * ", 2, "output again"),
    "norm-output-without-scale": (check_norm, norm, "n_h * a_h + shift_h", "n_h + shift_h", 1, "output again"),
    "norm-output-nearly": (check_norm, norm, "n_t * a_t + shift_t", "n_t * (a_t * 1.000001) + shift_t", 1, "output"),
    "norm-sums-of-dx": (check_norm, norm, "s0_h += tl.sum(do_h, 0)", "s0_h += tl.sum(do_h * a_h, 0)", 1, "S0 is off"),
    "fused-sum-of-dy": (check_fused, fused, "sum_h += tl.sum(d_h, 0)", "sum_h += tl.sum(gate_h * d_h, 0)", 1, "S is"),
    "fused-sum-of-what-came-in": (check_fused, fused, "sum_t += tl.sum(d_t, 0)", "sum_t += tl.sum(dr_t, 0)", 1, "S is"),
    "fused-sum-of-the-last-rows": (check_fused, fused, "sum_h += tl.sum(d_h, 0)", "sum_h = tl.sum(d_h, 0)", 1, "S is"),
    "fused-sum-in-another-place": (
        check_fused,
        fused,
        "        part += 2 * D\n",
        "        part += D\n",
        1,
        "S1 is off",
    ),
    "fused-shift-by-program": (check_fused, fused, "shift_ptr + b * ", "shift_ptr + (pid // 65536) * ", 2, "output"),
    "fused-output-of-x": (check_fused, fused, "n_h * a_h + shift_h", "r_h * a_h + shift_h", 1, "output again"),
    "fused-dr-dropped": (check_fused, fused, "d_h + dr_h, d_t + dr_t", "d_h, d_t", 1, "dx is off"),
    "gate-sum-of-dy": (check_gate, gating, "sum_h += tl.sum(dr_h, 0)", "sum_h += tl.sum(gate_h * dr_h, 0)", 1, "S is"),
    "gate-sum-lost-programs": (check_gate, gating, "store_sums(part, sum_h", "store_sums(part_ptr, sum_h", 1, "S is"),
    "gate-sum-in-dgates-place": (check_gate, gating, "        part += D\n", "        pass\n", 1, "is off"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, module, old, new, count, message = MUTANTS[name]
    mutant: Any = load_mutant(module, [(old, new, count)], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        check(Shape(3, 71, 20), torch.device("cpu"), mutant)
