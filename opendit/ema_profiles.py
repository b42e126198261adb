"""Which averages of the parameters over time are kept, and the mathematics of power-function averages.

    fixed decay d    e_t = d·e_{t−1} + (1 − d)·θ_t                          weights fall geometrically, from now back
    power function   e_t = β_t·e_{t−1} + (1 − β_t)·θ_t,  β_t = (1 − 1/t)^(γ+1)
                     = Σ_τ θ_τ · ∫_{τ−1}^{τ} p_{γ,t}(s) ds,  p_{γ,t}(s) = (γ+1)·s^γ / t^(γ+1) on [0, t]

t counts the steps taken, from 1. The width of a power function is its standard deviation relative to t,

    σ_rel = (γ+1)^(1/2) · (γ+2)^(−1) · (γ+3)^(−1/2)           (0.05 ↔ γ = 16.97, 0.10 ↔ γ = 6.94)

Snapshots of two power functions, taken now and then, span a space of weightings in which any other one is found by
least squares: minimise ∫ (p_{γ,t} − Σ_i x_i·p_i)² with Σ_i x_i = 1, so that what stays constant comes out as it is, by
solving A·x + λ = b, A_ij = ⟨p_i, p_j⟩, b_i = ⟨p_i, p_{γ,t}⟩, with

    ⟨p_{γa,ta}, p_{γb,tb}⟩ = (γa+1)(γb+1) / ((γa+γb+1)·max(ta, tb)) · (ta/tb)^(γb if ta < tb else −γa)

Source of the power functions, of σ_rel and of the synthesis: Karras et al. 2023, "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2), arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import cast

import torch

# At γ = 0 everything since the start weighs the same.
WIDEST = 1 / math.sqrt(12)


@dataclass(frozen=True, kw_only=True)
class EMA:
    """Which averages to keep; each takes 4 bytes per parameter, divided over the processes.

    Args:
        decays: one or several, each between 0 and 1.
        warmup: decays start small: min(decay, (1 + t) / (10 + t)) at step t.
        stds: widths σ_rel of power-function averages, e.g. `(0.05, 0.10)`, for synthesis after training; between 0
            and 1/√12 = 0.288.
        snapshot_every: after how many taken steps the power-function averages are written; 0: never.
        snapshots: the folder they are written to, one file per process (safetensors).

    Raises:
        ValueError, TypeError: a value that is not allowed.
    """

    decays: float | Sequence[float] = ()
    warmup: bool = False
    stds: float | Sequence[float] = ()
    snapshot_every: int = 0
    snapshots: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, widest, open_ends in (("decays", 1.0, "between 0 and 1"), ("stds", WIDEST, "between 0 and 0.288")):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), widest, open_ends))
        if not self.decays and not self.stds:
            raise ValueError("ema: got neither decays nor stds; allowed: at least one of them, such as decays=0.9999")
        if not isinstance(self.warmup, bool):
            raise TypeError(f"warmup: got {self.warmup!r}; allowed: True or False")
        if not isinstance(self.snapshot_every, int) or isinstance(self.snapshot_every, bool) or self.snapshot_every < 0:
            raise ValueError(f"snapshot_every: got {self.snapshot_every!r}; allowed: a number of steps, or 0 for never")
        if (self.snapshot_every > 0) != (self.snapshots is not None) or (self.snapshot_every and not self.stds):
            raise ValueError(
                f"snapshots: got {self.snapshots!r} with snapshot_every={self.snapshot_every} and stds={self.stds}; "
                "allowed: all three, or neither of the first two. Snapshots are of power-function averages"
            )
        if self.snapshots is not None:
            object.__setattr__(self, "snapshots", fspath(self.snapshots))

    @classmethod
    def of(cls, source: object) -> EMA | None:
        """The description that `source` stands for: itself, one or several decays, or None."""
        if source is None or isinstance(source, EMA):
            return source
        if isinstance(source, (int, float, list, tuple)):
            return EMA(decays=cast("float | Sequence[float]", source))
        raise TypeError(f"ema: got {source!r}; allowed: a decay such as 0.9999, several, an opendit.EMA, or None")

    def profiles(self) -> dict[str, Fixed | Power]:
        """Each average by its label: a decay as Python writes it, or `std` and the width."""
        fixed = {repr(d): Fixed(d, self.warmup) for d in cast("tuple[float, ...]", self.decays)}
        return {**fixed, **{f"std{s!r}": Power(gamma_of(s)) for s in cast("tuple[float, ...]", self.stds)}}


@dataclass(frozen=True)
class Fixed:
    """A decay that stays, once warm."""

    decay: float
    warmup: bool = False

    def weight(self, t: int) -> float:
        """What the parameters of step `t` (from 1) weigh."""
        return 1 - (min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay)


@dataclass(frozen=True)
class Power:
    """A power function of the time since the start."""

    gamma: float

    def weight(self, t: int) -> float:
        """What the parameters of step `t` (from 1) weigh: 1 − (1 − 1/t)^(γ+1)."""
        return -math.expm1((self.gamma + 1) * math.log1p(-1 / t)) if t > 1 else 1.0


def std_of(gamma: float) -> float:
    """σ_rel of the power function with exponent `gamma`."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(std: float) -> float:
    """The exponent γ ≥ 0 of the power function with σ_rel = `std`, which falls as γ grows."""
    low, high = 0.0, 1.0
    while std_of(high) > std:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if std_of(middle) > std else (low, middle)
    return (low + high) / 2


def product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """⟨p_a, p_b⟩ of two power functions, each (t, γ)."""
    (ta, ga), (tb, gb) = a, b
    ratio = (ta / tb) ** (gb if ta < tb else -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * max(ta, tb))


def synthesis(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> list[float]:
    """The factor of each stored average (t, γ) in the best approximation of the wanted one; they add up to 1."""
    rows = [[*(product(a, b) for b in stored), 1.0] for a in stored]
    system = torch.tensor([*rows, [1.0] * len(stored) + [0.0]], dtype=torch.float64)
    right = torch.tensor([*(product(a, wanted) for a in stored), 1.0], dtype=torch.float64)
    return cast("list[float]", torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:-1, 0].tolist())


def _numbers(name: str, given: object, widest: float, allowed: str) -> tuple[float, ...]:
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    found: list[float] = []
    for value in several:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < widest:
            raise ValueError(f"ema: {name}: got {value!r}; allowed: numbers {allowed}")
        if float(value) in found:
            raise ValueError(f"ema: {name}: got {value!r} twice; allowed: each once")
        found.append(float(value))
    return tuple(found)
