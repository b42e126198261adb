"""Attention on packed qkv against its float64 reference: values, lse, the packed gradient and the bias sums."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opendit.kernels import _attention, packed_attention
from opendit.kernels._attention import VARIANTS, backward_launch, pieces
from opendit.kernels.packed_attention import packed_attention_reference
from opendit.kernels.spec import discover
from tests.kernels.checking import TOLERANCE, relative_error

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = Path(_attention.__file__).parent


def make_qkv(B: int, L: int, H: int, K: int, dtype: torch.dtype, device: torch.device, strided: bool = False):
    """Random qkv, unlike in q, k and v; strided: rows of a longer and wider tensor."""
    if strided:
        qkv = torch.randn(B, L + 2, 3 * H * K + 8, dtype=dtype, device=device)[:, 1 : L + 1, 8:].unflatten(2, (3, H, K))
    else:
        qkv = torch.randn(B, L, 3, H, K, dtype=dtype, device=device)
    return qkv


def exact(qkv: torch.Tensor, dout: torch.Tensor, scale: float | None) -> dict[str, torch.Tensor]:
    leaf = qkv.detach().double().requires_grad_()
    out = packed_attention_reference(leaf, scale=scale)
    (dqkv,) = torch.autograd.grad(out, leaf, dout.double())
    q, k, _ = qkv.double().unbind(2)
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    sums = dqkv.sum((0, 1)).flatten()
    return {"out": out.detach(), "lse": scores.logsumexp(-1), "dqkv": dqkv, "sums": sums}


def check(shape, dtype, device, *, strided=False, scale=None, variants=VARIANTS, module=packed_attention) -> None:
    """Assert agreement with float64; each of dq, dk and dv by itself, so that none hides behind another."""
    qkv = make_qkv(*shape, dtype, device, strided)
    B, L, H, K = shape
    dout = torch.randn(B, L, H * K + 8, dtype=dtype, device=device)[..., 8:].unflatten(2, (H, K))
    want = exact(qkv, dout, scale)
    out, lse = module.forward(qkv, scale)
    assert out.is_contiguous()
    assert lse.dtype == F32
    differ = []
    pairs = [("out", out, want["out"], dtype), ("lse", lse, want["lse"], F32)]
    for variant in variants:
        launch = module.backward_launch(L, K, qkv.element_size(), variant)
        dqkv, sums = module.backward(dout, qkv, out, lse, scale, bias_sums=True, launch=launch)
        assert dqkv.is_contiguous()
        pieces = zip("qkv", dqkv.unbind(2), want["dqkv"].unbind(2), strict=True)
        pairs += [(f"{variant} d{name}", got, expected, dtype) for name, got, expected in pieces]
        pairs.append((f"{variant} sums", sums, want["sums"], dtype))
        bare, none = module.backward(dout, qkv, out, lse, scale, bias_sums=False, launch=launch)
        assert none.numel() == 0
        if variant != "atomic" and not torch.equal(bare, dqkv):
            differ.append(f"{variant} differs when repeated without sums")
    errors = [(name, relative_error(got, expected), kind) for name, got, expected, kind in pairs]
    # Sums over tokens of what nearly cancels are coarser than their terms.
    allowed = {name: TOLERANCE[kind] * (2.5 if "sums" in name or " d" in name else 1) for name, _, kind in errors}
    problems = [f"{name} is off by {error:.1e}" for name, error, _ in errors if not error <= allowed[name]]
    assert not problems + differ, "; ".join(problems + differ)


@pytest.mark.parametrize(
    "shape", [(2, 1, 2, 8), (1, 5, 3, 16), (2, 17, 2, 72), (1, 33, 2, 64), (1, 67, 1, 80)], ids=str
)
def test_agrees_with_float64(shape, device) -> None:
    check(shape, F32, device)


@pytest.mark.parametrize("shape", [(1, 130, 1, 72), (1, 64, 2, 128), (2, 32, 1, 120)], ids=str)
def test_agrees_with_float64_in_bfloat16(shape, device) -> None:
    check(shape, BF16, device)


def test_strided_rows_float16_and_scale(device) -> None:
    check((2, 33, 2, 24), F16, device, strided=True, scale=0.3, variants=["split"])
    check((2, 17, 2, 72), F32, device, strided=True, scale=0.3)


def test_large_scores(device) -> None:
    """exp2(-lse) overflows here, which must reach nothing through keys that do not exist."""
    qkv = make_qkv(1, 17, 2, 16, F32, device)
    qkv[:, :, 0] = 30.0
    qkv[:, :, 1] = -30.0 + 0.01 * qkv[:, :, 1]
    dout = torch.randn(1, 17, 2, 16, device=device)
    out, lse = packed_attention.forward(qkv)
    for variant in VARIANTS:
        launch = backward_launch(17, 16, 4, variant)
        dqkv, _ = packed_attention.backward(dout, qkv, out, lse, launch=launch)
        assert relative_error(dqkv, exact(qkv, dout, None)["dqkv"]) < 2e-3  # scores near 3600 in float32


def test_autograd_and_compile(device) -> None:
    qkv = make_qkv(2, 9, 2, 24, F32, device).requires_grad_()
    dout = torch.randn(2, 9, 2, 24, device=device)
    expected = exact(qkv, dout, None)
    attend = lambda qkv: packed_attention.packed_attention(qkv, backend="triton")  # noqa: E731
    torch.compiler.reset()
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    for fn in (attend, torch.compile(attend, fullgraph=True, backend=compiler)):
        out = fn(qkv)
        (dqkv,) = torch.autograd.grad(out, qkv, dout)
        assert relative_error(out.detach(), expected["out"]) < 1e-5
        assert relative_error(dqkv, expected["dqkv"]) < 1e-5
    (dqkv,) = torch.autograd.grad(attend(qkv).sum(), qkv)  # a gradient without strides
    assert dqkv.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8)])
def test_empty(shape, device) -> None:
    qkv = torch.randn(shape, device=device, requires_grad=True)
    out = packed_attention.packed_attention(qkv, backend="triton")
    out.sum().backward()
    assert out.shape == (shape[0], shape[1], 2, 8)
    assert qkv.grad.shape == shape


def test_pieces_cover_every_head_dim() -> None:
    for K in range(8, 129, 8):
        head, tail = pieces(K)
        assert head + tail >= K
        assert head >= 16
        assert tail == 0 or tail >= 16 > tail - (K - head) or tail < 2 * (K - head)
        assert all(p & p - 1 == 0 for p in (head, tail))
    assert pieces(72) == (64, 16)


def test_is_no_spec() -> None:
    assert "packed_attention" not in discover()


def test_reference_is_sdpa() -> None:
    qkv = torch.randn(2, 5, 3, 2, 7, dtype=torch.float64)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert relative_error(packed_attention.packed_attention(qkv), expected) < 1e-12


@pytest.mark.parametrize(
    ("qkv", "options", "error", "message"),
    [
        ([1], {}, TypeError, "qkv is a list"),
        (torch.ones(1, 2, 3, 1, 8, dtype=torch.int32), {}, TypeError, "dtype torch.int32"),
        (torch.ones(1, 2, 24), {}, ValueError, r"shape \(1, 2, 24\).*\[B, L, 3, H, K\]"),
        (torch.ones(1, 2, 2, 1, 8), {}, ValueError, r"must be \[B, L, 3, H, K\]"),
        (torch.ones(1, 2, 3, 1, 8), {"scale": 0.0}, ValueError, "scale is 0.0; it must be positive"),
        (torch.ones(1, 2, 3, 1, 8), {"scale": "1"}, TypeError, "scale is a str"),
        (torch.ones(1, 2, 3, 1, 8), {"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
        (torch.ones(1, 2, 3, 1, 12), {"backend": "triton"}, ValueError, "K is 12; pass backend='reference'"),
        (torch.ones(1, 2, 3, 1, 136), {"backend": "triton"}, ValueError, "K is 136"),
        (torch.ones(1, 2, 3, 1, 8).double(), {"backend": "triton"}, ValueError, "qkv is torch.float64"),
    ],
)
def test_refusals(qkv, options, error, message) -> None:
    with pytest.raises(error, match=message):
        packed_attention.packed_attention(qkv, **options)


def test_variants_that_cannot_run() -> None:
    qkv = torch.ones(1, 2, 3, 1, 8)
    out, lse = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="variant is 'both'; allowed are 'split'"):
        packed_attention.backward(out, qkv, out, lse, launch=backward_launch(2, 8, 4, "both"))


MUTANTS = {
    "keys-not-masked": (
        "s = tl.where(exists[None, :], s, float(\"-inf\"))", "pass", 1, "out is off",
    ),
    "dq-without-scale": ("dq_h, dq_t = dq_h * scale, dq_t * scale", "pass", 3, "split dq is off"),
    "dk-without-scale": ("dk_h, dk_t = dk_h * scale, dk_t * scale", "pass", 1, "joint dk is off"),
    "k-and-v-swapped": (
        "dk_ptr + H * K, cols * (3 * H * K), exists, dv_h, dv_t",
        "dk_ptr + H * K, cols * (3 * H * K), exists, dk_h, dk_t",
        1,
        "joint dv is off",
    ),
    "ds-without-delta": ("p * (dp - delta[None, :])", "p * dp", 1, "split dk is off"),
    "tail-not-masked": (
        "mask=_columns(K, FIRST, WIDTH, live), other", "mask=live[:, None], other", 1, "out is off",
    ),
    "scratch-begun-by-all": ("if not FIRST:", "if FIRST and not FIRST:", 1, "joint dq is off"),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path, monkeypatch) -> None:
    old, new, count, message = MUTANTS[name]
    source = (KERNELS / "_attention.py").read_text()
    assert source.count(old) == count
    (tmp_path / "mutant_attention.py").write_text(source.replace(old, new))
    public = (KERNELS / "packed_attention.py").read_text().replace("opendit.kernels._attention", "mutant_attention")
    path = tmp_path / "mutant_packed_attention.py"
    path.write_text(public.replace('register("', '(lambda *_: None)("'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mutant_attention", raising=False)
    located = importlib.util.spec_from_file_location(path.stem, path)
    assert located is not None
    assert located.loader is not None
    module = importlib.util.module_from_spec(located)
    located.loader.exec_module(module)
    with pytest.raises(AssertionError, match=message):
        check((1, 67, 2, 24), F32, torch.device("cpu"), module=module, variants=["split", "joint"])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(4, 256, 16, 72), (2, 1024, 16, 72), (1, 333, 16, 72), (2, 256, 12, 64), (1, 512, 8, 128)], ids=str)  # fmt: skip # noqa: E501
def test_no_worse_than_sdpa(shape, variant) -> None:
    B, L, H, K = shape
    qkv = make_qkv(B, L, H, K, BF16, torch.device("cuda"))
    dout = torch.randn(B, L, H, K, dtype=BF16, device="cuda")
    want = exact(qkv, dout, None)
    leaf = qkv.detach().requires_grad_()
    theirs = F.scaled_dot_product_attention(*leaf.transpose(1, 3).unbind(2)).transpose(1, 2)
    (their_grad,) = torch.autograd.grad(theirs, leaf, dout)
    launch = backward_launch(L, K, 2, variant)
    out, lse = packed_attention.forward(qkv)
    dqkv, sums = packed_attention.backward(dout, qkv, out, lse, bias_sums=True, launch=launch)
    assert relative_error(out, want["out"]) <= 1.2 * relative_error(theirs.detach(), want["out"])
    assert relative_error(lse, want["lse"]) < 1e-5
    for mine, other, expected in zip(dqkv.unbind(2), their_grad.unbind(2), want["dqkv"].unbind(2), strict=True):
        assert relative_error(mine, expected) <= 1.2 * relative_error(other, expected)
    assert relative_error(sums, want["sums"]) <= 1.2 * relative_error(their_grad.double().sum((0, 1)).flatten(), want["sums"])  # fmt: skip # noqa: E501
    if variant != "atomic":
        for _ in range(3):
            again, sums_again = packed_attention.backward(dout, qkv, out, lse, bias_sums=True, launch=launch)
            assert torch.equal(again, dqkv)
            assert torch.equal(sums_again, sums)


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31() -> None:
    """2**31 elements and more of qkv; its last sample against the same sample alone."""
    B, L, H, K = 640, 1024, 16, 72
    qkv = torch.randn(B, L, 3, H, K, dtype=BF16, device="cuda")
    assert qkv.numel() > 2**31
    dout = torch.randn(1, L, H, K, dtype=BF16, device="cuda").expand(B, L, H, K)
    out, lse = packed_attention.forward(qkv)
    dqkv, _ = packed_attention.backward(dout, qkv, out, lse)
    out_1, lse_1 = packed_attention.forward(qkv[-1:])
    dqkv_1, _ = packed_attention.backward(dout[-1:], qkv[-1:], out_1, lse_1)
    assert torch.equal(out[-1:], out_1)
    assert torch.equal(dqkv[-1:], dqkv_1)
