"""What ``backend="auto"`` takes: a small measured table, and the lookup in it.

The table holds what was measured and nothing else; every other case is left to torch's own choice ("sdpa").
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opendit.attention import two_pass
from opendit.attention.backends import FLOATS, backend_unavailable, capability_of, constant, traced_as_constant

_log = logging.getLogger("opendit")

# Measured on one H200 with torch 2.11.0+cu130, cuDNN 9.19, flash-attn-4 4.0.0b36, bf16, 16 heads, at lengths 256, 1024,
# 4096 and 16384: benchmarks/results/attention_h200_2026-11-22.json, which benchmarks/attention.py writes. FA4 wins with
# the backward from 1024 tokens on (head_dim 64 and 128; its gradients are wrong at 72), forward alone from 4096 (64) or
# 16384 (128; 72 by an earlier measurement of the same kind). torch's flash kernel lost every cell to cuDNN.
# {head_dim: {backward needed: ((from this length on, backend), ...)}}; the first row that fits and can run is taken.
_Rows = tuple[tuple[int, str], ...]
_CUDNN: _Rows = ((0, "sdpa-cudnn"),)
_MEASURED: Mapping[int, Mapping[bool, _Rows]] = {
    64: {False: ((4096, "flash-attn-4"), *_CUDNN), True: ((1024, "flash-attn-4"), *_CUDNN)},
    72: {False: ((16384, "flash-attn-4"), *_CUDNN), True: _CUDNN},
    128: {False: ((16384, "flash-attn-4"), *_CUDNN), True: ((1024, "flash-attn-4"), *_CUDNN)},
}
_MEASURED_CAPABILITY = (9, 0)
_MEASURED_DTYPE = torch.bfloat16
_CROSSOVERS = sorted({length for modes in _MEASURED.values() for rows in modes.values() for length, _ in rows})


class Choice(NamedTuple):
    """The backend "auto" takes, and why."""

    backend: str
    reason: str


class Case(NamedTuple):
    """The tensors as far as the choice depends on them: constants only, so that it can be made while tracing."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    length: int  # min(Lq, Lk), rounded down to a crossover of the table
    backward: bool
    plain: bool  # neither mask nor dropout
    fits_cudnn: bool  # the batch is not too large for it


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Choice:
    """The backend `attend(..., backend="auto")` takes for these tensors, and the reason.

    It depends on device, dtype (after autocast), head_dim, lengths, whether a gradient is needed, mask, dropout and
    what is installed and switched on. It runs nothing and reads no values: meta tensors do.
    """
    return _choose(describe(q, k, v, mask, dropout_p), *_switches())


def describe(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Case:
    return Case(
        q.device,
        autocast_dtype(q.device.type, q.dtype) or q.dtype,
        constant(q.shape[-1]),
        _crossover(min(q.shape[1], k.shape[1])),
        backward=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        plain=mask is None and not dropout_p,
        fits_cudnn=not (q.shape[0] > two_pass.CUDNN_MAX_BATCH),  # `not` makes a symbolic comparison concrete
    )


def autocast_dtype(device_type: str, dtype: torch.dtype = torch.float32) -> torch.dtype | None:
    """The dtype that autocast, if it is on for this device type, casts `dtype` to; None if it leaves it alone."""
    if dtype not in FLOATS or dtype == torch.float64 or device_type == "meta":
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


_said: dict[str, None] = {}


def choices_made() -> tuple[str, ...]:
    """Every choice "auto" has made in this process, in words, in the order they came up."""
    return tuple(_said)


@traced_as_constant
def choose_and_log(*case: Any) -> str:
    """`Case`'s fields in, the backend's name out; logged once per case at level info."""
    return _choose_once(case, *_switches()).backend


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> str:
    """The kernel that "auto" or "sdpa" stand for, for q, k and v of shape [B, L, H, K] without mask and dropout, before
    they exist; other names stay. With gradients where they are enabled.
    """
    B, L, _, K = shape
    if backend == "auto":
        case = Case(device, dtype, K, _crossover(L), torch.is_grad_enabled(), True, not (B > two_pass.CUDNN_MAX_BATCH))
        backend = choose_and_log(*case)
    if backend == "sdpa":
        like = torch.empty(shape, dtype=dtype, device=device)
        backend = two_pass.resolve(backend, like, like, like)
    return backend


def _crossover(length: int) -> int:
    return max([0, *[c for c in _CROSSOVERS if length >= c]])  # torch.compile knows no `default`


def _switches() -> tuple[bool, bool]:
    """(cuDNN attention is on, deterministic algorithms are asked for)."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    return cudnn, torch.are_deterministic_algorithms_enabled()


@cache
def _choose_once(fields: tuple[Any, ...], cudnn: bool, deterministic: bool) -> Choice:
    case = Case(*fields)
    choice = _choose(case, cudnn, deterministic)
    dtype = str(case.dtype).removeprefix("torch.")
    passes = "forward and backward" if case.backward else "forward only"
    said = (
        f"on {case.device}, {dtype}, head_dim {case.head_dim}, {case.length} or more tokens, {passes}: "
        f"{choice.backend} ({choice.reason})"
    )
    _said.setdefault(said)
    _log.info("attention %s", said)
    return choice


def _choose(case: Case, cudnn: bool, deterministic: bool) -> Choice:
    def problem(name: str) -> str | None:
        if name == "sdpa-cudnn":
            if not case.fits_cudnn:
                return f"the batch is above {two_pass.CUDNN_MAX_BATCH}"
            if not cudnn:
                return "cuDNN attention is switched off in torch.backends.cuda"
            if deterministic:
                return "deterministic algorithms were asked for"
        return backend_unavailable(name, case.device, case.dtype, case.head_dim)

    return pick(case, capability_of(case.device), problem)


def pick(case: Case, capability: tuple[int, int] | None, problem: Callable[[str], str | None]) -> Choice:
    """The lookup itself. `problem(name)` says why a backend cannot be used here, None if it can."""
    if case.device.type != "cuda":
        return Choice("sdpa", f"nothing measured on {case.device.type}: torch's own choice")
    if not case.plain:
        return Choice("sdpa", "mask or dropout: torch's own choice among the kernels that honour them")
    modes = _MEASURED.get(case.head_dim)
    if modes is None or capability != _MEASURED_CAPABILITY or case.dtype != _MEASURED_DTYPE:
        return Choice("sdpa", "nothing measured for this GPU, dtype and head_dim: torch's own choice")
    skipped = ""
    for from_length, name in modes[case.backward]:
        if case.length >= from_length:
            reason = problem(name)
            if reason is None:
                return Choice(name, f"the fastest measured on an H200{skipped}")
            skipped += f"; {name} would be faster, but {reason}"
    return Choice("sdpa", f"torch's own choice{skipped}")
