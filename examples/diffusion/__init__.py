"""What a DiT is trained to predict (`GaussianDiffusion` and others) and how to sample from it."""

from __future__ import annotations

from typing import Any

from torch import nn

from examples.diffusion.flow import RectifiedFlow
from examples.diffusion.gaussian import GaussianDiffusion, VelocityDiffusion
from examples.diffusion.sampling import SAMPLERS, guided, sample, timesteps_of

OBJECTIVES = {"flow": RectifiedFlow, "gaussian": GaussianDiffusion, "v": VelocityDiffusion}


def objective_of(args: Any) -> nn.Module:
    """The objective that the training scripts' settings ask for."""
    if args.objective == "flow":
        return RectifiedFlow(logit_normal=args.flow_timesteps != "uniform")
    return OBJECTIVES[args.objective](min_snr=args.min_snr)


__all__ = [
    "OBJECTIVES",
    "SAMPLERS",
    "GaussianDiffusion",
    "RectifiedFlow",
    "VelocityDiffusion",
    "guided",
    "objective_of",
    "sample",
    "timesteps_of",
]
