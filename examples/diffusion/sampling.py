"""From noise to images: classifier-free guidance, and the samplers of both objectives.

A `Predict` maps (x [B, C, I, I], t, one float for the batch) to the model's output for the labels that it was made
with. Noise enters as an argument or through a generator, so a seed means the same image on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

Predict = Callable[[Tensor, float], Tensor]


def guided(model: nn.Module, y: Tensor, cfg_scale: float, guided_channels: int | None = None) -> Predict:
    """The model's prediction for labels y; away from cfg_scale 1, guided against the null label num_classes."""
    if cfg_scale == 1:
        return lambda x, t: model(x, torch.full((len(x),), t, device=x.device), y)

    null = torch.full_like(y, model.num_classes)
    both = torch.cat([y, null])

    def predict(x: Tensor, t: float) -> Tensor:
        t_2B = torch.full((2 * len(x),), t, device=x.device)
        return model.forward_with_cfg(torch.cat([x, x]), t_2B, both, cfg_scale, guided_channels)[: len(x)]

    return predict


def euler(predict: Predict, noise: Tensor, steps: int) -> Tensor:
    """Rectified flow along dx/dt from t = 1 (noise) to t = 0, one evaluation per step."""
    x, dt = noise, 1 / steps
    for i in range(steps):
        x = x - dt * predict(x, 1000 * (1 - i * dt)).float()
    return x


def heun(predict: Predict, noise: Tensor, steps: int) -> Tensor:
    """As `euler`, with the mean of the slopes at both ends of a step: second order, two evaluations.

    The last step is Euler's, for t = 0 is where logit-normal training hardly ever goes.
    """
    x, dt = noise, 1 / steps
    for i in range(steps):
        slope = predict(x, 1000 * (1 - i * dt)).float()
        if i + 1 < steps:
            slope = (slope + predict(x - dt * slope, 1000 * (1 - (i + 1) * dt)).float()) / 2
        x = x - dt * slope
    return x


def ddpm(
    predict: Predict,
    noise: Tensor,
    steps: int,
    *,
    learned_variance: bool,
    clip: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ancestral sampling over `steps` of the 1000 timesteps, evenly spaced from 999 to 0."""
    variance_type = "learned_range" if learned_variance else "fixed_small"
    scheduler = DDPMScheduler(timestep_spacing="linspace", variance_type=variance_type, clip_sample=clip)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.item()).float(), t, x, generator=generator).prev_sample
    return x


def ddim(predict: Predict, noise: Tensor, steps: int, *, clip: bool) -> Tensor:
    """Deterministic given the noise (eta = 0); a learned variance is not used."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=clip)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        eps = predict(x, t.item()).float()[:, : x.shape[1]]
        x = scheduler.step(eps, t, x, use_clipped_model_output=clip).prev_sample
    return x


SAMPLERS = {"flow": ("heun", "euler"), "gaussian": ("ddim", "ddpm")}
"""The samplers that fit each objective; the first is its default."""


@torch.no_grad()
def sample(
    model: nn.Module,
    y: Tensor,
    *,
    sampler: str,
    steps: int,
    cfg_scale: float = 1.0,
    seed: int = 0,
    clip: bool = True,
    guided_channels: int | None = None,
) -> Tensor:
    """One image per label in y, [B, C, I, I]; `clip` holds x_0 to [−1, 1]: right for pixels, wrong for latents."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(y), model.in_channels, model.input_size, model.input_size, generator=generator)
    predict, x = guided(model, y, cfg_scale, guided_channels), noise.to(y.device)
    match sampler:
        case "euler":
            x = euler(predict, x, steps)
        case "heun":
            x = heun(predict, x, steps)
        case "ddim":
            x = ddim(predict, x, steps, clip=clip)
        case "ddpm":
            x = ddpm(predict, x, steps, learned_variance=model.learn_sigma, clip=clip, generator=generator)
        case _:
            raise ValueError(f"unknown sampler {sampler!r}; there are {sorted(sum(SAMPLERS.values(), ()))}")
    return x.clamp(-1, 1) if clip else x
