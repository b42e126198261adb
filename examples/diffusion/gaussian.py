"""Gaussian diffusion with a learned variance: the objective that DiT was published with (arXiv 2102.09672).

    q(x_t | x_0)           = N(√ā_t·x_0, 1 − ā_t),            ā_t = Π (1 − β_s), β linear from 1e-4 to 0.02
    q(x_{t−1} | x_t, x_0)  = N(m0_t·x_0 + mt_t·x_t, σ²_t),    m0_t = β_t·√ā_{t−1}/(1 − ā_t),
                              mt_t = √α_t·(1 − ā_{t−1})/(1 − ā_t),    σ²_t = β_t·(1 − ā_{t−1})/(1 − ā_t)
    model(x_t, t, y)       = [ε, v]:  log variance = w·log β_t + (1 − w)·log σ²_t,  w = (v + 1)/2

    loss = |ε − noise|² + VB,   VB = KL(q(x_{t−1}|x_t,x_0) ‖ p) in bits per dimension, at t = 0 the bits to encode x_0

ε is held fixed inside VB, which so trains v alone. Steps are counted 0 … T−1, as the model sees them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GaussianDiffusion(nn.Module):
    learn_sigma = True

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        super().__init__()
        self.steps = steps
        beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = beta * (1 - abar_prev) / (1 - abar)
        variance[0] = variance[1]  # it is zero at t = 0, where VB needs a logarithm
        tables = {
            "sqrt_abar": abar.sqrt(),
            "sqrt_one_minus_abar": (1 - abar).sqrt(),
            "mean_x0": beta * abar_prev.sqrt() / (1 - abar),
            "mean_xt": (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar),
            "log_variance": variance.log(),
            "log_beta": beta.log(),
        }
        # On the device with the model, so that a step looks them up without waiting for the host.
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def at(self, table: str, t: Tensor) -> Tensor:
        return self.get_buffer(table)[t].view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.at("sqrt_abar", t) * x0 + self.at("sqrt_one_minus_abar", t) * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at("mean_x0", t) * x0 + self.at("mean_xt", t) * x_t

    def variational_bits(self, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """VB of each sample, [B]."""
        predicted_x0 = (x_t - self.at("sqrt_one_minus_abar", t) * eps) / self.at("sqrt_abar", t)
        mean = self.posterior_mean(predicted_x0, x_t, t)
        weight = (v + 1) / 2
        log_variance = weight * self.at("log_beta", t) + (1 - weight) * self.at("log_variance", t)
        true_mean, true_log_variance = self.posterior_mean(x0, x_t, t), self.at("log_variance", t)

        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        first = -discretised_log_likelihood(x0, mean, log_variance)
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, first, kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def terms(self, model: nn.Module, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """|ε − noise|² and VB of each sample, both [B]."""
        x_t = self.add_noise(x0, t, noise)
        eps, v = model(x_t, t, y).float().chunk(2, dim=1)
        mse = (eps - noise).square().flatten(1).mean(1)
        return mse, self.variational_bits(x0, x_t, t, eps.detach(), v)

    def loss(
        self, model: nn.Module, x0: Tensor, y: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        t = torch.randint(self.steps, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        mse, bits = self.terms(model, x0, y, t, noise)
        return (mse + bits).mean()


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N_1 ‖ N_2) of each element, in nats."""
    log_ratio = log_variance_1 - log_variance_2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the mass that N(mean, variance) puts on x's bin, in nats.

    The bins are those of 8-bit images in [−1, 1]: 2/255 wide, the outermost two open to ∓∞.
    """
    inverse_std = (-0.5 * log_variance).exp()
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
