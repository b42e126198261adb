"""What a DiT is trained to predict (`GaussianDiffusion`, `RectifiedFlow`) and how to sample from it."""

from examples.diffusion.flow import RectifiedFlow
from examples.diffusion.gaussian import GaussianDiffusion
from examples.diffusion.sampling import SAMPLERS, guided, sample

OBJECTIVES = {"flow": RectifiedFlow, "gaussian": GaussianDiffusion}

__all__ = ["OBJECTIVES", "SAMPLERS", "GaussianDiffusion", "RectifiedFlow", "guided", "sample"]
