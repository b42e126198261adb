"""What runs when on a GPU while one attention layer is spread, for benchmarks/sequence_parallel.py --only timeline.

A layer's forward and its backward are profiled once each, and every kernel is kept with its stream, start and end.
`wire_us` is how long a transfer's kernel was there, waiting for the other process included; `hidden_us` how long
something else was computed meanwhile. Before the clock starts everything has been launched: a kernel that spins holds
the GPU until then, so the host is not what is seen. On the CPU operators stand for kernels.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import synchronize
from opendit.fastseq.collectives import split_tokens

Row = dict[str, Any]
Span = tuple[float, float]

METHODS = ("fastseq", "fastseq overlapped", "ulysses")
SPIN = 20_000_000  # cycles: 10 ms
# What a kernel does, by a part of its name; the first that fits.
KINDS = (
    ("wire", ("nccl", "gloo", "c10d", "all_to_all", "allgather")),
    ("attention", ("flash", "fmha", "attention", "sdpa", "bmha", "cudnn")),
    ("product", ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "addmm", "linear")),
    ("copy", ("memcpy", "memset", "copy", "cat", "elementwise")),
)


def timeline_rows(layer: nn.Module, tokens: int) -> Iterator[Row]:
    """For each method a row of the forward and one of the backward, seen from process 0."""
    weight: Tensor = next(layer.parameters())
    whole = torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    dist.broadcast(whole, 0)
    x = split_tokens(whole, dist.get_world_size())
    dout = torch.randn_like(x)
    inputs = [x.requires_grad_(), *layer.parameters()]
    for method in METHODS:
        for _ in range(3):
            torch.autograd.grad(_spread(layer, method, x), inputs, dout)
        outs: list[Tensor] = []
        passes: dict[str, Callable[[], object]] = {
            "forward": lambda method=method, outs=outs: outs.append(_spread(layer, method, x)),  # type: ignore[misc]
            "backward": lambda outs=outs: torch.autograd.grad(outs.pop(), inputs, dout),  # type: ignore[misc]
        }
        for name, call in passes.items():
            kernels = kernels_of(call)
            row = {"part": "timeline", "method": method, "pass": name, "tokens": tokens, "kernels": kernels}
            yield row | hidden(kernels)


def _spread(layer: Any, method: str, x: Tensor) -> Tensor:
    out: Tensor = layer.spread(method, x)
    return out


def kernels_of(call: Callable[[], object]) -> list[Row]:
    """Name, kind, stream, start and end in µs since the first, in order."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        if cuda:
            torch.cuda._sleep(SPIN)
        call()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    found = [e for e in events if e.get("cat") in wanted and "spin" not in e["name"]]
    begin = min((e["ts"] for e in found), default=0.0)
    kernels = [
        {
            "name": e["name"][:60],
            "kind": kind(e["name"]),
            "stream": e.get("args", {}).get("stream", e["tid"]),
            "start_us": round(e["ts"] - begin, 2),
            "end_us": round(e["ts"] + e["dur"] - begin, 2),
        }
        for e in found
    ]
    return sorted(kernels, key=lambda k: k["start_us"])


def kind(name: str) -> str:
    lower = name.lower()
    return next((what for what, parts in KINDS if any(part in lower for part in parts)), "other")


def hidden(kernels: Sequence[Row]) -> dict[str, float]:
    """How long something was on the wire, how long something else was computed meanwhile, and all of it, in µs."""
    wire, rest = (
        union([(k["start_us"], k["end_us"]) for k in kernels if (k["kind"] == "wire") == on_it])
        for on_it in (True, False)
    )
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in wire for b in rest)
    whole = max((k["end_us"] for k in kernels), default=0.0)
    return {"wire_us": sum(b - a for a, b in wire), "hidden_us": both, "whole_us": whole}


def union(spans: Sequence[Span]) -> list[Span]:
    """The same time in spans that don't overlap."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged
