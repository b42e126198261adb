"""What a DiT is trained to predict (`GaussianDiffusion` and others) and how to sample from it."""

from examples.diffusion.flow import RectifiedFlow
from examples.diffusion.gaussian import GaussianDiffusion, VelocityDiffusion
from examples.diffusion.sampling import SAMPLERS, guided, sample

OBJECTIVES = {"flow": RectifiedFlow, "gaussian": GaussianDiffusion, "v": VelocityDiffusion}

__all__ = ["OBJECTIVES", "SAMPLERS", "GaussianDiffusion", "RectifiedFlow", "VelocityDiffusion", "guided", "sample"]
