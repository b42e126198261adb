"""q and k normalised and turned, beyond what every kernel is tested for: each norm, either kind of pairs, any table."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import opendit.kernels.qk_norm_rope as sound
from opendit.kernels._rows import Tile
from tests.kernels.checking import Case, check
from tests.mutating import load_mutant

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WEIGHTS, BIASES, TABLE = ("q_weight", "k_weight"), ("q_bias", "k_bias"), ("cos", "sin")
# A head dim that is no power of two, and samples, tokens and heads that are all odd numbers of something.
CASE = (3, 5, 36)


def case(norm: str | None, interleaved: bool, rotate: bool, affine: bool = True, **more) -> Case:
    names = (*(WEIGHTS + BIASES if affine and norm else ()), *(TABLE if rotate else ()))
    return Case(*CASE, optional=names, kwargs={"norm": norm, "interleaved": interleaved}, **more)


EVERY = list(itertools.product((None, "rms", "layer"), (True, False), (True, False)))


@pytest.mark.parametrize(("norm", "interleaved", "rotate"), EVERY)
def test_every_way(norm: str | None, interleaved: bool, rotate: bool, device: torch.device) -> None:
    check(sound.SPEC, case(norm, interleaved, rotate), device)
    if norm is not None:
        check(sound.SPEC, case(norm, interleaved, rotate, affine=False, layout="sliced"), device)
        check(sound.SPEC, Case(*CASE, optional=("k_weight", "q_bias"), kwargs={"norm": norm}), device)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F16), (F32, BF16)], ids=str)
def test_low_precision(dtypes: tuple[torch.dtype, torch.dtype], interleaved: bool, device: torch.device) -> None:
    for norm in ("rms", "layer"):
        check(sound.SPEC, case(norm, interleaved, True, dtype=dtypes[0], mod_dtype=dtypes[1]), device)


def test_any_launch_gives_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile, interleaved in ((Tile(1, 2, 1 << 20, 1, 1), True), (Tile(4, 8, 5, 4, 2), False)):
        for name in ("forward_tile", "backward_tile"):
            monkeypatch.setattr(sound, name, lambda head_dim, tile=tile: tile)
        check(sound.SPEC, case("rms", interleaved, True), device)


def test_parts_of_one_packed_projection(device: torch.device) -> None:
    """Read where they are, and outputs of two dtypes."""
    qkv = torch.randn(2, 7, 3, 2, 12, device=device)
    q, k, _ = qkv.unbind(2)
    table = torch.randn(2, 7, 12, device=device)
    options = {"cos": table[0], "sin": table[1], "norm": "rms"}
    for found, expected in zip(
        sound.qk_norm_rope(q, k.half(), **options, backend="triton"),
        sound.qk_norm_rope_reference(q.double(), k.half().double(), **options),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    q, k = sound.qk_norm_rope(q, k.half(), **options, backend="triton")
    assert (q.dtype, k.dtype) == (F32, F16)
    q, k = sound.qk_norm_rope(q, k, **options, out_dtype=BF16, backend="triton")
    assert q.dtype == k.dtype == BF16


def by_hand(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, turned by angles [L, K/2]."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_it_is_a_rotation(interleaved: bool, device: torch.device) -> None:
    angles = torch.randn(5, 6, device=device, dtype=torch.float64)
    q, k = torch.randn(2, 3, 5, 2, 12, device=device, dtype=torch.float64)
    wide = angles.repeat_interleave(2, 1) if interleaved else angles.repeat(1, 2)
    for x, found in zip(
        (q, k),
        sound.qk_norm_rope(q, k, cos=wide.cos(), sin=wide.sin(), norm=None, interleaved=interleaved),
        strict=True,
    ):
        torch.testing.assert_close(found, by_hand(x, angles, interleaved))


def test_agrees_with_torchs_norms(device: torch.device) -> None:
    q, k = torch.randn(2, 3, 5, 2, 12, device=device, dtype=torch.float64)
    for name, norm in (("rms", torch.nn.RMSNorm), ("layer", torch.nn.LayerNorm)):
        of_q, of_k = (norm(12, eps=1e-3, device=device, dtype=torch.float64) for _ in range(2))
        for p in (*of_q.parameters(), *of_k.parameters()):
            torch.nn.init.normal_(p)
        options = {"q_weight": of_q.weight, "k_weight": of_k.weight, "norm": name, "eps": 1e-3}
        if name == "layer":
            options |= {"q_bias": of_q.bias, "k_bias": of_k.bias}
        found = sound.qk_norm_rope(q, k, **options)
        torch.testing.assert_close(found[0], of_q(q))
        torch.testing.assert_close(found[1], of_k(k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm is 'batch'; allowed are None, 'rms', 'layer'"),
        ({"norm": None, "k_weight": torch.ones(4)}, "k_weight is given with norm=None"),
        ({"cos": torch.ones(3, 4)}, "cos is given alone; pass cos and sin"),
        ({"sin": torch.ones(3, 4)}, "sin is given alone; pass cos and sin"),
        ({"cos": torch.ones(3, 4, requires_grad=True), "sin": torch.ones(3, 4)}, "cos requires a gradient"),
        ({"cos": torch.ones(2, 4), "sin": torch.ones(3, 4)}, "one row per token"),
        ({"q_weight": torch.ones(3)}, "the head dim"),
        ({"k": torch.ones(2, 3, 1, 4)}, "the shape of q"),
        ({"q": torch.ones(2, 3, 2, 5)}, "with K even"),
        ({"q": torch.ones(2, 3, 8)}, r"it must be \[B, L, H, K\]"),
        ({"q": torch.ones(1, 1, 1, 8194), "k": torch.ones(1, 1, 1, 8194), "backend": "triton"}, "8192"),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    given = {"q": torch.ones(2, 3, 2, 4), "k": torch.ones(2, 3, 2, 4), **change}
    with pytest.raises(ValueError, match=message):
        sound.qk_norm_rope(**given)


LAYER, RMS, NONE = case("layer", True, True), case("rms", True, True), case(None, True, True)
MUTANTS = {
    "turned the other way": ("a * cos_a - b * sin_a, b * cos_b", "a * cos_a + b * sin_a, b * cos_b", NONE),
    "one sine for both": ("b * cos_b + a * sin_b", "b * cos_b + a * sin_a", NONE),
    "gradient not turned back": ("g_b * cos_b - g_a * sin_a", "g_b * cos_b + g_a * sin_a", NONE),
    "gradient with the other's sine": ("g_a * cos_a + g_b * sin_b", "g_a * cos_a + g_b * sin_a", NONE),
    "dx without the norm": ("u_a - u - n_a * un", "u_a - u", RMS),
    "dx without the mean": ("u_b - u - n_b * un", "u_b - n_b * un", LAYER),
    "norm of half a head": ("(tl.sum(a * a, 1) + tl.sum(b * b, 1)) / K", "(tl.sum(a * a, 1) * 2) / K", RMS),
    "variance of what is not there": ("b = tl.where(there, b - mean, 0.0)", "b = b - mean", LAYER),
    "dx without the weight": ("u_a, u_b = g_a * weight_a, g_b * weight_b", "u_a, u_b = g_a, g_b", RMS),
    "rounds lost": ("q1_a += s1_a", "q1_a = s1_a", case("rms", True, True)),
    "k with q's weight": (
        "            k_ptr, k_weight_ptr, k_bias_ptr",
        "            k_ptr, q_weight_ptr, k_bias_ptr",
        RMS,
    ),
    "sums of q and k mixed up": ("_store_sums(part + 2 * K, k1_a", "_store_sums(part + 2 * K, q1_a", RMS),
    "bias for weight": ("return g_a * n_a, g_b", "return g_a, g_b", RMS),
    "halves overlap": ("K // 2 + column, downcast(b", "K // 2 - column, downcast(b", case(None, False, True)),
    "heads as tokens": ("q_at = b * q_stride_b + token * q_stride_l", "q_at = b * q_stride_b + head * q_stride_l", RMS),
    "one row of the table for all": ("_load_pairs(cos_ptr, token * K", "_load_pairs(cos_ptr, token * 0", NONE),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, of = MUTANTS[name]
    small = lambda head_dim: Tile(8, 16, 4, 4, 1)  # noqa: E731  (several rounds and programs)
    count = Path(sound.__file__).read_text().count(old)
    assert 1 <= count <= 2
    module: ModuleType = load_mutant(sound, [(old, new, count)], tmp_path, monkeypatch)
    for each in (sound, module):
        monkeypatch.setattr(each, "forward_tile", small)
        monkeypatch.setattr(each, "backward_tile", small)
    check(sound.SPEC, of, torch.device("cpu"))
    with pytest.raises(AssertionError, match="is off by"):
        check(sound.SPEC, of, torch.device("cpu"), fn=module.qk_norm_rope)


def test_what_is_compiled_for_training_is_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """By "auto", where it would be Triton; by name, and without gradients, the kernels are traced."""
    q, k = torch.randn(2, 2, 5, 3, 8).requires_grad_().unbind(0)
    traced = []

    def operator(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        traced.append(inputs)
        return inputs[0], inputs[1]

    monkeypatch.setattr(sound, "resolve", lambda *_: "triton")
    monkeypatch.setattr(sound, "forward_op", operator)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expected = sound.qk_norm_rope_reference(q, k)
    assert all(map(torch.equal, sound.qk_norm_rope(q, k), expected))
    assert not traced
    sound.qk_norm_rope(q, k, backend="triton")
    with torch.no_grad():
        sound.qk_norm_rope(q, k)
    assert len(traced) == 2
