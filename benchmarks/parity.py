"""Whether an accelerated model trains as the plain one does: nobody wants the speed of a wrong result.

Judged against the unaccelerated model in fp32 (without TF32), by what unaccelerated bf16 autocast is off by:

    gradients   of step 0, every parameter: ‖g − g_fp32‖/‖g_fp32‖; in total the root mean square over parameters
    losses      of the first steps of training: the mean of |loss − loss_fp32|/|loss_fp32|

Both may be at most SLACK times bf16's own; losses that close to fp32's that only luck decides (FLOOR) always pass. A
bf16 residual stream is an arithmetic of its own: what has one is held against the plain model that has one too, the one
with bf16 weights, and both figures are recorded. So are products in 8 bits, and nothing unaccelerated has those: their
gradients may be FP8 off, which a wrong one is not near, and their losses twice bf16's. What decides whether fp8 trains
is benchmarks/loss_curves.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import opendit
from benchmarks.training import AUTOCAST, BF16_WEIGHTS, FP32, Training, Variant, clean_up

SLACK = 1.2
# Two correct bf16 runs part by about this much over twenty steps of AdamW.
FLOOR = 5e-4
# Products of rows in 8 bits are off by 3e-2 each.
FP8 = 0.15
# CUDA graphs replay from the fourth call on, and it is the replayed gradients that must be right.
BACKWARDS = 5

Build = Callable[[Variant], Training]


@dataclass(frozen=True)
class Error:
    """How far one run is from fp32's."""

    gradients: float
    worst_gradient: float
    worst_name: str
    losses: float


class Reference:
    """The fp32 run, and bf16's errors against it.

    Args:
        build: makes the training of a variant, each time with the same weights.
        steps: how many losses are compared.
    """

    def __init__(self, build: Build, steps: int) -> None:
        self.build, self.steps = build, steps
        training = build(FP32)
        training.backward(0)
        # Not on the device, where they would count as memory of what is measured meanwhile.
        self.gradients = {name: p.grad.to("cpu") for name, p in zip(training.names, training.parameters, strict=True)}
        self.losses = losses(training, steps)
        del training
        clean_up()
        self.autocast = self.error(AUTOCAST)
        self.bf16_weights = self.error(BF16_WEIGHTS)

    def error(self, variant: Variant) -> Error:
        training = self.build(variant)
        try:
            for _ in range(BACKWARDS):
                training.backward(0)
            errors = self._gradient_errors(training)
            losses_ = losses(training, self.steps)
        finally:
            del training
            clean_up()
        worst = max(errors, key=lambda name: errors[name])
        return Error(
            gradients=(sum(e * e for e in errors.values()) / len(errors)) ** 0.5,
            worst_gradient=errors[worst],
            worst_name=worst,
            losses=sum(abs(a - b) / abs(b) for a, b in zip(losses_, self.losses, strict=True)) / self.steps,
        )

    def _gradient_errors(self, training: Training) -> dict[str, float]:
        found: list[Tensor] = []
        for name, p in zip(training.names, training.parameters, strict=True):
            wanted = self.gradients[name].to(p.device)
            # A parameter without a gradient is as wrong as one whose gradient is zero.
            got = torch.zeros_like(wanted) if p.grad is None else p.grad.float()
            found.append((got - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))
        return dict(zip(training.names, torch.stack(found).tolist(), strict=True))

    def judge(self, variant: Variant) -> tuple[dict[str, Any], str | None]:
        """(the errors for the record, why they are too large or None)."""
        ours = self.error(variant)
        record = {"steps": self.steps, "ours": asdict(ours), "autocast": asdict(self.autocast)}
        record["bf16_weights"] = asdict(self.bf16_weights)
        booster = opendit.BoosterConfig.of(variant.booster)
        if booster.precision == "fp8":
            limit = replace(self.autocast, gradients=FP8 / SLACK, losses=2 * self.autocast.losses)
            return record, too_far(ours, limit, "the limit of 8 bits")
        return record, too_far(ours, self.bf16_weights if booster.residual == "bf16" else self.autocast)


def losses(training: Training, steps: int) -> list[float]:
    return torch.stack([training.step(i) for i in range(steps)]).tolist()


def too_far(ours: Error, theirs: Error, whose: str = "plain bf16's") -> str | None:
    """Why `ours` may not pass beside plain bf16's error, or another limit, or None. Not a number never passes."""
    if not ours.gradients <= SLACK * theirs.gradients:
        return (
            f"gradients off by {ours.gradients:.2e}, {whose} by {theirs.gradients:.2e}; "
            f"worst {ours.worst_name} {ours.worst_gradient:.2e}"
        )
    if not ours.losses <= SLACK * theirs.losses + FLOOR:
        return f"losses off by {ours.losses:.2e}, {whose} by {theirs.losses:.2e}"
    return None
