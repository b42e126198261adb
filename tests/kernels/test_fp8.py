"""Rows in 8 bits: their codes and scales bit for bit against the specification, and what is written beside them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import opendit.kernels.fp8 as sound
import opendit.kernels.gate_residual_layernorm_modulate as fused
import opendit.kernels.layernorm_modulate as norm
from opendit.kernels.fp8 import E4M3, Quantized, quantize_rows_reference
from tests.kernels.checking import TOLERANCE, relative_error
from tests.mutating import load_mutant

pytest.importorskip("triton")

F32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
each_shape = pytest.mark.parametrize("shape", [(1, 1), (7, 24), (131, 100), (70, 1152), (5, 4608)], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def tokens(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of very different sizes."""
    sizes = torch.logspace(-6, 4, shape[0])[torch.randperm(shape[0])].to(device)
    return (torch.randn(shape, device=device) * sizes[:, None]).to(dtype)


@pytest.fixture(autouse=True)
def _skip_where_the_gpu_has_no_fp8(request: pytest.FixtureRequest) -> None:
    if "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda":
        reason = sound.unavailable(torch.device("cuda"))
        if reason is not None:
            pytest.skip(reason)


def same(found: Quantized, x: torch.Tensor, exact: bool = True) -> None:
    """The codes and scales of x's rows. Where x itself was computed, a code may be a neighbour's now and then."""
    q, scale = quantize_rows_reference(x)
    assert (found[0].dtype, found[0].shape, found[1].shape) == (E4M3, x.shape, (len(x), 1))
    torch.testing.assert_close(
        found[1], scale, rtol=0 if exact and not x.is_cuda else 1e-5, atol=0, msg="the scales are off"
    )
    off = found[0].float() != q.float()
    if exact and not x.is_cuda:  # a GPU's division is not rounded correctly
        assert not off.any(), "the codes are off"
    assert off.float().mean() <= 0.01, "the codes are off"
    # Half of a step at the most: 1/16 of a value, or half the least code where values are small.
    allowed = x.float().abs() / 16 + scale * 2**-10
    assert ((found[0].float() * found[1] - x.float()).abs() <= allowed * 1.001).all(), "the codes are off"


def check_rows(module: ModuleType, device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = tokens(shape, dtype, device)
    same(module.quantize_rows(x), x)
    wide = tokens((shape[0], shape[1] + 3), dtype, device)
    same(module.quantize_rows(wide[:, 1:-2]), wide[:, 1:-2])
    same(module.quantize_rows(x.t()), x.t())
    same(module.quantize_columns(x), x.t())
    same(module.quantize_columns(wide[:, 1:-2]), wide[:, 1:-2].t())


def check_gelu(
    module: ModuleType, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, tanh: bool
) -> None:
    p, dg = (3 * torch.randn(shape, device=device)).to(dtype), tokens(shape, dtype, device)
    leaf = p.double().requires_grad_()
    g = F.gelu(leaf, approximate="tanh" if tanh else "none")
    (dp,) = torch.autograd.grad(g, leaf, dg.double())
    same(module.gelu_rows(p, tanh), g.detach().float(), exact=False)
    found, quantized, again, total = module.gelu_backward_rows(dg, p, tanh, True)
    assert relative_error(found, dp) <= TOLERANCE[dtype], "dp is off"
    assert relative_error(again, g.detach()) <= TOLERANCE[dtype], "g is off"
    assert (total - dp.sum(0)).norm() <= 1e-5 * dp.square().sum(0).sqrt().norm(), "the sum is off"
    same(quantized, dp.float(), exact=False)
    assert module.gelu_backward_rows(dg, p, tanh, False)[3] is None


@each_dtype
@each_shape
def test_rows_and_columns(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    check_rows(sound, device, shape, dtype)


@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "exact"])
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (131, 100), (9, 4608)], ids=str)
def test_gelu(shape: tuple[int, int], dtype: torch.dtype, tanh: bool, device: torch.device) -> None:
    check_gelu(sound, device, shape, dtype, tanh)


@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 71, 100), (2, 3, 1152)], ids=str)
@each_dtype
def test_norms_write_rows(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    B, L, D = shape
    x, y = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(BF16)
    shift, scale, gate = torch.randn(B, 3 * D, device=device).to(BF16).chunk(3, 1)  # each sample's its own
    for launch, inputs in ((norm.launch_forward, (x,)), (fused.launch_forward, (x, y, gate))):
        *_, h, mean, rstd = launch(*inputs, shift, scale, None, None, 1e-6, F32)
        scale8 = torch.empty(B * L, 1, device=device)
        *_, q, mean8, rstd8 = launch(*inputs, shift, scale, None, None, 1e-6, E4M3, scale8=scale8)
        same((q.view(-1, D), scale8), h.view(-1, D))
        # On a GPU the two launches differ, and add up a row in another order.
        close = {"rtol": 1e-6, "atol": 1e-7} if x.is_cuda else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(mean8, mean, **close)
        torch.testing.assert_close(rstd8, rstd, **close)


def test_a_product_of_rows(device: torch.device) -> None:
    a, b, bias = tokens((32, 48), F32, device), torch.randn(16, 48, device=device), torch.randn(16, device=device)
    pair = [quantize_rows_reference(t) for t in (a, b)]
    found = sound.scaled_product(*pair, BF16, bias.to(BF16))
    exact = (sound.cast(pair[0]).double() @ sound.cast(pair[1]).double().t()) + bias.to(BF16).double()
    assert relative_error(found, exact) <= TOLERANCE[BF16]
    assert relative_error(found.double(), a.double() @ b.double().t() + bias.double()) <= 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float, device: torch.device) -> None:
    x = torch.randn(32, 48, device=device)
    x[3, 5] = bad
    other = quantize_rows_reference(torch.randn(16, 48, device=device))
    product = sound.scaled_product(sound.quantize_rows(x), other, BF16)
    assert not product[3].isfinite().any()
    assert product[torch.arange(32, device=device) != 3].isfinite().all()
    assert not sound.scaled_product(other, sound.quantize_columns(x.t()), BF16)[:, 3].isfinite().any()


def test_rows_of_nothing_and_of_zeros(device: torch.device) -> None:
    assert sound.quantize_rows(torch.zeros(0, 16, device=device))[0].shape == (0, 16)
    q, scale = sound.quantize_rows(torch.zeros(3, 16, device=device))
    assert q.float().eq(0).all()
    assert scale.isfinite().all()
    tiny = torch.full((1, 16), 1e-38, device=device)
    assert sound.cast(sound.quantize_rows(tiny)).isfinite().all()


def test_refuses_by_name() -> None:
    assert "multiples of 16, not 24" in str(sound.unavailable(CPU, (32, 24)))
    if not torch.cuda.is_available():
        assert sound.unavailable(CPU, (32,)) is None  # in the interpreter
        assert "compute capability" in str(sound.unavailable(torch.device("meta"), (32,)))


MUTANTS = {
    "rows-without-scale": (
        "_quantize_rows",
        "h, t = load_rows(x_ptr, row * x_stride",
        "h, t = load_rows(x_ptr, row * D",
    ),
    "columns-scale-of-rows": ("_quantize_columns", "tl.max(tl.abs(x), 0)", "tl.max(tl.abs(x))"),
    "columns-last-rows-only": (
        "_quantize_columns",
        "largest = tl.maximum(largest, tl.max(tl.abs(x), 0))",
        "largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-30)",
    ),
    "columns-signed": ("_quantize_columns", "tl.max(tl.abs(x), 0)", "tl.max(x, 0)"),
    "gelu-of-p": ("_gelu_rows", "h * _share(h, TANH), t", "h, t"),
    "backward-codes-of-dg": ("_gelu_bwd", "row, live, dp_h, dp_t, D", "row, live, dg_h, dg_t, D"),
    "backward-sum-of-last-rows": ("_gelu_bwd", "sum_h += tl.sum(dp_h, 0)", "sum_h = tl.sum(dp_h, 0)"),
    "backward-sum-of-one-program": ("_gelu_bwd", "part_ptr + tl.program_id(0).to(tl.int64) * D", "part_ptr"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, old, new = MUTANTS[name]
    text = Path(sound.__file__ or "").read_text()
    module = load_mutant(sound, [(old, new, text.count(old))], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=r"is off|are off"):  # noqa: PT012
        check_rows(module, CPU, (331, 100), F32)
        check_gelu(module, CPU, (331, 100), F32, True)
