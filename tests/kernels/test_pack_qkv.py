"""The packed qkv gradient: what it was given, in its places, and the sums of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import opendit.kernels.pack_qkv as sound
from opendit.kernels.pack_qkv import pack_qkv_reference
from opendit.kernels.spec import discover
from tests.mutating import load_mutant

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def make(M: int, N: int, dtype: torch.dtype, device: torch.device, layout: str = "dense") -> list[torch.Tensor]:
    if layout == "strided":  # each with a row stride of its own
        return [torch.randn(M, N + pad, device=device).to(dtype)[:, pad:] for pad in (1, 8, 3)]
    if layout == "columns":
        return [torch.randn(N, M, device=device).to(dtype).t() for _ in range(3)]
    return [torch.randn(M, N, device=device).to(dtype) for _ in range(3)]


def check(grads: list[torch.Tensor], module: ModuleType = sound) -> None:
    packed, sums = module.pack_qkv(*grads)
    assert (packed.dtype, sums.dtype) == (grads[0].dtype, F32)
    assert packed.is_contiguous()
    for i, name in enumerate("qkv"):
        assert torch.equal(packed[:, i], grads[i]), f"d{name} is not what was given"
    expected, exact = pack_qkv_reference(*(g.double() for g in grads))
    assert torch.equal(packed.double(), expected)
    # Against what rounding in float32 leaves of sums whose terms may cancel.
    size = expected.square().sum(0).sqrt().norm()
    assert (sums - exact).norm() <= 1e-6 * size, "the sums are off"
    bare, none = module.pack_qkv(*grads, want_sum=False)
    assert none.numel() == 0
    assert torch.equal(bare, packed)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 24), (131, 100), (70, 1152)], ids=str)
def test_values_and_sums(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(make(*shape, dtype, device))


@pytest.mark.parametrize("layout", ["strided", "columns"])
def test_layouts(layout: str, device: torch.device) -> None:
    check(make(37, 20, BF16, device, layout))


@pytest.mark.parametrize("shape", [(0, 8), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int], device: torch.device) -> None:
    packed, sums = sound.pack_qkv(*make(*shape, F32, device))
    assert packed.shape == (shape[0], 3, shape[1])
    assert torch.equal(sums, torch.zeros(3 * shape[1], device=device))


def test_repeats_are_bit_identical(device: torch.device) -> None:
    grads = make(*((100_001, 1152) if device.type == "cuda" else (150, 20)), BF16, device)
    first = sound.pack_qkv(*grads)
    for _ in range(20 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, sound.pack_qkv(*grads), strict=True))


def test_is_no_spec() -> None:
    assert "pack_qkv" not in discover()


MUTANTS = {
    "q-and-k-swapped": ("live, q_h, q_t, N, HEAD", "live, k_h, k_t, N, HEAD", 1, "dq is not"),
    "strides-of-q-for-all": ("row * v_stride", "row * q_stride", 1, "dv is not"),
    "sum-lost-rows": ("k0 += tl.sum(k_h, 0)", "k0 = tl.sum(k_h, 0)", 1, "sums are off"),
    "sum-without-its-tail": ("v1 += tl.sum(v_t, 0)", "pass", 1, "sums are off"),
    "sum-of-another": ("store_sums(part + N, k0, k1", "store_sums(part + N, q0, q1", 1, "sums are off"),
    "sum-of-one-program": ("part_ptr + pid.to(tl.int64) * 3 * N", "part_ptr + pid.to(tl.int64) * 0", 1, "sums are off"),
    "rows-counted-twice": ("tl.minimum(first + walk, M)", "tl.minimum(first + walk + 1, M)", 1, "sums are off"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, count, message = MUTANTS[name]
    module = load_mutant(sound, [(old, new, count)], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        check(make(131, 20, F32, torch.device("cpu"), "strided"), module)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    M, N = 621_379, 1152
    assert 3 * M * N > 2**31
    grads = [torch.randn(M, N, dtype=BF16, device="cuda") for _ in range(3)]
    packed, sums = sound.pack_qkv(*grads)
    assert torch.equal(packed, torch.stack(grads, dim=1))
    exact = packed.sum(0, dtype=torch.float64).flatten()
    assert (sums - exact).norm() <= 1e-5 * M**0.5 * len(exact) ** 0.5
