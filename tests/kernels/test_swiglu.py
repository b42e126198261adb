"""SwiGLU beyond what every kernel is tested for: far from zero, two halves that don't fit, and mutants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import opendit.kernels.swiglu as sound
from tests.kernels.checking import Case, check
from tests.mutating import load_mutant

pytest.importorskip("triton")


def test_far_from_zero(device: torch.device) -> None:
    a = torch.tensor([-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4], device=device)
    x = torch.cat([a, torch.full_like(a, 2.0)])[None, None].requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = sound.swiglu(x, backend="triton")
    expected = F.silu(exact[..., :8]) * exact[..., 8:]
    torch.testing.assert_close(found.double(), expected)
    ones = torch.ones_like(found)
    grads = torch.autograd.grad(found, x, ones), torch.autograd.grad(expected, exact, ones.double())
    torch.testing.assert_close(grads[0][0].double(), grads[1][0])


def test_halves_of_one_width() -> None:
    with pytest.raises(ValueError, match=r"swiglu: x has shape \(2, 3, 5\); it must be \[B, L, 2·F\]"):
        sound.swiglu(torch.zeros(2, 3, 5))


MUTANTS = {
    "gate and value swapped": ("downcast(a * _sigmoid(a) * b,", "downcast(b * _sigmoid(b) * a,"),
    "value of the next row": ("b = _load(x_ptr, x_at + N, live)", "b = _load(x_ptr, x_at + 2 * N, live)"),
    "slope without its second term": ("s * (1 + a * (1 - s))", "s"),
    "halves of dx swapped": ("dx_ptr + x_at + N, downcast(dh * a * s", "dx_ptr + x_at + N, downcast(dh * b * s"),
    "rows too short": ("row[:, None] * (2 * N) + column", "row[:, None] * N + column"),
    "columns lost": ("column = tl.program_id(1) * COLUMNS +", "column = tl.program_id(1) * 0 +"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels are for the interpreter")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTANTS[name]
    count = Path(sound.__file__).read_text().count(old)
    module = load_mutant(sound, [(old, new, count)], tmp_path, monkeypatch)
    case = Case(3, 5, 700)
    check(sound.SPEC, case, torch.device("cpu"))
    with pytest.raises(AssertionError, match="is off by"):
        check(sound.SPEC, case, torch.device("cpu"), fn=module.swiglu)
