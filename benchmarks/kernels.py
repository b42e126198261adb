"""Times every kernel against the eager formula and torch.compile of it, forward and backward.

    python benchmarks/kernels.py                  # all kernels, DiT-XL's three shapes, fp32 and bf16 residual
    python benchmarks/kernels.py --smoke          # one tiny case; without a GPU, in Triton's interpreter

Every case is checked against float64 first, values and gradients, and stops the run when it is wrong. The three
contenders run in one process over the same rotating inputs. Bandwidth is the fewest bytes that the step can move (each
tensor once) over its time, and its share is of a large copy timed in the same run.

Shapes: B batch, L tokens, D hidden. The residual stream is fp32 or bf16; everything else is bf16, as under autocast,
where the formula's fp32 result is cast to bf16 for the linear layer that follows.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, copy_bandwidth, summary, time_graph, write_results
from opendit.kernels.spec import KernelSpec, discover

SHAPES = [(256, 256, 1152), (64, 1024, 1152), (1, 16384, 1152)]
RESIDUALS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = 8e-3  # relative to float64, in the norm: two roundings to bf16
Run = Callable[..., tuple[Tensor, ...]]


def make_inputs(spec: KernelSpec, shape: tuple[int, int, int], residual: torch.dtype) -> dict[str, Tensor]:
    """Random inputs, [B, D] ones as chunks of one tensor; a norm's own affine is in the residual's dtype."""
    B, L, D = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chunks = iter(torch.randn(B, 6 * D, device=device, dtype=torch.bfloat16).chunk(6, 1))
    inputs = {}
    for name, kind in spec.inputs.items():
        sizes = spec.shape(name, B, L, D)
        if kind == "BD":
            inputs[name] = next(chunks)
        elif kind.startswith("BL"):
            inputs[name] = torch.randn(sizes, device=device, dtype=residual if name == "x" else torch.bfloat16)
        elif name in spec.usual:
            inputs[name] = torch.randn(sizes, device=device, dtype=torch.float32 if kind == "LK?" else residual)
    return {name: t.detach().requires_grad_(name not in spec.constants) for name, t in inputs.items()}


def contenders(spec: KernelSpec, compiled: bool) -> dict[str, Run]:
    """What is timed: name to a function of the inputs."""

    def ours(**inputs: Tensor) -> tuple[Tensor, ...]:
        options = {"out_dtype": torch.bfloat16} if "modulated" in spec.outputs else {}
        return _tuple(spec.fn(**inputs, **options, backend="triton"))

    def eager(**inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = _tuple(spec.upstream(**inputs))
        return (*outputs[:-1], outputs[-1].bfloat16()) if "modulated" in spec.outputs else outputs

    found: dict[str, Run] = {"ours": ours, "eager": eager}
    if compiled:
        torch.compiler.reset()
        found["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    return found


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _leaves(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in inputs.values() if t.requires_grad]


def worst_error(spec: KernelSpec, run: Run, inputs: dict[str, Tensor]) -> float:
    """The largest relative error of any output or gradient against the reference in float64."""
    exact_inputs = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in inputs.items()}
    exact = _tuple(spec.reference(**exact_inputs))
    outputs = run(**inputs)
    incoming = [torch.randn_like(o) for o in outputs]
    grads = torch.autograd.grad(outputs, _leaves(inputs), incoming)
    exact_grads = torch.autograd.grad(exact, _leaves(exact_inputs), [g.double() for g in incoming])
    worst = 0.0
    for found, truth in zip((*outputs, *grads), (*exact, *exact_grads), strict=True):
        error = ((found.double() - truth).norm() / truth.norm()).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def moved(spec: KernelSpec, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> dict[str, int]:
    """The fewest bytes that a forward and a backward can move."""
    tensors = {**inputs, **dict(zip(spec.outputs, outputs, strict=True))}
    forward = sum(t.numel() * t.element_size() for t in tensors.values())
    backward = [tensors[name.removeprefix("d_")] for name in spec.backward_moves]
    return {"forward": forward, "backward": sum(t.numel() * t.element_size() for t in backward)}


def backward_calls(run: Run, sets: list[dict[str, Tensor]]) -> list[Callable[[], Any]]:
    """One repeatable backward for each input set."""
    calls = []
    for inputs in sets:
        outputs = run(**inputs)
        incoming = [torch.randn_like(o) for o in outputs]
        calls.append(partial(torch.autograd.grad, outputs, _leaves(inputs), incoming, retain_graph=True))
    return calls


def measure(
    spec: KernelSpec, shape: tuple[int, int, int], residual: str, bandwidth: float, compiled: bool
) -> list[dict[str, Any]]:
    """Rows of one case, one for each direction and contender; refuses a wrong kernel."""
    # Enough sets that the smallest exceed the cache several times over.
    sets = [make_inputs(spec, shape, RESIDUALS[residual]) for _ in range(8)]
    runs = contenders(spec, compiled)
    error = worst_error(spec, runs["ours"], sets[0])
    if not error <= ALLOWED:
        raise SystemExit(f"{spec.name} {shape} {residual}: error {error:.1e} exceeds {ALLOWED:.0e}; nothing timed")
    sizes = moved(spec, sets[0], runs["ours"](**sets[0]))
    samples: dict[tuple[str, str], list[float]] = {}
    # There and back: where outputs lie in memory is worth several percent, and so is who comes first.
    for who, run in (*runs.items(), *reversed(runs.items())):
        # Autograd runs a backward on its forward's stream, and only a side stream can be captured.
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        with torch.cuda.stream(stream):
            directions = {"forward": [partial(run, **i) for i in sets], "backward": backward_calls(run, sets)}
            for direction, calls in directions.items():
                samples.setdefault((who, direction), []).extend(time_graph(calls, stream=stream))
    rows = []
    for (who, direction), found in samples.items():
        ms = summary(found)
        rate = sizes[direction] / ms["median"] * 1e3
        rows.append(
            {
                "kernel": spec.name,
                "direction": direction,
                "B_L_D": list(shape),
                "residual": residual,
                "contender": who,
                "ms": ms,
                "bytes": sizes[direction],
                "tb_per_s": rate / 1e12,
                "share_of_copy": rate / bandwidth,
                "error": error if who == "ours" else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each direction of a case."""
    for direction in ("forward", "backward"):
        ms = {r["contender"]: r["ms"]["median"] for r in rows if r["direction"] == direction}
        ours = next(r for r in rows if r["direction"] == direction and r["contender"] == "ours")
        ratios = "  ".join(f"{who} {ms[who]:.4f} ({ms[who] / ms['ours']:.2f}x)" for who in ms if who != "ours")
        name = f"{ours['kernel']:33s} {direction:8s} {ours['B_L_D']!s:17s} {ours['residual']}"
        print(
            f"{name}  ours {ms['ours']:.4f} ms  {ours['tb_per_s']:.2f} TB/s"
            f"  {100 * ours['share_of_copy']:.0f} % of copy  {ratios}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="*", choices=sorted(discover()), help="default: all")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--smoke", action="store_true", help="one tiny shape, no torch.compile, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        parser.error("there is no CUDA device; --smoke runs one tiny case without")

    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # a compiled backward is replayed
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    path = None
    facts = {"copy_tb_per_s": bandwidth / 1e12, "timing": "CUDA graph replays over rotating inputs, ms per call"}
    for name, spec in discover().items():
        if args.kernels and name not in args.kernels:
            continue
        for shape in [(2, 3, 24)] if args.smoke else SHAPES:
            for residual in RESIDUALS:
                case = measure(spec, shape, residual, bandwidth, not (args.smoke or args.no_compile))
                show(case)
                rows += case
        if not args.smoke:  # after every kernel, for the next one may take the process down
            path = write_results("kernels", rows, args.out, path, **facts)
    if path:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
