"""The attention backward on packed qkv against float64: each of dq, dk and dv, and the sums of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from opendit.attention import two_pass
from opendit.kernels import attention_backward as sound
from opendit.kernels.attention_backward import Launch, Tiles, attention_backward_reference, fits, pieces
from opendit.kernels.spec import discover
from tests.kernels.checking import TOLERANCE, relative_error
from tests.mutating import load_mutant

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int, int]  # B, L, H, K


def make(shape: Shape, dtype: torch.dtype, device: torch.device, strided: bool = False):
    """(dout, qkv); strided: rows of longer and wider tensors."""
    B, L, H, K = shape
    if strided:
        qkv = torch.randn(B, L + 2, 3 * H * K + 8, device=device)[:, 1 : L + 1, 8:].unflatten(2, (3, H, K))
        dout = torch.randn(B, L, H * K + 8, device=device)[..., 8:].unflatten(2, (H, K))
    else:
        qkv, dout = torch.randn(B, L, 3, H, K, device=device), torch.randn(B, L, H, K, device=device)
    return dout.to(dtype), qkv.to(dtype)


def errors(dqkv: torch.Tensor, sums: torch.Tensor, exact_dqkv: torch.Tensor) -> dict[str, float]:
    """Relative errors of dq, dk, dv and dq's sums, each by itself, so that none hides behind another.

    Sums are measured against the root of the summed squares: roundings of the terms add up so, whatever is left of the
    terms.
    """
    pairs = zip("qkv", dqkv.unbind(2), exact_dqkv.unbind(2), strict=True)
    found = {f"d{name}": relative_error(d, exact) for name, d, exact in pairs}
    dq = exact_dqkv[:, :, 0]
    size = dq.square().sum((0, 1)).sqrt().norm()
    found["q's sums"] = ((sums.double() - dq.sum((0, 1)).flatten()).norm() / size.clamp_min(1e-2)).item()
    return {name: error if error == error else float("inf") for name, error in found.items()}


def check(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    strided: bool = False,
    scale: float | None = None,
    launch: Tiles | None = None,
    module: ModuleType = sound,
) -> None:
    dout, qkv = make(shape, dtype, device, strided)
    out, lse, exact, _ = attention_backward_reference(dout.double(), qkv.double(), scale)
    given = (dout, qkv, out.to(dtype), lse.float(), scale)
    dqkv, sums = module.attention_backward(*given, query_sums=True, launch=launch)
    assert dqkv.is_contiguous()
    assert (dqkv.dtype, sums.dtype) == (dtype, F32)
    problems = [f"{n} is off by {e:.1e}" for n, e in errors(dqkv, sums, exact).items() if not e <= TOLERANCE[dtype]]
    assert not problems, "; ".join(problems)


@pytest.mark.parametrize(
    "shape",
    [
        *[
            (2, 17, 2, 8),
            (1, 5, 3, 16),
            (2, 33, 2, 24),
            (1, 35, 2, 64),
            (2, 33, 2, 72),
            (1, 67, 1, 80),
            (1, 33, 1, 128),
        ],
        *[(1, 64, 1, 72), (2, 32, 1, 128)],
    ],
    ids=str,
)
def test_agrees_with_float64(shape: Shape, device: torch.device) -> None:
    check(shape, F32, device)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 67, 1, 72), (2, 32, 1, 64), (1, 33, 2, 120)], ids=str)
def test_agrees_with_float64_in_low_precision(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, dtype, device)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 33, 2, 24), F32), ((2, 17, 2, 72), F16)], ids=str)
def test_strided_rows_and_scale(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, dtype, device, strided=True, scale=0.3)


def test_layouts_that_cost_a_copy(device: torch.device) -> None:
    dout, qkv = make((2, 9, 2, 16), F32, device)
    out, lse, exact, _ = attention_backward_reference(dout.double(), qkv.double())
    turned = [t.transpose(1, -1).contiguous().transpose(1, -1) for t in (dout, qkv, out.float())]
    assert not any(t.stride(-1) == 1 for t in turned)
    dqkv, sums = sound.attention_backward(*turned, lse.float(), query_sums=True)
    assert max(errors(dqkv, sums, exact).values()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 70, 1, 24), (1, 64, 1, 24)], ids=str)
def test_any_launch_gives_the_same(shape: Shape, device: torch.device) -> None:
    for queries, keys in (((16, 64), (64, 16)), ((64, 32), (32, 64))):
        check(shape, F32, device, launch=Tiles(Launch(*queries, 4, 1), Launch(*keys, 4, 2)))


@pytest.mark.parametrize(("shape", "dtype"), [((2, 64, 2, 24), F32), ((2, 256, 3, 72), BF16), ((3, 64, 2, 64), F16)])
def test_boxes_give_the_same_bits(
    shape: Shape, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams through the tensor memory unit and through pointers; rows of a wider tensor too."""
    made = []
    whole = sound._boxes

    def watch(*given: Any) -> Any:
        made.append(whole(*given))
        return made[-1]

    monkeypatch.setattr(sound, "_boxes", watch)
    B, L, H, K = shape
    wide = torch.randn(B, L, 3 * H * K + 8, device=device).to(dtype)
    qkv = wide[..., 8:].unflatten(2, (3, H, K))
    dout = torch.randn(B, L, H, K, device=device).to(dtype)
    out, lse, _, _ = attention_backward_reference(dout.double(), qkv.double())
    usual = sound.tiles(K, qkv.element_size())
    results = []
    for boxes in (True, False):
        launch = Tiles(replace(usual.queries, boxes=boxes), replace(usual.keys, boxes=boxes))
        results += sound.attention_backward(dout, qkv, out.to(dtype), lse.float(), query_sums=True, launch=launch)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    usable = device.type == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    assert [head is not None for head, _ in made] == [usable] * 3 + [False] * 3


def test_boxes_are_not_of_what_the_unit_refuses(device: torch.device) -> None:
    launch = sound.tiles(24, 4).keys
    fits_blocks = torch.zeros(2, 64, 2, 24, device=device)
    odd = torch.zeros(2, 65, 2, 24, device=device)[:, 1:]  # samples apart
    row = torch.zeros(2, 64, 50, device=device)[..., 2:].unflatten(2, (2, 24))  # rows at 8 bytes
    for tensor in (
        odd,
        row,
        fits_blocks[:, :63],
        fits_blocks[:1].expand(2, 64, 2, 24),
        fits_blocks[:1, :1].expand(1, 64, 2, 24),
    ):
        assert sound._boxes(tensor, launch, 16, 16, 16) == (None, None)


def check_large_scores(device: torch.device, module: ModuleType = sound) -> None:
    """exp2(-lse) overflows, which must reach nothing through keys that do not exist."""
    dout, qkv = make((1, 17, 2, 16), F32, device)
    qkv[:, :, 0], qkv[:, :, 1] = 30.0, -30.0 + 0.01 * qkv[:, :, 1]
    out, lse, exact, _ = attention_backward_reference(dout.double(), qkv.double())
    assert lse.max() < -1000
    dqkv, _ = module.attention_backward(dout, qkv, out.float(), lse.float())
    # Scores near 3600, of which float32 knows 2e-4. As a whole: dq is next to nothing here.
    assert relative_error(dqkv, exact) < 2e-3, "large scores are off"


def test_large_scores(device: torch.device) -> None:
    check_large_scores(device)


def test_one_token_gives_its_gradient_to_v_alone(device: torch.device) -> None:
    dout, qkv = make((2, 1, 2, 72), F32, device)
    out, lse, _, _ = attention_backward_reference(dout.double(), qkv.double())
    dqkv, _ = sound.attention_backward(dout, qkv, out.float(), lse.float())
    dq, dk, dv = dqkv.unbind(2)
    assert relative_error(dv, dout.double()) < 1e-5
    assert max(dq.norm(), dk.norm()) < 1e-5 * dv.norm()


def test_without_sums_the_gradient_is_the_same(device: torch.device) -> None:
    dout, qkv = make((2, 33, 2, 24), F32, device)
    out, lse, _, _ = attention_backward_reference(dout, qkv)
    dqkv, _ = sound.attention_backward(dout, qkv, out, lse, query_sums=True)
    bare, none = sound.attention_backward(dout, qkv, out, lse)
    assert none.numel() == 0
    assert torch.equal(bare, dqkv)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8)], ids=str)
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    qkv = torch.randn(shape, device=device)
    out = qkv[:, :, 0]
    dqkv, sums = sound.attention_backward(out, qkv, out, out.new_zeros(shape[0], 2, shape[1]), query_sums=True)
    assert dqkv.shape == shape
    assert torch.equal(sums, torch.zeros(16, device=device))


def test_repeats_are_bit_identical(device: torch.device) -> None:
    shape = (3, 250, 4, 72) if device.type == "cuda" else (1, 40, 2, 24)
    dout, qkv = make(shape, BF16, device)
    out, lse, _, _ = attention_backward_reference(dout.float(), qkv.float())
    given = (dout, qkv, out.to(BF16), lse)
    first = sound.attention_backward(*given, query_sums=True)
    for _ in range(200 if device.type == "cuda" else 3):
        again = sound.attention_backward(*given, query_sums=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_pieces_cover_every_head_dim() -> None:
    for K in range(8, 129, 8):
        head, tail = pieces(K)
        assert all(p & p - 1 == 0 for p in (head, tail))
        assert head >= 16
        assert (head >= K) == (tail == 0)
        assert head + tail >= K
        assert tail in (0, 16) or tail // 2 < K - head, "a smaller tail would do"
    assert (pieces(64), pieces(72), pieces(80), pieces(128)) == ((64, 0), (64, 16), (64, 16), (128, 0))


def test_what_fits() -> None:
    assert all(fits(dtype, K) for dtype in (F32, F16, BF16) for K in (8, 64, 72, 128))
    assert not any(fits(BF16, K) for K in (4, 12, 136))
    assert not fits(torch.float64, 64)


def test_is_no_spec() -> None:
    assert "attention_backward" not in discover()


def test_reference_is_sdpa() -> None:
    qkv = torch.randn(2, 5, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    expected = F.scaled_dot_product_attention(*qkv.transpose(1, 3).unbind(2)).transpose(1, 2)
    dout = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, qkv, dout)
    out, lse, dqkv, sums = attention_backward_reference(dout, qkv)
    q, k, _ = qkv.detach().unbind(2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * 7**-0.5
    for found, truth in [
        (out, expected.detach()),
        (lse, scores.exp().sum(-1).log()),
        (dqkv, expected_grad),
        (sums, expected_grad[:, :, 0].sum((0, 1)).flatten()),
    ]:
        assert relative_error(found, truth) < 1e-12


CPU = torch.device("cpu")
ODD = {"shape": (2, 35, 2, 24), "dtype": F32}
EVEN = {"shape": (2, 32, 2, 24), "dtype": F32}
MUTANTS = {
    "dq-without-scale": ("dq_h, dq_t = dq_h * scale, dq_t * scale", "pass", 1, "dq is off", ODD),
    "dk-without-scale": ("dk_h, dk_t = dk_h * scale, dk_t * scale", "pass", 1, "dk is off", ODD),
    "dk-for-dv": ("exists, dv_h, dv_t, K", "exists, dk_h, dk_t, K", 1, "dv is off", ODD),
    "dq-without-delta": ("p * (dp - delta[:, None])", "p * dp", 1, "dq is off", ODD),
    "dk-without-delta": ("p * (dp - delta[None, :])", "p * dp", 1, "dk is off", ODD),
    "delta-without-its-tail": (
        "    if TAIL > 0:\n        total +=",
        "    if TAIL < 0:\n        total +=",
        1,
        "dq",
        ODD,
    ),
    "lse-in-the-other-base": ('other=float("inf")) * LOG2E', 'other=float("inf"))', 1, "dq is off", ODD),
    "one-head-for-all": ("h = bh % H", "h = bh * 0", 2, "is off", ODD),
    "one-sample-for-all": ("b = bh // H", "b = bh * 0", 2, "is off", ODD),
    "tail-not-masked": ("mask=_columns(K, FIRST, WIDTH, live), other", "mask=live[:, None], other", 1, "is off", ODD),
    "even-tail-not-masked": (
        "(FIRST + tl.arange(0, WIDTH) < K)[None, :], other",
        "(tl.arange(0, WIDTH) < K)[None, :], other",
        1,
        "is off",
        EVEN,
    ),
    "absent-keys-reach-dq": ("p = tl.where(exists[None, :], p, 0.0)", "pass", 1, "large scores", None),
    "sums-of-the-first-block": ("(b * blocks + block) * H", "(b * blocks + block * 0) * H", 1, "q's sums", ODD),
    "box-of-another-head": ("column = (h * K).to(tl.int32)", "column = (h * 0).to(tl.int32)", 2, "is off", EVEN),
    "box-of-another-sample": ("row = (b * L + start).to", "row = (b * 0 + start).to", 2, "is off", EVEN),
    "box-of-k-for-v": ("row, 2 * H * K + column", "row, H * K + column", 1, "dq is off", EVEN),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, count, message, case = MUTANTS[name]
    module = load_mutant(sound, [(old, new, count)], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        check_large_scores(CPU, module) if case is None else check(device=CPU, module=module, **case)


def test_unmutated_copy_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("broken kernels are for the interpreter")
    module = load_mutant(sound, [], tmp_path, monkeypatch)
    for case in (ODD, EVEN):
        check(device=CPU, module=module, **case)
    check_large_scores(CPU, module)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 256, 16, 72), (2, 100, 16, 72), (2, 256, 12, 64), (1, 256, 8, 128)], ids=str)
def test_errs_no_more_than_cudnn(shape: Shape) -> None:
    """After cuDNN's own forward, as a block runs it, gradients and their sums err at most 1.2 times as much."""
    dout, qkv = make(shape, BF16, torch.device("cuda"))
    B, L, H, _ = shape
    _, lse_exact, exact, _ = attention_backward_reference(dout.double(), qkv.double())
    leaf = qkv.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        theirs = F.scaled_dot_product_attention(*leaf.transpose(1, 3).unbind(2)).transpose(1, 2)
        (their_grad,) = torch.autograd.grad(theirs, leaf, dout)
    out, saved = two_pass.forward(*qkv.unbind(2), "sdpa-cudnn")
    lse = saved[0].reshape(B, H, L)
    assert lse.is_contiguous()
    assert relative_error(lse, lse_exact) < 1e-5
    dqkv, sums = sound.attention_backward(dout, qkv, out, lse, query_sums=True)
    other = errors(their_grad, their_grad[:, :, 0].sum((0, 1), dtype=F32).flatten(), exact)
    for name, error in errors(dqkv, sums, exact).items():
        assert error <= 1.2 * other[name], name


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31() -> None:
    """2**31 elements and more of qkv; its last sample against the same sample alone."""
    B, L, H, K = 2560, 256, 16, 72
    qkv = torch.randn(B, L, 3, H, K, dtype=BF16, device="cuda")
    assert qkv.numel() > 2**31
    dout = torch.randn(1, L, H, K, dtype=BF16, device="cuda").expand(B, L, H, K)
    out, (lse, *_) = two_pass.forward(*qkv.unbind(2), "sdpa-cudnn")
    lse = lse.reshape(B, H, L)
    dqkv, _ = sound.attention_backward(dout, qkv, out, lse)
    alone, _ = sound.attention_backward(dout[-1:], qkv[-1:], out[-1:], lse[-1:])
    assert torch.equal(dqkv[-1:], alone)
