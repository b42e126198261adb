"""Objectives against slow float64 computations from the papers' formulas; samplers against problems with known ends."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from examples.diffusion import SAMPLERS, GaussianDiffusion, RectifiedFlow, VelocityDiffusion, guided, sample
from examples.diffusion.sampling import ddim, ddpm, dpm_solver, euler, generator_of, heun

STEPS = 1000


class Fixed(nn.Module):
    """Stands in for a model: returns what it was given, and remembers what it was asked."""

    def __init__(self, out):
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return self.out


@pytest.fixture
def case():
    torch.manual_seed(0)
    t = torch.tensor([0, 1, 2, 250, 999, 0])
    x0 = (torch.rand(6, 2, 4, 4) * 2 - 1).clamp(-0.99, 0.99)
    x0[5, 0] = -1.0  # the edge bins of t = 0
    x0[5, 1] = 1.0
    noise = torch.randn(6, 2, 4, 4)
    eps = noise + 0.05 * torch.randn_like(noise)
    out = torch.cat([eps, torch.rand(6, 2, 4, 4) * 2 - 1], dim=1)
    return x0, t, noise, Fixed(out)


def slow_gaussian_terms(x0, t, noise, out):
    """|ε − noise|² and the bits per dimension of VB, one scalar at a time from the definitions."""
    beta = [1e-4 + (0.02 - 1e-4) * i / (STEPS - 1) for i in range(STEPS)]
    abar = [1.0]  # abar[i + 1] belongs to step i
    for b in beta:
        abar.append(abar[-1] * (1 - b))

    def cdf(z):
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    mse, bits = [], []
    for n in range(len(x0)):
        step = int(t[n])
        b, a, a_prev = beta[step], abar[step + 1], abar[step]
        squares, nats = [], []
        eps_n, v_n = (part.double().flatten().tolist() for part in out[n].detach().chunk(2))
        for x, e, eps, v in zip(
            x0[n].double().flatten().tolist(), noise[n].double().flatten().tolist(), eps_n, v_n, strict=True
        ):
            x_t = math.sqrt(a) * x + math.sqrt(1 - a) * e
            squares.append((eps - e) ** 2)

            # Bayes: N(x_{t−1}; √a_prev·x0, 1 − a_prev) · N(x_t; √(1 − b)·x_{t−1}, b), as precisions.
            def posterior_mean(x_start, x_t=x_t, b=b, a_prev=a_prev):
                if a_prev == 1:
                    return x_start
                precision = 1 / (1 - a_prev) + (1 - b) / b
                return (math.sqrt(a_prev) * x_start / (1 - a_prev) + math.sqrt(1 - b) * x_t / b) / precision

            variance_step = max(step, 1)  # the variance of step 0 is zero; step 1's stands in
            prev = abar[variance_step]
            variance = 1 / (1 / (1 - prev) + (1 - beta[variance_step]) / beta[variance_step])
            w = (v + 1) / 2
            model_log_variance = w * math.log(b) + (1 - w) * math.log(variance)
            model_mean = posterior_mean((x_t - math.sqrt(1 - a) * eps) / math.sqrt(a))
            if step > 0:
                gap = (posterior_mean(x) - model_mean) ** 2
                ratio = variance / math.exp(model_log_variance)
                nats.append(0.5 * (ratio - 1 - math.log(ratio) + gap / math.exp(model_log_variance)))
            else:
                std = math.exp(0.5 * model_log_variance)
                above = 1.0 if x > 0.999 else cdf((x + 1 / 255 - model_mean) / std)
                below = 0.0 if x < -0.999 else cdf((x - 1 / 255 - model_mean) / std)
                nats.append(-math.log(max(above - below, 1e-12)))
        mse.append(sum(squares) / len(squares))
        bits.append(sum(nats) / len(nats) / math.log(2))
    return torch.tensor(mse), torch.tensor(bits)


def test_gaussian_terms_equal_the_slow_float64_computation(case):
    x0, t, noise, model = case
    mse, bits = GaussianDiffusion().terms(model, x0, torch.zeros(6), t, noise)
    slow_mse, slow_bits = slow_gaussian_terms(x0, t, noise, model.out)
    torch.testing.assert_close(mse, slow_mse, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bits, slow_bits, rtol=2e-3, atol=1e-5)
    assert slow_bits[0] > 1
    assert torch.isfinite(bits).all()


def test_gaussian_loss_is_the_mean_of_both_terms_and_vb_trains_the_variance_alone(case):
    x0, t, noise, model = case
    objective = GaussianDiffusion()
    loss = objective.loss(model, x0, torch.zeros(6), t=t, noise=noise)
    mse, bits = objective.terms(model, x0, torch.zeros(6), t, noise)
    torch.testing.assert_close(loss, mse.mean() + bits.mean())
    loss.backward()
    by_loss = model.out.grad.clone()
    model.out.grad = None
    mse.mean().backward()
    by_mse = model.out.grad
    assert torch.equal(by_loss[:, :2], by_mse[:, :2])
    assert by_loss[:, 2:].abs().amax(dim=(1, 2, 3)).min() > 0
    assert not by_mse[:, 2:].any()


def test_gaussian_tables_give_the_posterior_of_diffusers_ddpm():
    """An independent implementation of q(x_{t−1} | x_t, x_0): DDPM's step, told the true x_0, and its variance."""
    objective, scheduler = GaussianDiffusion(), DDPMScheduler(prediction_type="sample", clip_sample=False)
    # Its float32 products lose three digits of β at the first steps, ours are rounded once.
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)
    torch.manual_seed(0)
    x0, x_t = torch.randn(2, 1, 3, 4, 4)
    for step in (1, 2, 500, 999):
        t = torch.tensor([step])
        drawn = [
            scheduler.step(x0, step, x_t, generator=torch.Generator().manual_seed(seed)).prev_sample for seed in (0, 1)
        ]
        z = [torch.randn(x_t.shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        std = (0.5 * objective.log_variance[step]).exp()
        for image, noise in zip(drawn, z, strict=True):
            expected = objective.posterior_mean(x0, x_t, t) + std * noise
            torch.testing.assert_close(image.float(), expected, rtol=1e-5, atol=1e-6)


def test_gaussian_noising_equals_diffusers():
    torch.manual_seed(0)
    x0, noise, t = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.tensor([0, 10, 500, 999])
    expected = DDPMScheduler().add_noise(x0, noise, t)
    torch.testing.assert_close(GaussianDiffusion().add_noise(x0, t, noise), expected, rtol=1e-4, atol=1e-5)


def test_gaussian_tables_move_with_the_module_and_stay_out_of_checkpoints():
    assert GaussianDiffusion().to("meta").sqrt_abar.device.type == "meta"
    assert not GaussianDiffusion().state_dict()


def test_flow_loss_is_the_distance_from_the_velocity():
    torch.manual_seed(0)
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.0, 0.3, 1.0])
    model = Fixed(torch.randn(3, 1, 4, 4))
    loss = RectifiedFlow().loss(model, x0, torch.zeros(3), t=t, noise=noise)
    velocity = noise.double() - x0.double()
    torch.testing.assert_close(loss.double(), (model.out.double() - velocity).square().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.x[0], x0[0])
    torch.testing.assert_close(model.x[1], 0.7 * x0[1] + 0.3 * noise[1])
    torch.testing.assert_close(model.x[2], noise[2])
    assert model.t.tolist() == [0.0, 300.0, 1000.0]


@pytest.mark.parametrize(("logit_normal", "middle"), [(False, 0.5), (True, 0.7281)])
def test_flow_draws_its_times_as_named(logit_normal, middle):
    """Share of t in [1/4, 3/4]: one half if uniform; P(|N(0, 1)| < ln 3) if logit-normal."""
    torch.manual_seed(0)
    t = RectifiedFlow(logit_normal).times(torch.rand(100_000))
    assert 0 <= t.min() < t.max() <= 1
    assert abs(((t > 0.25) & (t < 0.75)).float().mean() - middle) < 0.01


def test_flow_samplers_end_on_the_data():
    """For data N(0.4, 0.2²) the exact velocity is E[noise − x_0 | x_t]; the samples must have that mean and spread."""
    torch.manual_seed(0)
    noise = torch.randn(5000, 1, 2, 2)

    def predict(x, t):
        t = t / 1000
        a, variance = 1 - t, (1 - t) ** 2 * 0.04 + t**2
        x0 = 0.4 + a * 0.04 / variance * (x - a * 0.4)
        expected_noise = t / variance * (x - a * 0.4)
        return expected_noise - x0

    for images in (euler(predict, noise, 100), heun(predict, noise, 20)):
        assert abs(images.mean().item() - 0.4) < 0.01
        assert abs(images.std().item() - 0.2) < 0.01


def test_heun_is_second_order_and_euler_first():
    """dx/dt = x from 1 to 0 ends at x/e."""
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def error(sampler, steps):
        return abs(sampler(lambda x, t: x, noise, steps).item() - math.exp(-1))

    assert 1.8 < error(euler, 20) / error(euler, 40) < 2.2
    assert 3.6 < error(heun, 10) / error(heun, 20) < 4.4


def test_euler_equals_diffusers_flow_matching_scheduler():
    torch.manual_seed(0)
    noise, weight = torch.randn(2, 1, 4, 4), torch.randn(4, 4)

    def predict(x, t):
        return torch.tanh(x @ weight) * (1 + t / 1000)

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.item()), t, x).prev_sample
    torch.testing.assert_close(euler(predict, noise, 5), x, rtol=1e-5, atol=1e-5)


def gaussian_posterior_eps(mean: float, std: float):
    """The exact ε for data N(mean, std²): E[noise | x_t]."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)

    def predict(x, t):
        a = abar[int(t)].item()
        return math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * std**2 + 1 - a)

    return predict


def test_ddim_and_ddpm_reproduce_a_gaussian():
    torch.manual_seed(0)
    noise, predict = torch.randn(2000, 1, 2, 2), gaussian_posterior_eps(mean=0.4, std=0.2)
    generator = torch.Generator().manual_seed(0)
    # Both are first order in the step: at 50 steps the spread is still a tenth too small and more.
    for images in (
        ddim(predict, noise, 250, clip=False),
        ddpm(predict, noise, 1000, learned_variance=False, clip=False, generator=generator),
    ):
        assert abs(images.mean().item() - 0.4) < 0.02
        assert abs(images.std().item() - 0.2) < 0.01


def test_ddpm_takes_the_learned_variance_between_its_two_bounds():
    """v = −1 means the smaller bound: the same images as with the fixed small variance; v = 1 is another chain."""
    noise, eps = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), gaussian_posterior_eps(0.4, 0.2)

    def run(v):
        def predict(x, t):
            out = eps(x, t)
            return out if v is None else torch.cat([out, torch.full_like(out, v)], dim=1)

        generator = torch.Generator().manual_seed(1)
        return ddpm(predict, noise, 20, learned_variance=v is not None, clip=False, generator=generator)

    torch.testing.assert_close(run(-1.0), run(None), rtol=1e-4, atol=1e-5)
    assert (run(1.0) - run(None)).abs().max() > 0.01


@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_velocity_and_min_snr_equal_their_definitions(case, min_snr):
    """v = √ā·ε − √(1 − ā)·x_0; weights min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v, in float64."""
    x0, t, noise, model = case
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)[t]
    snr = abar / (1 - abar)
    of_x0 = snr if min_snr is None else snr.clamp(max=min_snr)
    a = abar.view(-1, 1, 1, 1)

    velocity = a.sqrt() * noise - (1 - a).sqrt() * x0
    fixed = Fixed(model.out.detach()[:, :2].clone())
    errors = (fixed.out.double() - velocity).square().mean((1, 2, 3))
    weight = 1.0 if min_snr is None else of_x0 / (snr + 1)
    loss = VelocityDiffusion(min_snr=min_snr).loss(fixed, x0, torch.zeros(6), t=t, noise=noise)
    torch.testing.assert_close(loss.double(), (weight * errors).mean(), rtol=1e-5, atol=0)

    objective = GaussianDiffusion(min_snr=min_snr)
    mse, bits = objective.terms(model, x0, torch.zeros(6), t, noise)
    expected = (of_x0 / snr * mse + bits).mean()
    loss = objective.loss(model, x0, torch.zeros(6), t=t, noise=noise)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)


def test_videos_have_the_loss_of_their_frames():
    """Channels are third from the end: the objective of [B, F, C, I, I] is the mean of the frames' own."""
    torch.manual_seed(0)
    x0, noise, t = torch.rand(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4), torch.tensor([0, 400])
    out = torch.rand(2, 3, 4, 4, 4) * 2 - 1
    for objective in (GaussianDiffusion(min_snr=5.0), VelocityDiffusion(), RectifiedFlow()):
        shown = out if objective.learn_sigma else out[:, :, :2]
        times = t / 1000 if objective.predicts == "flow" else t
        whole = objective.loss(Fixed(shown), x0, {"y": torch.zeros(2)}, t=times, noise=noise)
        frames = [
            objective.loss(Fixed(shown[:, f]), x0[:, f], {"y": torch.zeros(2)}, t=times, noise=noise[:, f])
            for f in range(3)
        ]
        torch.testing.assert_close(whole, torch.stack(frames).mean(), rtol=1e-5, atol=1e-6)


def test_dpm_solver_and_velocity_samplers_reproduce_a_gaussian():
    noise, eps = torch.randn(2000, 1, 2, 2), gaussian_posterior_eps(mean=0.4, std=0.2)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)

    def velocity(x, t):
        a, e = abar[int(t)].item(), eps(x, t)
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        return math.sqrt(a) * e - math.sqrt(1 - a) * x0

    generator = torch.Generator().manual_seed(0)
    v = {"predicts": "v_prediction"}
    for images in (
        dpm_solver(eps, noise, 250),
        dpm_solver(velocity, noise, 250, **v),
        ddim(velocity, noise, 250, clip=False, **v),
        ddpm(velocity, noise, 1000, learned_variance=False, clip=False, generator=generator, **v),
    ):
        assert abs(images.mean().item() - 0.4) < 0.02
        assert abs(images.std().item() - 0.2) < 0.01


class Labelled(nn.Module):
    """Its output is the label, so guidance can be read off; the null label counts as 100."""

    num_classes, in_channels, learn_sigma, sample_shape = 10, 1, False, (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def null_condition(self, cond):
        return {"y": torch.full_like(cond["y"], 10)}

    def forward(self, x, t, y):
        self.seen.append((x, t, y))
        return torch.where(y == 10, 100.0, y.float()).view(-1, 1, 1, 1).expand_as(x) + self.weight


def labels(*y):
    return {"y": torch.tensor(y)}


def test_guidance_uses_the_models_null():
    model = Labelled()
    out = guided(model, labels(3, 9), cfg_scale=2.0)(torch.randn(2, 1, 2, 2), 500.0)
    assert model.seen[0][2].tolist() == [3, 9, 10, 10]
    assert model.seen[0][1].tolist() == [500.0] * 4
    assert out[:, 0, 0, 0].tolist() == [100 + 2 * (3 - 100), 100 + 2 * (9 - 100)]


def test_guidance_leads_away_from_what_is_named_instead():
    out = guided(Labelled(), labels(3, 9), cfg_scale=2.0, null=labels(1, 2))(torch.randn(2, 1, 2, 2), 500.0)
    assert out[:, 0, 0, 0].tolist() == [1 + 2 * (3 - 1), 2 + 2 * (9 - 2)]


def test_guidance_is_on_within_its_interval_alone():
    model = Labelled()
    predict = guided(model, labels(3), cfg_scale=2.0, interval=(0.2, 0.8))
    for t, guides in ((100.0, False), (200.0, True), (800.0, True), (801.0, False)):
        model.seen.clear()
        out = predict(torch.zeros(1, 1, 2, 2), t)
        assert out[0, 0, 0, 0] == (100 + 2 * (3 - 100) if guides else 3)
        assert len(model.seen[0][2]) == (2 if guides else 1)


def test_guidance_at_scale_1_is_none_and_the_null_is_not_evaluated():
    model, x = Labelled(), torch.randn(2, 1, 2, 2)
    out = guided(model, labels(3, 9), cfg_scale=1)(x, 500.0)
    assert model.seen[0][2].tolist() == [3, 9]
    assert torch.equal(out, model(x, torch.full((2,), 500.0), labels(3, 9)["y"]))


def test_guided_channels_and_a_learned_variance():
    """Of four output channels one is guided; the others are as predicted for the condition."""

    class Two(Labelled):
        in_channels, learn_sigma = 2, True

        def forward(self, x, t, y):
            return super().forward(x, t, y).repeat(1, 2, 1, 1)

    out = guided(Two(), labels(3), 2.0, guided_channels=1)(torch.zeros(1, 2, 2, 2), 1.0)
    assert out[0, :, 0, 0].tolist() == [100 + 2 * (3 - 100), 3, 3, 3]
    assert guided(Two(), labels(3), 2.0)(torch.zeros(1, 2, 2, 2), 1.0)[0, :, 0, 0].tolist() == [-94, -94, 3, 3]


class Drift(Labelled):
    """Depends on everything it is given; one output channel more where a variance is learned. Images or videos."""

    def __init__(self, shape, learn_sigma):
        super().__init__()
        self.sample_shape, self.learn_sigma = shape, learn_sigma

    def forward(self, x, t, y):
        shape = [-1, *[1] * (x.dim() - 1)]
        out = torch.tanh(x * (1 + y.view(shape) / 7)) + t.view(shape) / 1000
        return torch.cat([out, out / 2], dim=-3) if self.learn_sigma else out


CASES = [(o, s, shape) for o, names in SAMPLERS.items() for s in names for shape in ((1, 4, 4), (3, 1, 4, 4))]


def draw(objective, sampler, shape, y=(1, 2, 3, 4, 5), seed=0, **options):
    model = Drift(shape, learn_sigma=objective == "gaussian")
    options = {"steps": 4, "cfg_scale": 1.5, "clip": False, "seed": seed, **options}
    return sample(model, labels(*y), sampler=sampler, objective=objective, **options)


@pytest.mark.parametrize(("objective", "sampler", "shape"), CASES)
def test_a_sample_depends_on_the_seed_and_its_number_alone(objective, sampler, shape):
    whole = draw(objective, sampler, shape)
    assert whole.shape == (5, *shape)
    assert torch.equal(whole, draw(objective, sampler, shape))
    assert not torch.equal(whole, draw(objective, sampler, shape, seed=1))
    torch.testing.assert_close(draw(objective, sampler, shape, batch_size=2), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(draw(objective, sampler, shape, y=(3, 4), first=2), whole[2:4], rtol=1e-6, atol=1e-6)
    assert len({tuple(x.flatten().tolist()) for x in draw(objective, sampler, shape, y=(1,) * 5)}) == 5


def test_noise_that_ignores_the_samples_number_is_caught(monkeypatch):
    """The mutant of the test above: all samples of a batch, or the same rows of all batches, alike."""
    module = "examples.diffusion.sampling.generator_of"
    for mutant in (lambda seed, index: generator_of(seed, 0), lambda seed, index: generator_of(0, index)):
        monkeypatch.setattr(module, mutant)
        with pytest.raises(AssertionError):
            test_a_sample_depends_on_the_seed_and_its_number_alone("gaussian", "ddpm", (1, 4, 4))


def test_unknown_samplers_are_named():
    with pytest.raises(ValueError, match="unknown sampler 'dpm'"):
        sample(Labelled(), labels(1), sampler="dpm", steps=2)
