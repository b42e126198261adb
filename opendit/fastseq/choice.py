"""Which method, and what it is expected to cost: bytes, speeds, and the time that a layer waits for others.

    a layer waits ≈ extra operations / GEMM speed + calls · latency + bytes received / link speed

An estimate to rank methods by and to be open about: nothing is taken as hidden behind arithmetic. On GPUs the speeds
are measured once per process group, by everyone together, and the slowest counts; elsewhere they are assumed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from opendit.fastseq import switch
from opendit.fastseq.mesh import groups
from opendit.fastseq.method import Method, Shape, attention_operations, methods
from opendit.fastseq.sequence import Sequence

_TOKENS = 4096  # where a model does not say how many it is built for


class Speeds(NamedTuple):
    """link in bytes/s, gemm in flop/s, latency of one call in s; where they come from."""

    link: float
    gemm: float
    latency: float
    origin: str


# Of gloo between processes of one machine, in round figures.
_CPU = Speeds(2e9, 50e9, 200e-6, "assumed: nothing is measured on CPUs")


def choose(
    name: str,
    heads: int,
    width: int,
    tokens: int | None,
    sp_size: int,
    device: torch.device,
    dtype: torch.dtype,
    excluded: Mapping[str, str],
    regather: bool = False,
) -> Sequence:
    """The sequence parallelism that `name` ("auto" or a method) stands for, with its reasons; every process calls it.

    Args:
        tokens: L that the model is built for; None where it does not say.
        device, dtype: of the parameters.
        excluded: methods that are wrong here, and why.
        regather: whether `fastseq` is to gather its input again in the backward.

    Raises `ValueError` where an excluded method was asked for by name.
    """
    if name in excluded:
        allowed = ", ".join(repr(n) for n in ("auto", *methods()) if n not in excluded)
        raise ValueError(f"sequence_parallel: got {name!r}, but {excluded[name]}; allowed here: {allowed}")
    groups(sp_size)
    speeds = _speeds(device, sp_size)
    itemsize = 2 if device.type == "cuda" else dtype.itemsize
    shape = Shape(tokens or _TOKENS, width, heads, itemsize)
    known = {n: m for n, m in methods().items() if n not in excluded}
    times = {n: waiting(m, shape, sp_size, speeds) for n, m in known.items()}
    chosen = min(known, key=lambda n: (times[n], n)) if name == "auto" else name
    method = known[chosen]
    ring = method.layout(sp_size, heads)
    groups(sp_size, ring)  # made now, by everyone together, not at some forward
    reasons = _reasons(name, method, times, shape, sp_size, ring, speeds, tokens)
    regather = regather and chosen == "fastseq"
    if regather:
        whole = shape.tokens * shape.width * itemsize
        more = whole * (sp_size - 1) / sp_size
        reasons += (
            f"the gathered input is gathered again in the backward: {more / 2**20:.3g} MiB more received per layer and "
            f"sample there, {more / 2**20:.3g} MiB less kept",
        )
    return Sequence(chosen, sp_size, ring, regather=regather, reasons=reasons)


def switching(
    name: str, frames: int, tokens: int, width: int, sp_size: int, device: torch.device, itemsize: int
) -> Sequence:
    """The sequence parallelism of models whose blocks alternate between frames and tokens: layouts are switched.

    Raises `ValueError` where a method was asked for by name: they spread attention, and here every attention has its
    sequence whole. They would send more: 1 + 1/s, 4/s and 2 numbers per pair of blocks, not 2/s.
    """
    if name != "auto":
        raise ValueError(
            f"sequence_parallel: got {name!r}, but this model's blocks alternate between the tokens of a frame and the "
            "frames of a token: sequences are kept whole and no attention is spread; allowed here: 'auto'"
        )
    place, speeds = groups(sp_size), _speeds(device, sp_size)
    each = switch.received(frames, tokens, width, itemsize, sp_size)
    wait = 2 * (speeds.latency + each / speeds.link)
    most, least = -(-frames // sp_size), frames // sp_size
    heads = 1  # of which the arithmetic does not depend
    spatial, temporal = (Shape(n, width, heads, itemsize) for n in (tokens, frames))
    share = (frames * arithmetic(spatial) + tokens * arithmetic(temporal)) / 2 / sp_size / speeds.gemm
    # The frames that a process has beyond an even share, in every other block.
    wait += (most - frames / sp_size) * arithmetic(spatial) / 2 / speeds.gemm
    reasons = (
        f"switch (blocks alternate between frames and tokens), sp {sp_size}, dp {place.dp_size}; ranks that share a "
        f"sample: {place.dp_rank * sp_size} to {place.dp_rank * sp_size + sp_size - 1}, and so on",
        "spatial blocks on whole frames, temporal blocks on all frames of some tokens: one all-to-all a block each "
        f"way, two a pair; for a sample of {frames} frames of {tokens} tokens of {width}, {itemsize} bytes a number: "
        f"received per block {each / 2**20:.3g} MiB forward, {each / 2**20:.3g} MiB backward; frames of a process: "
        f"{most if least == most else f'{least} or {most}'}, tokens: {-(-tokens // sp_size)}",
        f"link {speeds.link / 1e9:.3g} GB/s, {speeds.latency * 1e6:.3g} µs a call ({speeds.origin}); waiting per "
        f"block, forward and backward, nothing hidden: {wait * 1e3:.3g} ms",
        _beside_dp(wait / share, sp_size),
    )
    return Sequence("switch", sp_size, tokens=tokens, reasons=reasons)


def arithmetic(shape: Shape) -> float:
    """Floating point operations of one block, forward and backward, per sample; its linears have 24·L·D² forward."""
    return 3 * 24 * shape.tokens * shape.width**2 + attention_operations(shape)


def waiting(method: Method, shape: Shape, size: int, speeds: Speeds) -> float:
    """Seconds of one block's forward and backward beyond its even share of the arithmetic, per sample."""
    calls, received = sum(method.calls(size, shape.heads)), sum(method.received(shape, size))
    return method.extra(shape, size) / speeds.gemm + calls * speeds.latency + received / speeds.link


def _reasons(
    asked: str,
    method: Method,
    times: dict[str, float],
    shape: Shape,
    size: int,
    ring: int,
    speeds: Speeds,
    tokens: int | None,
) -> tuple[str, ...]:
    place = groups(size, ring)
    forward, backward = method.received(shape, size)
    share = arithmetic(shape) / size / speeds.gemm
    rows = f" ({size // ring} exchange heads × {ring} in a ring)" if 1 < ring < size else ""
    others = ", ".join(f"{n} {t * 1e3:.3g} ms" for n, t in sorted(times.items(), key=lambda item: item[1]))
    built = "" if tokens else " (assumed: the model does not say)"
    slower = times[method.name] / share
    return (
        f"{method.name} ({'chosen by auto' if asked == 'auto' else 'asked for'}), sp {size}{rows}, dp {place.dp_size}; "
        f"ranks that share a sequence: {place.dp_rank * size} to {place.dp_rank * size + size - 1}, and so on",
        f"for {shape.tokens} tokens{built} of {shape.width}, {shape.heads} heads, {shape.itemsize} bytes a number: "
        f"received per layer and sample {forward / 2**20:.3g} MiB forward, {backward / 2**20:.3g} MiB backward",
        f"link {speeds.link / 1e9:.3g} GB/s, {speeds.latency * 1e6:.3g} µs a call, GEMM {speeds.gemm / 1e12:.3g} "
        f"TFLOP/s ({speeds.origin}); waiting per layer, forward and backward, nothing hidden: {others}",
        _beside_dp(slower, size),
    )


def _beside_dp(slower: float, size: int) -> str:
    return (
        f"slower than dp by about {slower:.0%} where there are samples enough: sp {size} with a batch of "
        f"{size} needs the memory of dp with 1 each, and dp waits for nobody inside a layer. Use sp where one "
        "sequence does not fit a device, or there are fewer samples than devices"
    )


_measured: dict[tuple[object, int], Speeds] = {}


def _speeds(device: torch.device, sp_size: int) -> Speeds:
    if device.type != "cuda":
        return _CPU
    key = (dist.group.WORLD, sp_size)
    if key not in _measured:
        _measured[key] = _measure(device, sp_size)
    return _measured[key]


def _measure(device: torch.device, sp_size: int) -> Speeds:
    """By an all-to-all in the sequence group, and a product of the size of a layer's; about 50 ms."""
    group = groups(sp_size).sp
    big = torch.zeros(2**24 // sp_size * sp_size, dtype=torch.bfloat16, device=device)
    small = torch.zeros(sp_size * 128, dtype=torch.bfloat16, device=device)
    a, b = (torch.zeros(4096, 4096, dtype=torch.bfloat16, device=device) for _ in range(2))

    def seconds(call: object, times: int = 5) -> float:
        assert callable(call)
        call()
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / times

    latency = seconds(lambda: dist.all_to_all_single(torch.empty_like(small), small, group=group))
    exchange = seconds(lambda: dist.all_to_all_single(torch.empty_like(big), big, group=group))
    product = seconds(lambda: a @ b)
    found = torch.tensor([latency, exchange, product], dtype=torch.float64, device=device)
    # Everyone must choose alike, and the slowest is who is waited for.
    dist.all_reduce(found, dist.ReduceOp.MAX)
    latency, exchange, product = found.tolist()
    received = big.numel() * 2 * (sp_size - 1) / sp_size
    return Speeds(received / max(exchange - latency, 1e-6), 2 * 4096**3 / product, latency, "measured")
