"""precision="fp8" in models: which blocks multiply in 8 bits, how far that is from fp32, and what is refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import opendit
from opendit.patch import adaln
from tests.comparing import twin
from tests.tiny_models import TINY, Tiny, UserDiT, randomise

WHOLE = {"precision": "fp8", "kernels": "triton", "fusion": "block", "attention": "sdpa-flash"}


def model(dim: int = 32) -> nn.Module:
    return randomise(UserDiT(size=4, dim=dim, heads=2, depth=2), 0).eval()


def results(net: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 4, 4, generator=generator, requires_grad=True)
    out = net(x, torch.tensor([3, 700]), torch.tensor([1, 2]))
    net.zero_grad()
    out.backward(torch.randn(out.shape, generator=generator))
    return {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients together; the root mean square over tensors of ‖a − e‖/‖e‖."""
    assert found.keys() == exact.keys()
    each = [
        (found[n] - exact[n]).norm() / exact[n].norm() for n in exact if exact[n].norm() > 0 and "qkv.bias" not in n
    ]
    return torch.stack(each).square().mean().sqrt().item()


def test_blocks_multiply_in_8_bits(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    whole = adaln.adaln_block
    monkeypatch.setattr(adaln, "adaln_block", lambda *a: (seen.append(a[3]), whole(*a))[1])
    plain = model()
    exact = results(plain)
    with torch.autocast("cpu", torch.bfloat16):
        sixteen = error(results(twin(plain)), exact)
    fast = opendit.accelerate(twin(plain), WHOLE)
    eight = error(results(fast), exact)
    assert [s.fp8 for s in seen] == [True, True]
    assert 2 * sixteen < eight < 0.1
    said = io.StringIO()
    opendit.explain(fast, file=said)
    assert "products and their inputs' gradients are of rows in 8 bits" in " ".join(said.getvalue().split())
    assert "no products in 8 bits" not in said.getvalue()
    opendit.restore(fast)
    assert all(torch.equal(a, b) for a, b in zip(results(fast).values(), exact.values(), strict=True))


def test_odd_widths_stay_in_16_bits_and_it_is_said(interpreter: None) -> None:
    plain = model(dim=24)
    fast = opendit.accelerate(twin(plain), WHOLE)
    assert error(results(fast), results(plain)) < 0.03
    said = io.StringIO()
    opendit.explain(fast, file=said)
    assert "no products in 8 bits: widths must be multiples of 16, not 24" in " ".join(said.getvalue().split())


def test_fused_in_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: got 'fp8' with fusion='adaln'"):
        opendit.accelerate(model(), {"precision": "fp8", "fusion": "adaln"})


def test_without_the_hardware_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from opendit.kernels import fp8

    monkeypatch.setattr(fp8, "INTERPRETING", False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(
        ValueError, match=r"precision: 'fp8' can't run here: they run on GPUs of compute capability 9.0"
    ):
        opendit.accelerate(model(), {"precision": "fp8"})


@pytest.mark.parametrize("tiny", [t for t in TINY if not t.whole], ids=lambda t: t.name)
def test_models_without_whole_blocks_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="precision: got 'fp8', but no block of this model is fused as one function"):
        opendit.accelerate(tiny.build(), {"precision": "fp8"})


@pytest.mark.parametrize("kernels", ["reference", {"gelu": "reference"}], ids=str)
def test_kernels_that_no_block_is_one_function_of_are_refused(kernels: object) -> None:
    with pytest.raises(ValueError, match=r"precision: got 'fp8' with kernels='reference' for .*gelu"):
        opendit.accelerate(model(), {"precision": "fp8", "kernels": kernels})


def test_verify_does_not_certify_what_it_can_not_compare() -> None:
    with pytest.raises(ValueError, match=r"booster_cfg: got precision='fp8'"):
        opendit.verify(
            model(), (torch.randn(2, 4, 4, 4), torch.tensor([3, 7]), torch.tensor([1, 2])), {"precision": "fp8"}
        )
