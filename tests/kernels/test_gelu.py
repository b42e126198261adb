"""GELU beyond what every kernel is tested for: both formulas, the sums, and h written again by the backward."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import opendit.kernels.gelu as sound
from tests.kernels.checking import TOLERANCE, relative_error
from tests.mutating import load_mutant

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CPU = torch.device("cpu")
both_formulas = pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "exact"])


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tanh: bool,
    device: torch.device,
    *,
    module: ModuleType = sound,
    transposed: bool = False,
    **options,
) -> None:
    """h, dx, S and h again, all from one pass, against float64."""
    x, dh = (3 * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)
    if transposed:
        x, dh = x.mT.contiguous().mT, dh.mT.contiguous().mT
        assert not x.is_contiguous()
    leaf = x.detach().double().requires_grad_()
    exact = F.gelu(leaf, approximate="tanh" if tanh else "none")
    (exact_dx,) = torch.autograd.grad(exact, leaf, dh.double())
    exact_sum = exact_dx.flatten(0, -2).sum(0)

    h = module.launch_forward(x, tanh)
    dx, again = torch.empty_like(h), torch.empty_like(h)
    total = torch.empty(shape[-1], device=device)
    module.launch_backward_into(dh, x, tanh, dx, again, total, **options)
    assert {t.dtype for t in (h, dx, again)} == {dtype}
    # Sums of few terms, some of which cancel, are as exact as the terms: the formula's constants have 8 digits.
    size = exact_dx.flatten(0, -2).square().sum(0).sqrt().norm()
    problems = [
        f"{name} is off by {error:.1e}"
        for name, error, limit in [
            ("h", relative_error(h, exact.detach()), TOLERANCE[dtype]),
            ("dx", relative_error(dx, exact_dx), TOLERANCE[dtype]),
            ("the sum", ((total - exact_sum).norm() / size).item(), TOLERANCE[F32]),
        ]
        if not error <= limit
    ]
    if not torch.equal(again, h):
        problems.append("h again is not the forward's h")
    for wanted in ((None, None), (again, None), (None, total)):
        other = torch.empty_like(dx)
        module.launch_backward_into(dh, x, tanh, other, *wanted, **options)
        assert torch.equal(other.nan_to_num(), dx.nan_to_num()), "dx depends on what else is wanted"
    assert not problems, "; ".join(problems)


@both_formulas
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 65, 100), (301, 513), (5, 1024)], ids=str)
def test_agrees_with_float64(shape: tuple[int, ...], tanh: bool, device: torch.device) -> None:
    check(shape, F32, tanh, device)


@both_formulas
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_low_precision(dtype: torch.dtype, tanh: bool, device: torch.device) -> None:
    check((131, 300), dtype, tanh, device)


@both_formulas
def test_strided(tanh: bool, device: torch.device) -> None:
    check((2, 9, 20), F32, tanh, device, transposed=True)


def test_any_launch_gives_the_same(device: torch.device) -> None:
    for tile in (sound.Tile(1, 128, 3, 4, 1), sound.Tile(8, 16, 50, 4, 2)):
        check((5, 130), F32, True, device, tile=tile)


@both_formulas
def test_far_from_zero(tanh: bool, device: torch.device) -> None:
    x = torch.tensor([[-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4]], device=device)
    dx, total = torch.empty_like(x), torch.empty(8, device=device)
    assert torch.equal(sound.launch_forward(x, tanh), x.clamp_min(0))
    sound.launch_backward_into(torch.ones_like(x), x, tanh, dx, None, total)
    assert torch.equal(dx, torch.tensor([[0, 0, 0, 0.5, 0.5, 1, 1, 1]], device=device))
    assert torch.equal(total, dx[0])


@both_formulas
def test_public_function(tanh: bool, device: torch.device) -> None:
    approximate = "tanh" if tanh else "none"
    x = torch.randn(2, 5, 12, device=device, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    dh = torch.randn_like(x)
    found = sound.gelu(x, approximate=approximate, backend="triton")
    expected = F.gelu(exact, approximate=approximate)
    assert relative_error(found.detach(), expected.detach()) < 1e-6
    grads = torch.autograd.grad(found, x, dh) + torch.autograd.grad(expected, exact, dh.double())
    assert relative_error(*grads) < 1e-6
    with pytest.raises(ValueError, match="approximate is 'sigmoid'; allowed are 'none', 'tanh'"):
        sound.gelu(x, approximate="sigmoid")


def test_empty(device: torch.device) -> None:
    for shape in ((0, 8), (4, 0)):
        x = torch.randn(shape, device=device)
        total = torch.empty(shape[-1], device=device)
        sound.launch_backward_into(x, x, True, torch.empty_like(x), None, total)
        assert torch.equal(total, torch.zeros_like(total))


MUTANTS = {
    "slope-of-tanh": ("0.134145", "0.044715", True, "dx is off"),
    "slope-without-its-second-term": ("return s + x * s * (1 - s) *", "return s + 0 * s *", True, "dx is off"),
    "slope-of-erf": ("return s + x * 0.3989422804014327", "return s + x * 0.7978845608028654", False, "dx is off"),
    "exact-for-tanh": ("0.044715 * x * x)", "0.0 * x * x)", True, "h is off"),
    "sum-lost-rows": ("total += tl.sum(dx, 0)", "total = tl.sum(dx, 0)", True, "the sum is off"),
    "sum-lost-programs": ("total, mask=column < N", "total, mask=(column < N) & (first == 0)", True, "the sum is off"),
    "sum-of-dh": ("tl.sum(dx, 0)", "tl.sum(dh, 0)", True, "the sum is off"),
    "sum-of-what-no-row-holds": ("live = (row < last)[:, None] &", "live = (row < M)[:, None] &", True, "the sum"),
    "share-for-h": ("downcast(x * s, h_ptr", "downcast(s, h_ptr", False, "h again"),
    "h-not-bit-for-bit": ("downcast(x * s, h_ptr", "downcast(x * s * 1.0000002, h_ptr", False, "h again"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, tanh, message = MUTANTS[name]
    both = 2 if "h_ptr" in old else 1  # with sums and without
    module = load_mutant(sound, [(old, new, both)], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        check((301, 70), F32, tanh, CPU, module=module)


@pytest.mark.gpu
@both_formulas
def test_more_than_2_to_the_31_elements(tanh: bool) -> None:
    """What the block asks of the backward, in its last rows as in those rows alone."""
    M, N = 466_034, 4608
    assert M * N > 2**31
    x = torch.randn(M, N, dtype=BF16, device="cuda")
    dh = torch.randn(1, N, dtype=BF16, device="cuda").expand(M, N)
    h = sound.launch_forward(x, tanh)
    dx, again, total = torch.empty_like(x), torch.empty_like(x), torch.empty(N, device="cuda")
    sound.launch_backward_into(dh, x, tanh, dx, again, total)
    assert torch.equal(again, h)
    assert torch.equal(h[-3:], sound.launch_forward(x[-3:], tanh))
    assert torch.equal(dx[-3:], sound.launch_backward(dh[-3:], x[-3:], tanh))
    assert relative_error(total, dx.sum(0, dtype=torch.float64)) < 1e-3  # of rounded values
