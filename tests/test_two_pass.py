"""Attention's forward and backward as a pair: against the formula in fp64, and which backends have one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from opendit.attention import BACKENDS, attend, backend_unavailable, choice, choose_backend, two_pass
from tests.test_attention import TOLERANCE, formula, inputs, relative

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _forget_what_was_chosen():
    choice._choose_once.cache_clear()
    yield
    choice._choose_once.cache_clear()


def errors(backend: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Relative errors of the pair's output and gradients."""
    q, k, v = (t.detach() for t in (q, k, v))
    torch.manual_seed(1)
    dout = torch.randn(q.shape).to(q.device, q.dtype)
    out, saved = two_pass.forward(q, k, v, backend)
    assert not out.requires_grad
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert bool(saved) == two_pass.paired(backend, q.device)
    assert all(type(t) is Tensor for t in saved)
    grads = two_pass.backward(dout, q, k, v, out, saved, backend)
    assert all((g.shape, g.dtype) == (q.shape, q.dtype) for g in grads)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected = formula(*exact)
    wanted = (expected, *torch.autograd.grad(expected, exact, dout.double()))
    return {n: relative(g, w) for n, g, w in zip(("out", "dq", "dk", "dv"), (out, *grads), wanted, strict=True)}


SHAPES = [{"packed": True}, {}, {"B": 1, "H": 1, "K": 72}, {"Lq": 129, "Lk": 129, "K": 8, "packed": True}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa", "sdpa-math", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_on_cpu(backend: str, dtype: torch.dtype, shape: dict) -> None:
    for name, error in errors(backend, *inputs(dtype=dtype, **shape)).items():
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa-math"])
def test_is_attend(backend: str) -> None:
    q, k, v = inputs(packed=True)
    dout = torch.randn_like(q)
    expected = attend(q, k, v, backend=backend)
    grads = torch.autograd.grad(expected, (q, k, v), dout)
    out, saved = two_pass.forward(q, k, v, backend)
    assert torch.equal(out, expected)
    for ours, theirs in zip(two_pass.backward(dout, q, k, v, out, saved, backend), grads, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["sdpa-flash", "sdpa-math"])
def test_works_inside_a_backward(backend: str) -> None:
    """Where gradients are switched off, as they are in a function's own backward."""
    q, k, v = (t.detach() for t in inputs())
    out, saved = two_pass.forward(q, k, v, backend)
    expected = two_pass.backward(out, q, k, v, out, saved, backend)
    with torch.no_grad():
        found = two_pass.backward(out, q, k, v, out, saved, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mutant", ["q and k swapped", "gradients swapped", "another output", "another lse"])
def test_the_check_catches_a_wrong_pair(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = two_pass.backward

    def wrong(dout, q, k, v, out, saved, backend):
        if mutant == "q and k swapped":
            q, k = k, q
        if mutant == "another output":
            out = out * 0.9
        if mutant == "another lse":
            saved = [saved[0] + 0.1]
        dq, dk, dv = right(dout, q, k, v, out, saved, backend)
        return (dk, dq, dv) if mutant == "gradients swapped" else (dq, dk, dv)

    monkeypatch.setattr(two_pass, "backward", wrong)
    assert max(errors("sdpa-flash", *inputs(dtype=BF16)).values()) > TOLERANCE[BF16]


def test_which_are_paired() -> None:
    on_cpu = {name for name in BACKENDS if two_pass.paired(name, CPU)}
    on_cuda = {name for name in BACKENDS if two_pass.paired(name, CUDA)}
    assert on_cpu == {"sdpa-flash"}
    assert on_cuda == {"sdpa-cudnn", "sdpa-flash", "flash-attn-4"}
    assert not any(two_pass.paired(name, torch.device("meta")) for name in BACKENDS)


def like(K: int = 72, device: torch.device = CUDA) -> SimpleNamespace:
    """What `resolve` may look at, of tensors on a GPU that need not be there."""
    return SimpleNamespace(device=device, shape=(2, 64, 3, K), transpose=lambda a, b: None)


@pytest.mark.parametrize(
    ("torchs_choice", "expected"), [(0, "sdpa"), (1, "sdpa-flash"), (2, "sdpa"), (3, "sdpa-cudnn"), (4, "sdpa")]
)
def test_resolve(torchs_choice: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend

    assert (SDPBackend.FLASH_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value) == (1, 3)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: torchs_choice)
    assert two_pass.resolve("sdpa", like(), like(), like()) == expected


def test_resolve_leaves_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: pytest.fail("torch was asked"))
    for name in BACKENDS:
        if name != "sdpa":
            assert two_pass.resolve(name, like(), like(), like()) == name
    assert two_pass.resolve("sdpa", like(device=CPU), like(device=CPU), like(device=CPU)) == "sdpa"
    assert two_pass.resolve("sdpa", like(K=12), like(K=12), like(K=12)) == "sdpa"


def test_choose_backend_on_cpu() -> None:
    for name in ("sdpa", *BACKENDS):
        assert choose_backend(name, CPU, BF16, (2, 256, 16, 72)) == name
    assert choose_backend("auto", CPU, BF16, (2, 256, 16, 72)) == "sdpa"
    assert any("on cpu, bfloat16, head_dim 72" in said for said in choice.choices_made())


@pytest.mark.parametrize("length", [1, 256, 1023, 1024, 4096, 100_000])
@pytest.mark.parametrize("gradients", [True, False])
def test_choose_backend_asks_what_attend_would(length: int, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same case as for tensors, before they exist."""
    seen = []
    monkeypatch.setattr(choice, "choose_and_log", lambda *case: seen.append(choice.Case(*case)) or "sdpa-math")
    with torch.set_grad_enabled(gradients):
        for B in (2, 70_000):
            assert choose_backend("auto", torch.device("meta"), BF16, (B, length, 1, 64)) == "sdpa-math"
            q = torch.empty(B, length, 1, 64, dtype=BF16, device="meta", requires_grad=True)
            assert seen.pop() == choice.describe(q, q, q, None, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa-cudnn", "sdpa-flash", "flash-attn-4"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"B": 4, "Lq": 256, "Lk": 256, "H": 16, "K": 72},
        {"B": 2, "Lq": 1000, "Lk": 1000, "H": 12, "K": 64},
        {"B": 1, "Lq": 133, "Lk": 133, "H": 8, "K": 128},
    ],
    ids=lambda s: f"{s['Lq']}x{s['K']}",
)
def test_gpu_pairs_err_no_more_than_torch(backend: str, dtype: torch.dtype, shape: dict) -> None:
    problem = backend_unavailable(backend, CUDA, dtype, shape["K"])
    if problem is not None:
        pytest.skip(problem)
    q, k, v = inputs(dtype=dtype, device="cuda", packed=True, **shape)
    ours = errors(backend, q, k, v)
    theirs = errors("sdpa", q, k, v)  # torch's own forward and backward, by autograd
    for name, error in ours.items():
        assert error <= 1.2 * theirs[name], f"{name}: {error:.2e}, torch's own {theirs[name]:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa-cudnn", "sdpa-flash"])
def test_gpu_pairs_share_no_memory(backend: str) -> None:
    """An operator may not return one tensor twice, nor a view of another."""
    q, k, v = (t.detach() for t in inputs(B=2, Lq=64, Lk=64, K=64, dtype=BF16, device="cuda", packed=True))
    out, saved = two_pass.forward(q, k, v, backend)
    storages = [t.untyped_storage()._cdata for t in (q, out, *saved)]
    assert len(set(storages)) == len(storages)


@pytest.mark.gpu
def test_gpu_choose_backend_is_a_pair_that_runs() -> None:
    for name in ("auto", "sdpa"):
        for shape in ((2, 256, 16, 72), (2, 1024, 16, 64), (1, 256, 4, 128)):
            backend = choose_backend(name, CUDA, BF16, shape)
            assert two_pass.paired(backend, CUDA)
            B, L, H, K = shape
            tensors = inputs(B=B, Lq=L, Lk=L, H=H, K=K, dtype=BF16, device="cuda", packed=True)
            assert max(errors(backend, *tensors).values()) <= TOLERANCE[BF16]
    assert not two_pass.paired(choose_backend("sdpa", CUDA, torch.float32, (2, 256, 16, 72)), CUDA)


def test_pairs_with_wrong_gradients_are_refused(monkeypatch):
    """As `attend` refuses them; what a block computes itself goes through here instead."""
    cpu, shape = torch.device("cpu"), (2, 256, 16, 72)
    anywhere = {name: dataclasses.replace(b, devices=frozenset({"any"})) for name, b in two_pass.BACKENDS.items()}
    monkeypatch.setattr(two_pass, "BACKENDS", anywhere)
    assert "64 or 128" in two_pass.refuses("flash-attn-4", cpu, torch.bfloat16, shape, True)
    assert two_pass.refuses("flash-attn-4", cpu, torch.bfloat16, shape, False) is None
    assert two_pass.refuses("flash-attn-4", cpu, torch.bfloat16, (2, 256, 16, 64), True) is None
    assert "65535" in two_pass.refuses("sdpa-cudnn", cpu, torch.bfloat16, (65536, 4, 2, 64), True)
