"""Gaussian diffusion: with a learned variance, as DiT was published (arXiv 2102.09672), and with v-prediction.

    q(x_t | x_0)           = N(√ā_t·x_0, 1 − ā_t),            ā_t = Π (1 − β_s), β linear from 1e-4 to 0.02
    q(x_{t−1} | x_t, x_0)  = N(m0_t·x_0 + mt_t·x_t, σ²_t),    m0_t = β_t·√ā_{t−1}/(1 − ā_t),
                              mt_t = √α_t·(1 − ā_{t−1})/(1 − ā_t),    σ²_t = β_t·(1 − ā_{t−1})/(1 − ā_t)
    model(x_t, t, y)       = [ε, v]:  log variance = w·log β_t + (1 − w)·log σ²_t,  w = (v + 1)/2

    loss = |ε − noise|² + VB,   VB = KL(q(x_{t−1}|x_t,x_0) ‖ p) in bits per dimension, at t = 0 the bits to encode x_0

ε is held fixed inside VB, which so trains v alone. Steps are counted 0 … T−1, as the model sees them.

`VelocityDiffusion` predicts  √ā_t·noise − √(1 − ā_t)·x_0  instead (arXiv 2202.00512), without a variance.
Min-SNR (arXiv 2303.09556) weighs each sample's squared error by min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for the
velocity, SNR = ā_t/(1 − ā_t): every prediction then has the weight min(SNR, γ) of an error in x_0.

Shapes: x [B, C, I, I], or [B, F, C, I, I] for videos; channels are third from the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from examples.diffusion.conditions import Condition, conditioned, per_sample


class GaussianDiffusion(nn.Module):
    learn_sigma = True
    predicts = "epsilon"

    def __init__(
        self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, min_snr: float | None = None
    ):
        super().__init__()
        self.steps, self.min_snr = steps, min_snr
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
            "snr": abar / (1 - abar),
        }
        # On the device with the model, so that a step looks them up without waiting for the host.
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def times(self, uniform: Tensor) -> Tensor:
        """Timesteps from numbers of [0, 1)."""
        return (uniform * self.steps).long()

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        return per_sample(self.get_buffer(table)[t], like)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.at("sqrt_abar", t, x0) * x0 + self.at("sqrt_one_minus_abar", t, x0) * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at("mean_x0", t, x0) * x0 + self.at("mean_xt", t, x0) * x_t

    def variational_bits(self, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """VB of each sample, [B]."""
        predicted_x0 = (x_t - self.at("sqrt_one_minus_abar", t, x_t) * eps) / self.at("sqrt_abar", t, x_t)
        mean = self.posterior_mean(predicted_x0, x_t, t)
        weight = (v + 1) / 2
        log_variance = weight * self.at("log_beta", t, v) + (1 - weight) * self.at("log_variance", t, v)
        true_mean, true_log_variance = self.posterior_mean(x0, x_t, t), self.at("log_variance", t, x0)

        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        first = -discretised_log_likelihood(x0, mean, log_variance)
        nats = torch.where(per_sample(t, kl) == 0, first, kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def terms(self, model: nn.Module, x0: Tensor, cond: Condition, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """|ε − noise|² and VB of each sample, both [B]."""
        x_t = self.add_noise(x0, t, noise)
        eps, v = conditioned(model, x_t, t, cond).float().chunk(2, dim=-3)
        mse = (eps - noise).square().flatten(1).mean(1)
        return mse, self.variational_bits(x0, x_t, t, eps.detach(), v)

    def loss(
        self, model: nn.Module, x0: Tensor, cond: Condition, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        t = self.times(torch.rand(len(x0), device=x0.device)) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        mse, bits = self.terms(model, x0, cond, t, noise)
        return (self.weight(t) * mse + bits).mean()

    def weight(self, t: Tensor) -> Tensor | float:
        """Of each sample's squared error, [B]."""
        return 1.0 if self.min_snr is None else self.snr[t].clamp(max=self.min_snr) / self.snr[t]


class VelocityDiffusion(GaussianDiffusion):
    learn_sigma = False
    predicts = "v_prediction"

    def terms(self, model: nn.Module, x0: Tensor, cond: Condition, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error of the velocity of each sample, [B], and nothing else."""
        velocity = self.at("sqrt_abar", t, x0) * noise - self.at("sqrt_one_minus_abar", t, x0) * x0
        out = conditioned(model, self.add_noise(x0, t, noise), t, cond).float()
        mse = (out - velocity).square().flatten(1).mean(1)
        return mse, torch.zeros_like(mse)

    def weight(self, t: Tensor) -> Tensor | float:
        return 1.0 if self.min_snr is None else self.snr[t].clamp(max=self.min_snr) / (self.snr[t] + 1)


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
