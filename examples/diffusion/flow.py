"""Rectified flow (arXiv 2209.03003): straight lines from data to noise, and the velocity along them.

    x_t = (1 − t)·x_0 + t·noise,    target  dx/dt = noise − x_0,    loss = |model(x_t, 1000·t, y) − target|²

t ∈ [0, 1] is uniform or logit-normal (arXiv 2403.03206: the middle of the path is the hard part). The model sees
1000·t because its timestep embedding is spaced for 0 … 1000, as diffusers' flow-matching schedulers assume too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.diffusion.conditions import Condition, conditioned, per_sample


class RectifiedFlow(nn.Module):
    learn_sigma = False
    predicts = "flow"

    def __init__(self, logit_normal: bool = True):
        super().__init__()
        self.logit_normal = logit_normal

    def times(self, uniform: Tensor) -> Tensor:
        """t from numbers of [0, 1), by the inverse of its distribution."""
        return torch.special.ndtri(uniform).sigmoid() if self.logit_normal else uniform

    def loss(
        self, model: nn.Module, x0: Tensor, cond: Condition, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        t = self.times(torch.rand(len(x0), device=x0.device)) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        t_B111 = per_sample(t, x0)
        x_t = (1 - t_B111) * x0 + t_B111 * noise
        velocity = conditioned(model, x_t, 1000 * t, cond)
        return (velocity.float() - (noise - x0)).square().mean()
