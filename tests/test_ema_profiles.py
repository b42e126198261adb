"""Which averages there are, and the mathematics of power functions against EDM2's known values and direct averages."""

from __future__ import annotations

import math

import pytest
import torch

import opendit
from opendit.ema_profiles import EMA, WIDEST, Fixed, Power, gamma_of, product, std_of, synthesis


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_widths_of_the_paper(std, gamma):
    assert gamma_of(std) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0, 6.94, 50.0, 1e4])
def test_width_and_exponent_are_each_others_inverse(gamma):
    assert gamma_of(std_of(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


def test_the_widest_is_the_mean_of_everything():
    assert std_of(0.0) == pytest.approx(WIDEST)
    assert [Power(0.0).weight(t) for t in (1, 2, 3)] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("gamma", [0.5, 6.94])
def test_the_update_weighs_each_step_by_the_integral_of_its_profile(gamma):
    t = 20
    direct = [((s / t) ** (gamma + 1) - ((s - 1) / t) ** (gamma + 1)) for s in range(1, t + 1)]
    values = torch.zeros(t, dtype=torch.float64)
    for s in range(1, t + 1):
        values += Power(gamma).weight(s) * (torch.eye(t, dtype=torch.float64)[s - 1] - values)
    assert torch.allclose(values, torch.tensor(direct, dtype=torch.float64), atol=1e-14)
    mean = sum(w * s for s, w in enumerate(direct, 1))
    spread = math.sqrt(sum(w * (s - mean) ** 2 for s, w in enumerate(direct, 1))) / t
    assert spread == pytest.approx(std_of(gamma), rel=0.02)


@pytest.mark.parametrize(
    ("a", "b"), [((30.0, 6.94), (20.0, 16.97)), ((20.0, 2.0), (20.0, 5.0)), ((7.0, 1.0), (9.0, 0.5))]
)
def test_inner_products_against_quadrature(a, b):
    n = 200_000
    s = (torch.arange(n, dtype=torch.float64) + 0.5) / n * min(a[0], b[0])
    p, q = ((g + 1) * s**g / t ** (g + 1) for t, g in (a, b))
    assert product(a, b) == pytest.approx(((p * q).sum() * min(a[0], b[0]) / n).item(), rel=1e-6)
    assert product(a, b) == pytest.approx(product(b, a), rel=1e-12)


@pytest.mark.parametrize(("snapshots_taken", "allowed"), [(20, 1e-2), (40, 1.5e-3)])
@pytest.mark.parametrize("std", [0.03, 0.05, 0.07, 0.12, 0.2])
@pytest.mark.parametrize("upto", [1000, 400])
def test_synthesis_is_the_average_kept_directly(snapshots_taken, allowed, std, upto):
    every = upto // snapshots_taken
    generator = torch.Generator().manual_seed(0)
    path = 30 + torch.randn(upto, 50, dtype=torch.float64, generator=generator).cumsum(0)

    def direct(profile: Power) -> list[torch.Tensor]:
        values, kept = torch.zeros(50, dtype=torch.float64), []
        for t in range(1, upto + 1):
            values = values + profile.weight(t) * (path[t - 1] - values)
            kept.append(values)
        return kept

    stored = [Power(gamma_of(s)) for s in (0.05, 0.10)]
    snapshots = {
        (t, p.gamma): kept[t - 1] for p in stored for kept in [direct(p)] for t in range(every, upto + 1, every)
    }
    factors = synthesis(list(snapshots), (upto, gamma_of(std)))
    found = sum(f * s for f, s in zip(factors, snapshots.values(), strict=True))
    wanted = direct(Power(gamma_of(std)))[-1]
    assert ((found - wanted).norm() / (wanted - path[-1]).norm()).item() <= allowed
    assert sum(factors) == pytest.approx(1, abs=1e-9)


def test_warm_up():
    assert [Fixed(0.99, warmup=True).weight(t) for t in (1, 10, 10_000)] == pytest.approx([9 / 11, 9 / 20, 0.01])
    assert Fixed(0.99).weight(1) == pytest.approx(0.01)


def test_descriptions():
    assert EMA.of(0.999) == EMA(decays=(0.999,))
    assert list(EMA(decays=[0.999, 0.9999], stds=(0.05,)).profiles()) == ["0.999", "0.9999", "std0.05"]
    assert opendit.BoosterConfig(ema=(0.9, 0.99)).ema == EMA(decays=(0.9, 0.99))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "neither decays nor stds"),
        ({"decays": 1.0}, ValueError, "decays: got 1.0; allowed: numbers between 0 and 1"),
        ({"decays": (0.9, 0.9)}, ValueError, "got 0.9 twice"),
        ({"decays": "0.9"}, ValueError, "decays: got '0.9'"),
        ({"stds": 0.3}, ValueError, "stds: got 0.3; allowed: numbers between 0 and 0.288"),
        ({"decays": 0.9, "warmup": 10}, TypeError, "warmup: got 10"),
        ({"stds": 0.1, "snapshot_every": 5}, ValueError, "snapshots: got None with snapshot_every=5"),
        (
            {"decays": 0.9, "snapshot_every": 5, "snapshots": "x"},
            ValueError,
            "Snapshots are of power-function averages",
        ),
        ({"stds": 0.1, "snapshot_every": -1}, ValueError, "snapshot_every: got -1"),
    ],
)
def test_bad_descriptions_say_what_is_allowed(options, error, says):
    with pytest.raises(error, match=says):
        EMA(**options)
