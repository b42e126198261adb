"""From noise to images and videos: classifier-free guidance, and the samplers of all objectives.

A `Predict` maps (x [B, …, C, I, I], t, one float for the batch) to the model's output for the condition that it was
made with. Noise enters as an argument or through one generator per sample, seeded by the run's seed and the sample's
number: a sample is the same on every device, in every batch, on any number of processes, as far as the model's
arithmetic is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.diffusion.conditions import Condition, both, conditioned, count, rows

Predict = Callable[[Tensor, float], Tensor]
Generators = list[torch.Generator]


def guided(
    model: nn.Module,
    cond: Condition,
    cfg_scale: float,
    guided_channels: int | None = None,
    *,
    null: Condition | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Predict:
    """The model's prediction for `cond`; away from cfg_scale 1, null + cfg_scale·(cond − null), in one batch.

    `null` is what to be guided away from: the model's own null condition by default, or a negative prompt. Guidance is
    on while t/1000 is within `interval` (arXiv 2404.07724); outside, as at scale 1, the null is not evaluated. The
    first `guided_channels` are guided, all of the model's by default; a learned variance stays as predicted.
    """

    def plain(x: Tensor, t: float) -> Tensor:
        return conditioned(model, x, torch.full((len(x),), t, device=x.device), cond)

    if cfg_scale == 1:
        return plain
    twice = both(cond, model.null_condition(cond) if null is None else null)
    channels = model.in_channels if guided_channels is None else guided_channels

    def predict(x: Tensor, t: float) -> Tensor:
        if not interval[0] <= t / 1000 <= interval[1]:
            return plain(x, t)
        t_2B = torch.full((2 * len(x),), t, device=x.device)
        out, out_null = conditioned(model, torch.cat([x, x]), t_2B, twice).chunk(2)
        mixed = out_null + cfg_scale * (out - out_null)
        return torch.cat([mixed.narrow(-3, 0, channels), out.narrow(-3, channels, out.shape[-3] - channels)], dim=-3)

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
    generator: torch.Generator | Generators | None = None,
    predicts: str = "epsilon",
) -> Tensor:
    """Ancestral sampling over `steps` of the 1000 timesteps, evenly spaced from 999 to 0."""
    from diffusers import DDPMScheduler  # here, for training and flow need it not

    scheduler = DDPMScheduler(
        timestep_spacing="linspace",
        variance_type="learned_range" if learned_variance else "fixed_small",
        clip_sample=clip,
        prediction_type=predicts,
    )
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        out = predict(x, t.item()).float()
        if learned_variance:  # diffusers wants the variance behind the prediction in dimension 1, frames or not
            out = torch.cat(out.chunk(2, dim=-3), dim=1)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


def ddim(predict: Predict, noise: Tensor, steps: int, *, clip: bool, predicts: str = "epsilon") -> Tensor:
    """Deterministic given the noise (eta = 0); a learned variance is not used."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=clip, prediction_type=predicts)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        out = predict(x, t.item()).float().narrow(-3, 0, x.shape[-3])
        x = scheduler.step(out, t, x, use_clipped_model_output=clip).prev_sample
    return x


def dpm_solver(predict: Predict, noise: Tensor, steps: int, *, predicts: str = "epsilon") -> Tensor:
    """DPM-Solver++ of second order (arXiv 2211.01095): deterministic given the noise, without a learned variance."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type=predicts, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.item()).float().narrow(-3, 0, x.shape[-3]), t, x).prev_sample
    return x


def timesteps_of(sampler: str, steps: int) -> list[float]:
    """Those that the sampler calls the model at, in order."""
    dt = 1 / steps
    if sampler == "euler":
        return [1000 * (1 - i * dt) for i in range(steps)]
    if sampler == "heun":
        pairs = [(1000 * (1 - i * dt), 1000 * (1 - (i + 1) * dt)) for i in range(steps)]
        return [t for pair in pairs for t in pair][:-1]  # the last step is Euler's
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    match sampler:
        case "ddpm":
            scheduler = DDPMScheduler(timestep_spacing="linspace")
        case "ddim":
            scheduler = DDIMScheduler(timestep_spacing="trailing")
        case _:
            scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]


SAMPLERS = {
    "flow": ("heun", "euler"),
    "gaussian": ("ddim", "ddpm", "dpm-solver++"),
    "v": ("ddim", "ddpm", "dpm-solver++"),
}
"""The samplers that fit each objective; the first is its default."""

PREDICTS = {"gaussian": "epsilon", "v": "v_prediction"}


def generator_of(seed: int, index: int) -> torch.Generator:
    """The generator of all noise of one sample, on the CPU, so that it is the same on every device."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def sample(
    model: nn.Module,
    cond: Condition,
    *,
    sampler: str,
    steps: int,
    objective: str | None = None,
    cfg_scale: float = 1.0,
    null: Condition | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    clip: bool = True,
    guided_channels: int | None = None,
) -> Tensor:
    """One sample per row of `cond`, [B, …, C, I, I]; their numbers are first, first + 1, …

    `clip` holds x_0 to [−1, 1]: right for pixels, wrong for latents. `batch_size` bounds how many are drawn at once.
    `objective` is needed where a sampler fits several (default: the first of those in SAMPLERS).
    """
    known = sorted({name for names in SAMPLERS.values() for name in names})
    if sampler not in known:
        raise ValueError(f"unknown sampler {sampler!r}; there are {known}")
    objective = objective or next(name for name, names in SAMPLERS.items() if sampler in names)
    predicts = PREDICTS.get(objective, "flow")
    drawn, total = [], count(cond)
    for start in range(0, total, batch_size or total):
        stop = min(total, start + (batch_size or total))
        part = rows(cond, start, stop)
        away = None if null is None else rows(null, start, stop)
        generators = [generator_of(seed, first + i) for i in range(start, stop)]
        noise = torch.stack([torch.randn(model.sample_shape, generator=g) for g in generators])
        x = noise.to(next(model.parameters()).device)
        predict = guided(model, part, cfg_scale, guided_channels, null=away, interval=interval)
        match sampler:
            case "euler":
                x = euler(predict, x, steps)
            case "heun":
                x = heun(predict, x, steps)
            case "ddim":
                x = ddim(predict, x, steps, clip=clip, predicts=predicts)
            case "dpm-solver++":
                x = dpm_solver(predict, x, steps, predicts=predicts)
            case "ddpm":
                x = ddpm(
                    predict,
                    x,
                    steps,
                    learned_variance=model.learn_sigma,
                    clip=clip,
                    generator=generators,
                    predicts=predicts,
                )
        drawn.append(x.clamp(-1, 1) if clip else x)
    return torch.cat(drawn)
