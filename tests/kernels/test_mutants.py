"""The suite's own test: kernels broken on purpose must fail the very check that the suite uses.

A mutant is the kernel's present source with one line replaced, so it stays in step with the code; a replacement that
no longer matches is an error, not a pass.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import opendit.kernels
from opendit.kernels.spec import discover
from tests.kernels.checking import Case, check

pytest.importorskip("triton")

SPECS = discover()
KERNELS = Path(opendit.kernels.__file__).parent
LM, GR, FUSED = "layernorm_modulate", "gate_residual", "gate_residual_layernorm_modulate"
RMS, FUSED_RMS = "rmsnorm_modulate", "gate_residual_rmsnorm_modulate"
INT32 = {
    kernel: [
        ("b = (pid // P).to(tl.int64)", "b = (pid // P).to(tl.int32)", 2),
        ("token = token.to(tl.int64)", "token = token.to(tl.int32)", walks),
        *[("start = (pid % P).to(tl.int64)", "start = (pid % P).to(tl.int32)", 1)] * (2 - walks),
    ]
    for kernel, walks in [(LM, 2), (GR, 1), (FUSED, 2)]
}


@dataclass(frozen=True)
class Mutant:
    """``edits`` are (file's stem, what is replaced, by what, how often it occurs)."""

    name: str
    kernel: str
    edits: tuple[tuple[str, str, str, int], ...]
    case: Case

    def __str__(self) -> str:
        return f"{self.kernel}-{self.name}"


def mutant(name: str, kernel: str, old: str, new: str, case: Case, file: str = "", count: int = 1) -> Mutant:
    return Mutant(name, kernel, ((file or kernel, old, new, count),), case)


SMALL = Case(3, 5, 12)
MUTANTS = [
    # The bug of the kernel that opendit replaces: the program's number taken for the row's, so sample 0's modulation
    # everywhere.
    *(
        mutant(
            f"{vector}-by-program", kernel, f"{vector}_ptr + b * ", f"{vector}_ptr + (pid // 65536) * ", SMALL, "", n
        )
        for kernel, vector, n in [
            (LM, "scale", 2),
            (LM, "shift", 2),
            (GR, "gate", 2),
            (FUSED, "gate", 2),
            (FUSED, "scale", 2),
        ]
    ),
    *(
        mutant(
            "load-not-masked",
            kernel,
            "mask=tail_mask(live, D, HEAD, TAIL), other=0.0",
            "mask=live[:, None], other=0.0",
            Case(2, 5, 7, layout="sliced"),
            "_rows",
        )
        for kernel in (LM, FUSED)
    ),
    mutant(
        "variance-not-masked",
        LM,
        "    if HEAD + TAIL != D:",
        "    if HEAD + TAIL != TAIL + HEAD:",
        Case(2, 5, 7),
        "_rows",
    ),
    mutant("last-programs-lost", LM, "mask=(p < count)", "mask=(p < 1)", Case(2, 70, 7), "_rows"),
    mutant("rows-counted-twice", LM, "first + walk, L", "first + walk + 1, L", Case(2, 70, 7), "", 2),
    mutant("no-dgate", GR, "dgate_h += tl.sum(dr_h * y_h, 0)", "pass", SMALL),
    mutant("no-dgate", FUSED, "dgate_h += tl.sum(d_h * y_h, 0)", "pass", SMALL),
    mutant("dgate-without-the-norm", FUSED, "tl.sum(d_h * y_h, 0)", "tl.sum(dr_h * y_h, 0)", SMALL),
    mutant("dx-without-the-variance", FUSED, "g_h - g - n_h * gn", "g_h - g", SMALL),
    mutant("dx-without-the-mean", LM, "g_t - g - n_t * gn", "g_t - n_t * gn", SMALL),
    mutant("no-residual-gradient", FUSED, "d_h + dr_h, d_t + dr_t", "d_h, d_t", SMALL),
    mutant("dscale-not-normalized", LM, "tl.sum(do_h * n_h, 0)", "tl.sum(do_h * x_h, 0)", SMALL),
    # RMSNorm's kernels are those of LayerNorm without a mean.
    mutant("with-a-mean", RMS, "x, shift, scale), False)", "x, shift, scale), True)", SMALL),
    mutant("with-a-mean", FUSED_RMS, "eps, out_dtype, False, None)", "eps, out_dtype, True, None)", SMALL),
    *(
        mutant("dx-less-its-mean", kernel, "D)[:, None] if CENTER else 0.0", "D)[:, None]", SMALL, file)
        for kernel, file in ((RMS, LM), (FUSED_RMS, FUSED))
    ),
    mutant("not-normalized-again", RMS, "n_h, n_t = x_h * rstd, x_t * rstd", "n_h, n_t = x_h, x_t", SMALL, LM),
    mutant("not-normalized-again", FUSED_RMS, "r_h * rstd, r_t * rstd", "r_h, r_t", SMALL, FUSED),
    Mutant(
        "half-of-the-squares",
        RMS,
        (
            (
                "_rows",
                "rstd = tl.rsqrt(row_mean(h * h, t * t, D) + EPS)\n    return rstd, h",
                "rstd = tl.rsqrt(row_mean(h * h, t, D) + EPS)\n    return rstd, h",
                1,
            ),
            (LM, '"""out', '"""out', 1),
        ),
        SMALL,
    ),
    mutant("modulated-from-unrounded", FUSED, "downcast(x_h + gate_h * y_h, dtype)", "(x_h + y_h)", SMALL),
]


def load(mutated: Mutant, folder: Path) -> ModuleType:
    """Import the kernel's file with the edits made, from copies in ``folder``."""
    stems = {mutated.kernel, *(file for file, *_ in mutated.edits)}
    module = ModuleType("none")
    for stem in sorted(stems):  # "_rows" sorts before every kernel, which then imports the copy
        source = (KERNELS / f"{stem}.py").read_text()
        for file, old, new, count in mutated.edits:
            if file == stem:
                assert source.count(old) == count, f"{file}: {old!r} occurs {source.count(old)} times, not {count}"
                source = source.replace(old, new)
        for other in stems - {stem}:
            source = source.replace(f"from opendit.kernels.{other} import", f"from mutant_{other} import")
        source = source.replace('register("', 'register("mutant_')
        path = folder / f"mutant_{stem}.py"
        path.write_text(source)
        located = importlib.util.spec_from_file_location(path.stem, path)
        assert located is not None
        assert located.loader is not None
        module = importlib.util.module_from_spec(located)
        sys.modules[path.stem] = module
        located.loader.exec_module(module)
    return module


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mutant], Callable]:
    def public_function(mutated: Mutant) -> Callable:
        for stem in ("_rows", mutated.kernel):
            monkeypatch.setitem(sys.modules, f"mutant_{stem}", None)
        monkeypatch.setattr(torch.library, "custom_op", lambda *_, **__: _NoOperator())
        monkeypatch.setattr(torch.library, "triton_op", lambda *_, **__: _NoOperator())
        return getattr(load(mutated, tmp_path), mutated.kernel)

    return public_function


class _NoOperator:
    """Mutants run eagerly and register nothing."""

    def register_fake(self, fake: Callable) -> None: ...

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None: ...


@pytest.mark.parametrize("mutated", MUTANTS, ids=str)
def test_mutant_is_caught(mutated: Mutant, mutate: Callable, device: torch.device) -> None:
    spec = SPECS[mutated.kernel]
    check(spec, mutated.case, device)
    with pytest.raises(AssertionError, match="is off by"):
        check(spec, mutated.case, device, fn=mutate(mutated))


@pytest.mark.parametrize("kernel", [LM, GR, FUSED, RMS, FUSED_RMS])
def test_unmutated_copy_passes(kernel: str, mutate: Callable, device: torch.device) -> None:
    check(SPECS[kernel], SMALL, device, fn=mutate(Mutant("none", kernel, (("_rows", "L", "L", 0),)[:0], SMALL)))


# Rows 2**30 elements apart in memory that is never touched: offsets pass 2**31 at the cost of a few pages. On wrong
# addresses the interpreter reads what is not there and the process dies, hence a process of its own.
FAR_ROWS = """
import sys, torch
from pathlib import Path
from tests.kernels.test_mutants import INT32, SPECS, Mutant, load
from tests.kernels.checking import as_tuple, gradients, relative_error
kernel, folder, broken = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "broken"
fn = SPECS[kernel].fn
if broken:
    fn = getattr(load(Mutant("int32", kernel, tuple((kernel, *edit) for edit in INT32[kernel]), None), folder), kernel)
D, stride = 8, 2**30
def far():
    rows = torch.empty(2 * stride + D).as_strided((1, 3, D), (3 * stride, stride, 1))
    return rows.copy_(torch.randn(1, 3, D))
spec = SPECS[kernel]
inputs = {k: far() if s == "BLD" else torch.randn(1, D) for k, s in spec.inputs.items() if s in ("BLD", "BD")}
inputs = {k: t.requires_grad_() for k, t in inputs.items()}
near = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
incoming = [far() for _ in spec.outputs]
ours, exact = as_tuple(fn(**inputs, backend="triton")), as_tuple(spec.reference(**near))
ours = [*ours, *gradients(ours, inputs, incoming).values()]
exact = [*exact, *gradients(exact, near, [g.double() for g in incoming]).values()]
sys.exit(max(relative_error(o.detach(), e.detach()) for o, e in zip(ours, exact, strict=True)) > 1e-5)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has a test with a tensor that is really this large")
@pytest.mark.parametrize("kernel", [LM, GR, FUSED])
def test_offsets_pass_2_to_the_31(kernel: str, tmp_path: Path) -> None:
    def returncode(which: str) -> int:
        command = [sys.executable, "-c", FAR_ROWS, kernel, str(tmp_path), which]
        return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode

    assert returncode("sound") == 0
    assert returncode("broken") != 0
