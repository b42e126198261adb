"""Attention backends side by side: forward and forward+backward, medians, one process.

    python benchmarks/attention.py                    # every fused backend that runs here, the table's cells
    python benchmarks/attention.py --backends sdpa-cudnn flash-attn-4 --head-dims 72
    python benchmarks/attention.py --smoke            # one tiny cell, on the CPU too: does the script work

q, k, v are strided views of a packed [B, L, 3, H, K], as DiT makes them, bf16, 16 heads. Before a backend is timed
its output and gradients are compared with the formula in fp64; one that fails is reported, not timed, and the exit
status is 1. TFLOP/s count 4·B·H·L²·K forward and 3.5 times that with the backward.
The table behind ``backend="auto"`` (opendit/attention/choice.py) is written from these results.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import time_events, versions, write_results
from opendit.attention import attend, backend_names, backend_unavailable, choose

CELLS = ((256, 256), (64, 1024), (4, 4096), (1, 16384))  # (B, L)
HEAD_DIMS = (64, 72, 128)
HEADS = 16
PACKAGES = ("flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
INNER = 5  # calls a sample
# The unfused ones hold the [L, L] scores: at 16384 tokens that is 17 GB a copy.
UNFUSED = ("sdpa-math", "reference")
TOLERANCE = 2e-2  # relative, a few bf16 roundings; a wrong formula is off by 0.1 and more


def main() -> int:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.smoke:
        sys.exit("no CUDA device; --smoke runs one tiny cell without one")
    cells, head_dims = (((2, 64),), (24,)) if args.smoke else (CELLS, args.head_dims)
    unfused = ("reference",) if args.smoke else ()
    names = args.backends or [n for n in backend_names() if n not in UNFUSED or n in unfused]

    results: list[dict[str, Any]] = []
    failed = False
    for head_dim in head_dims:
        usable = []
        for name in names:
            reason = backend_unavailable(name, device, torch.bfloat16, head_dim)
            errors = {} if reason else wrong(name, head_dim, device)
            failed |= bool(errors)
            if reason or errors:
                print(f"head_dim {head_dim}, {name}: left out: {reason or f'relative errors {errors}'}")
            else:
                usable.append(name)
        for batch, length in cells:
            row = measure_cell(usable, batch, length, head_dim, device)
            results += row
            print_cell(row)
    if not args.smoke:
        cudnn = torch.backends.cudnn.version()
        print(f"\nwritten to {write_results('attention', results, versions=versions(*PACKAGES), cudnn=cudnn)}")
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=backend_names(), metavar="NAME", help="default: fused ones")
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS), metavar="K")
    parser.add_argument("--smoke", action="store_true", help="one tiny cell, on the CPU too; nothing is written")
    return parser.parse_args()


def make(batch: int, length: int, head_dim: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """([q, k, v] as strided leaves, dout)."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, 3, HEADS, head_dim, device=device, dtype=torch.bfloat16)
    # Leaves each: the sum of the three gradients into one packed tensor is not attention's work.
    return [qkv[:, :, i].requires_grad_() for i in range(3)], torch.randn_like(qkv[:, :, 0])


def wrong(name: str, head_dim: int, device: torch.device) -> dict[str, float]:
    """Relative errors against the formula in fp64 that are above the tolerance; empty if it is right."""
    qkv, dout = make(2, 333, head_dim, device)
    out = attend(*qkv, backend=name)
    got = (out, *torch.autograd.grad(out, qkv, dout))
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = attend(*exact, backend="reference")
    wanted = (out, *torch.autograd.grad(out, exact, dout.double()))
    errors = {
        what: ((g.double() - w).norm() / w.norm()).item()
        for what, g, w in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True)
    }
    return {what: error for what, error in errors.items() if not error <= TOLERANCE}


def measure_cell(
    names: list[str], batch: int, length: int, head_dim: int, device: torch.device
) -> list[dict[str, Any]]:
    qkv, dout = make(batch, length, head_dim, device)
    auto_both = choose(*qkv).backend
    with torch.no_grad():
        auto_forward = choose(*qkv).backend
    flops = 4.0 * batch * HEADS * length**2 * head_dim
    row = []
    for name in names:

        def forward(name: str = name) -> None:
            with torch.no_grad():
                attend(*qkv, backend=name)

        def both(name: str = name) -> None:
            torch.autograd.grad(attend(*qkv, backend=name), qkv, dout)

        entry: dict[str, Any] = {"batch": batch, "length": length, "head_dim": head_dim, "backend": name}
        try:
            forward_ms, both_ms = median_ms(forward), median_ms(both)
        except torch.OutOfMemoryError:
            row.append(entry | {"left_out": "out of memory"})
            continue
        row.append(
            entry
            | {
                "forward_ms": forward_ms,
                "both_ms": both_ms,
                "forward_tflops": flops / forward_ms * 1e-9,
                "both_tflops": 3.5 * flops / both_ms * 1e-9,
                "auto_forward": auto_forward == name,
                "auto_both": auto_both == name,
            }
        )
    return row


def print_cell(row: list[dict[str, Any]]) -> None:
    timed = [entry for entry in row if "both_ms" in entry]
    if not timed:
        return
    print(f"\nB={row[0]['batch']}, L={row[0]['length']}, {HEADS} heads, head_dim {row[0]['head_dim']}")
    print(f"  {'backend':<16}{'forward ms':>12}{'TFLOP/s':>9}{'fwd+bwd ms':>12}{'TFLOP/s':>9}")
    best = {what: min(entry[what] for entry in timed) for what in ("forward_ms", "both_ms")}
    for entry in row:
        if "left_out" in entry:
            print(f"  {entry['backend']:<16}{entry['left_out']}")
            continue
        marks = [
            mark
            for mark, true in (
                ("fastest forward", entry["forward_ms"] == best["forward_ms"]),
                ("fastest fwd+bwd", entry["both_ms"] == best["both_ms"]),
                ("auto forward", entry["auto_forward"]),
                ("auto fwd+bwd", entry["auto_both"]),
            )
            if true
        ]
        print(
            f"  {entry['backend']:<16}{entry['forward_ms']:>12.3f}{entry['forward_tflops']:>9.0f}"
            f"{entry['both_ms']:>12.3f}{entry['both_tflops']:>9.0f}  {', '.join(marks)}"
        )


def median_ms(function: Callable[[], None]) -> float:
    """The median over 20 samples of INNER calls each, so that launches queue up and hide the host's time."""

    def several() -> None:
        for _ in range(INNER):
            function()

    return statistics.median(time_events(several)) / INNER


if __name__ == "__main__":
    sys.exit(main())
