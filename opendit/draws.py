"""Random numbers that depend on a seed, a step and a sample, and on nothing else.

    numbers of sample i at step s  =  Philox4x32-10(key = seed, counter = (block, s, i, stream))

A block is four numbers of 32 bits. Nothing is carried from one draw to the next, so the same sample of the same step
gets the same numbers on any device, in any batch, on any number of processes, and after any resume. Philox is from
Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; its known answers are in the tests.

Normal numbers come from the inverse of their distribution (Wichura 1988, AS 241) in fp64, of which every operation is
rounded exactly by IEEE 754, the logarithm included, which is written out: CPUs and GPUs give the same bits, as long as
nobody fuses multiplications with additions. Hence `noise` refuses to be traced by `torch.compile`.

    B samples, n numbers for each; `ids` [B] int64 are the samples' numbers, such as `ResumableSampler.ids`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

# What each of the functions below draws from, so that no two of them share numbers; `uniform` adds the caller's.
_NOISE, _TIMESTEPS, _DROPS, _UNIFORM = 0, 1, 2, 3
_ORDER = 255


def noise(
    shape: Sequence[int],
    seed: int,
    step: int,
    ids: Tensor | Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers [B, *shape], of `dtype` on `device` (where `ids` are, by default).

    Args:
        shape: of one sample.
        seed: 0 to 2⁶⁴ − 1.
        step: 0 to 2³² − 1.
        ids: [B], which sample each row is for, 0 to 2⁵⁶ − 1. Equal ids get equal numbers.

    There are 2³² values up to ±6.34, exact to 1e-15 of themselves before they are rounded to `dtype`.
    Raises `ValueError` and `TypeError` for what is out of range, `RuntimeError` under `torch.compile`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "noise: was called inside torch.compile, which may round it otherwise; draw it outside and pass it in"
        )
    bits = _bits(shape, seed, step, ids, device, _NOISE)
    return _normal((bits.double() + 0.5) * 2.0**-32).to(dtype)


def uniform(
    shape: Sequence[int],
    seed: int,
    step: int,
    ids: Tensor | Sequence[int],
    device: torch.device | str | None = None,
    stream: int = 0,
) -> Tensor:
    """Uniform numbers of [0, 1), multiples of 2⁻²⁴, fp32 [B, *shape]: for augmentation and whatever else is drawn.

    `stream` (0 to 251) tells apart what is drawn for one sample in one step; the rest is as in `noise`.
    """
    _check_int("stream", stream, _ORDER - _UNIFORM)
    return (_bits(shape, seed, step, ids, device, _UNIFORM + stream) >> 8).float() * 2.0**-24


def timesteps(
    high: int, seed: int, step: int, ids: Tensor | Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """A whole number of [0, high) for each sample, int64 [B]; `high` is 1 to 2³¹.

    Each has probability 1/high up to 2⁻³².
    """
    _check_int("high", high, 2**31 + 1, least=1)
    return (_bits((), seed, step, ids, device, _TIMESTEPS) * high) >> 32


def label_drop(
    probability: float, seed: int, step: int, ids: Tensor | Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Whether each sample's label is to be dropped, bool [B], with the given probability."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability!r}; allowed: 0 to 1")
    return _bits((), seed, step, ids, device, _DROPS).double() < probability * 2.0**32


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of `size` samples in `epoch`: a permutation of 0 … size − 1, int64, the same everywhere.

    Samples are sorted by a number of 64 bits; ties, for which the odds are size²/2⁶⁵, stay in order.
    """
    words = philox4x32(torch.arange(size), epoch, 0, _ORDER << 24, seed)
    # The top bit is left out, so that int64 sorts them as they are.
    return torch.argsort((words[0] >> 1 << 32) | words[1], stable=True)


def philox4x32(
    c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int, key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters (c0, c1, c2, c3), each 32 bits in int64, under a key of 64 bits."""
    zero = torch.zeros_like(c0)
    x0, x1, x2, x3 = c0, zero + c1, zero + c2, zero + c3
    k0, k1 = key & _LOW, key >> 32
    for _ in range(10):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of x·m, both below 2³², without leaving int64: x is taken in halves."""
    upper, lower = (x >> 16) * m, (x & 0xFFFF) * m  # both below 2⁴⁸
    total = upper + (lower >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (lower & 0xFFFF)


def _bits(
    shape: Sequence[int],
    seed: int,
    step: int,
    ids: Tensor | Sequence[int],
    device: torch.device | str | None,
    stream: int,
) -> Tensor:
    """32 random bits for each element of [B, *shape], in int64."""
    _check_int("seed", seed, 2**64)
    _check_int("step", step, 2**32)
    ids = _check_ids(ids, device)
    count = math.prod(shape)
    blocks = -(-count // 4)
    if blocks > _LOW:
        raise ValueError(f"shape: got {tuple(shape)}; allowed: up to 2³⁴ numbers a sample")
    block = torch.arange(blocks, device=ids.device).expand(len(ids), blocks)
    words = philox4x32(block, step, ids[:, None] & _LOW, (ids[:, None] >> 32) | (stream << 24), seed)
    return torch.stack(words, dim=-1).view(len(ids), 4 * blocks)[:, :count].reshape(len(ids), *shape)


def _check_int(name: str, value: object, end: int, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; allowed: an int from {least} to {end - 1}")
    if not least <= value < end:
        raise ValueError(f"{name}: got {value}; allowed: {least} to {end - 1}")


def _check_ids(ids: Tensor | Sequence[int], device: torch.device | str | None) -> Tensor:
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids: got {ids.dtype} of shape {tuple(ids.shape)}; allowed: whole numbers [B], one a sample")
    ids = ids.long()
    if ids.device.type == "cpu" and len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < 2**56):
        # On a GPU looking would make the host wait.
        raise ValueError(f"ids: got {int(ids.min())} to {int(ids.max())}; allowed: 0 to 2⁵⁶ − 1")
    return ids if device is None else ids.to(device, non_blocking=True)


# AS 241's coefficients, highest power first: the middle, |p − ½| ≤ 0.425, and the tails up to r = 5, p = 1.4e-11.
_MIDDLE = (
    (
        *(2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457),
        *(13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    ),
    (
        *(5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867),
        *(5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
    ),
)
_TAIL = (
    (
        *(7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258),
        *(3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    ),
    (
        *(1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459),
        *(0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
    ),
)


def _normal(p: Tensor) -> Tensor:
    """The x of which a standard normal number is smaller with probability p, 2⁻³³ ≤ p ≤ 1 − 2⁻³³; fp64."""
    q = p - 0.5
    middle = q * _ratio(0.180625 - q * q, *_MIDDLE)
    r = torch.sqrt(-_log(torch.minimum(p, 1.0 - p))) - 1.6
    tail = _ratio(r, *_TAIL)
    return torch.where(q.abs() <= 0.425, middle, torch.where(q < 0, -tail, tail))


def _ratio(x: Tensor, numerator: Sequence[float], denominator: Sequence[float]) -> Tensor:
    return _polynomial(x, numerator) / _polynomial(x, denominator)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = value * x + c
    return value


def _log(x: Tensor) -> Tensor:
    """ln x of normal fp64 x > 0: with x = m·2ᵏ, ½√2 ≤ m < √2, s = (m − 1)/(m + 1):  k·ln 2 + 2·(s + s³/3 + s⁵/5 + …).

    |s| < 0.1716, so what is left out after s¹⁹ is below 1e-17.
    """
    bits = x.view(torch.int64)
    k = (bits >> 52) - 1023
    m = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64)
    large = m > math.sqrt(2)
    m, k = torch.where(large, m * 0.5, m), torch.where(large, k + 1, k)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(s * s, [1.0 / n for n in range(19, 0, -2)])
    return k.double() * math.log(2) + 2.0 * s * series
