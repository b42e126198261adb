"""The step cache: what it computes against the formula written out, and that its budget is kept."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor, nn

import opendit
from opendit import calibrating
from opendit.patch import reuse, sampled
from tests.comparing import twin
from tests.mutating import load_mutant
from tests.sampling.drawing import euler, flow
from tests.sampling.replaying import use_replays
from tests.tiny_models import UserDiT, UserLatte, randomise

TIMES = [1000.0, 900.0, 780.0, 640.0, 500.0, 350.0, 180.0, 60.0]
COMPUTED = (True, False, True, False, True, True, False, False)


def accelerated(model: nn.Module, **config) -> nn.Module:
    return opendit.accelerate(twin(model), {"sampling": True, **config})


def schedule(order: int, blocks: int = 4, last: int = 2) -> opendit.StepCache:
    return opendit.StepCache(tuple(TIMES), COMPUTED, 1, last, blocks, order)


class Reference(nn.Module):
    """The formula on the plain model: blocks 1 … N − 2 run where the schedule says so, their residual is kept."""

    def __init__(self, model: nn.Module, cache: opendit.StepCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        self.done: list[tuple[float, Tensor]] = []  # the steps computed so far: t, R
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        m, blocks, s = self.model, self.model.blocks, self.calls % len(TIMES)
        self.calls += 1
        if s == 0:
            self.done = []
        h = m.x_embedder(x) + m.pos_embed
        c = m.t_embedder(t) + m.y_embedder(y, False)
        h = entered = blocks[0](h, c)
        if self.cache.computed[s]:
            for block in blocks[1:-1]:
                h = block(h, c)
            self.done.append((t[0].item(), h - entered))
        else:
            t_l, residual = self.done[-1]
            if self.cache.order and len(self.done) > 1:
                t_k, earlier = self.done[-2]
                residual = residual + (t[0].item() - t_l) / (t_l - t_k) * (residual - earlier)
            h = h + residual
        return m.unpatchify(m.final_layer(blocks[-1](h, c), c))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("order", [0, 1])
def test_the_formula(order, graphs, monkeypatch):
    if graphs:
        use_replays(monkeypatch)
    plain, cache = flow(), schedule(order)
    wanted = [euler(Reference(plain, cache), TIMES, labels) for labels in ((0, 1, 3), (4, 4, 2))]
    model = accelerated(plain, cuda_graphs=graphs)
    attention = counted(model)
    with opendit.sampling(model, TIMES, cache) as run:
        found = [euler(model, TIMES, labels) for labels in ((0, 1, 3), (4, 4, 2))]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-12
    assert (run.residuals.computed, run.residuals.reused) == (2 * (4 * 4 + 4 * 2), 2 * 4 * 2)
    assert (cache.blocks_computed, cache.blocks_reused) == (24, 8)
    if graphs:
        assert len(sampled.kept_of(model).graphs.graphs) == 2
    else:
        assert attention[0] == run.residuals.computed


def counted(model: nn.Module) -> list[int]:
    """How often an attention of the model's is run."""
    counter = [0]

    def forward(attention: nn.Module, x: Tensor) -> Tensor:
        counter[0] += 1
        return type(attention).__mro__[1].forward(attention, x)

    for block in model.blocks:
        block.attn.__class__ = type("Counting", (type(block.attn),), {"forward": forward})
    return counter


MUTANTS = {
    "the residual is not kept": ("        last.copy_(new)\n", "", 1),
    "the slope is of the old residual": ("torch.mul(new - last,", "torch.mul(last,", 1),
    "the slope is not scaled": ("factor = 1 / apart if apart else 0.0", "factor = 1.0", 1),
    "the residual is not of its input": ("new = out - x", "new = out.clone()", 1),
    "added by every block": ("        if not first:\n            return x\n", "", 1),
    "an old slope is taken for one": ("self._shape, self._last, self._slopes = None, None, False", "pass", 1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_formula_is_seen(name, tmp_path, monkeypatch):
    mutant = load_mutant(reuse, [MUTANTS[name]], tmp_path, monkeypatch)
    monkeypatch.setattr(reuse, "Residuals", mutant.Residuals)
    plain, cache = flow(), schedule(1)
    wanted = [euler(Reference(plain, cache), TIMES, labels) for labels in ((0, 1, 3), (4, 4, 2))]
    model = accelerated(plain)
    with opendit.sampling(model, TIMES, cache):
        found = [euler(model, TIMES, labels) for labels in ((0, 1, 3), (4, 4, 2))]
    assert max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)) > 1e-10


@pytest.mark.parametrize("psnr", [20, 35])
def test_the_psnr_that_was_asked_for(psnr):
    model = accelerated(flow())
    uncached = euler(model, TIMES)
    cache = opendit.calibrate(model, lambda: euler(model, TIMES), TIMES, psnr=psnr)
    with opendit.sampling(model, TIMES, cache):
        cached = euler(model, TIMES)
    errors = (cached - uncached).square().flatten(1).mean(1)
    assert cache.psnr == pytest.approx(10 * math.log10(4 / errors.mean()), abs=1e-3)
    assert cache.worst_psnr == pytest.approx(10 * math.log10(4 / errors.max()), abs=1e-3)
    assert cache.psnr >= psnr
    assert cache.blocks_reused > 0
    assert f"PSNR {cache.psnr:.1f} dB" in cache.report()


def test_a_larger_budget_spares_more():
    model = accelerated(flow())
    spared = [
        opendit.calibrate(model, lambda: euler(model, TIMES), TIMES, psnr=psnr).blocks_reused for psnr in (20, 35, 300)
    ]
    assert spared[0] > spared[1] > spared[2] == 0


def test_the_distance_that_was_asked_for():
    model = accelerated(flow())
    cache = opendit.calibrate(model, lambda: euler(model, TIMES), TIMES, distance=0.2)
    assert 0 < sum(cache.computed) < len(TIMES)
    assert cache.psnr is not None
    finer = opendit.calibrate(model, lambda: euler(model, TIMES), TIMES, distance=1e-6)
    assert all(finer.computed)


def test_samples_do_not_depend_on_their_batch():
    model = accelerated(flow())
    cache = opendit.calibrate(model, lambda: euler(model, TIMES), TIMES, psnr=20)
    with opendit.sampling(model, TIMES, cache):
        together = euler(model, TIMES, (0, 1, 3))
        apart = torch.cat([euler(model, TIMES, (label,), numbers=(i,)) for i, label in enumerate((0, 1, 3))])
    assert ((together - apart).norm() / together.norm()).item() <= 1e-12


def test_guidance_that_pauses():
    """Where there are fewer rows, or more, than the residual has, blocks are computed."""
    model = accelerated(flow())
    with opendit.sampling(model, TIMES, schedule(1)) as run:
        found = euler(model, TIMES, within=(300, 700))
    assert found.isfinite().all()
    # Steps 3 and 6 begin another number of rows; of those that may be left out, 1 and 7 are.
    assert run.residuals.reused == 2 * 2


class Sized(UserDiT):
    """It takes images of several sizes."""

    def forward(self, x, t, y):
        x = self.x_embedder(x)
        x = x + self.pos_embed[:, : x.shape[1]]
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def test_another_size_within_a_run_is_computed():
    """The residual of one size says nothing of another."""
    plain = randomise(Sized(depth=4)).eval()
    model, y = accelerated(plain), torch.tensor([0, 1])
    with torch.no_grad(), opendit.sampling(model, TIMES, schedule(0)):
        for size, time in zip((6, 4), TIMES, strict=False):
            x, t = torch.randn(2, 4, size, size), torch.full((2,), time)
            torch.testing.assert_close(model(x, t, y), plain(x, t, y), atol=1e-5, rtol=1e-5)


def test_residuals_of_many_shapes_are_forgotten(monkeypatch):
    """And the graphs that read them, so that what is drawn stays right."""
    use_replays(monkeypatch)
    monkeypatch.setattr(sampled, "SHAPES", 2)
    plain, cache = flow(), schedule(1)
    model = accelerated(plain, cuda_graphs=True)
    labels, graphs = [(0,) * n for n in (1, 2, 3, 4, 1, 1)], []
    with opendit.sampling(model, TIMES, cache):
        for some in labels:
            found, wanted = euler(model, TIMES, some), euler(Reference(plain, cache), TIMES, some)
            assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-12
            assert len(sampled.kept_of(model).memory.kept) <= 3
            graphs.append(sampled.kept_of(model).graphs)
    assert graphs[0] is graphs[2] is not graphs[3]


@pytest.mark.parametrize(
    ("residuals", "fewest"),
    [([0.0] * 8, 1), ([1.0, 2.0, 4.0, 0.0, 8.0, 9.0, 1.0, 5.0], 1), ([1.0, 2.0, 4.0, math.nan, 8.0, 9.0, 1.0, 5.0], 2)],
    ids=["all zero", "one zero", "one not a number"],
)
def test_residuals_of_zero_or_not_a_number(residuals, fewest):
    seen = calibrating._Seen(TIMES)
    for step, value in enumerate(residuals):
        seen(step, torch.full((4,), value))
    tries, schedule = [0], seen.schedule

    def counted(limit: float, order: int) -> tuple[bool, ...]:
        tries[0] += 1
        assert tries[0] < 2000
        return schedule(limit, order)

    seen.schedule = counted  # type: ignore[method-assign]
    for order in (0, 1):
        tries[0] = 0
        assert sum(seen.with_at_most(1, order)) >= fewest


def test_one_run_at_a_time():
    model, cache = accelerated(flow()), schedule(0)
    with opendit.sampling(model, TIMES, cache) as run:
        with pytest.raises(ValueError, match="model: it is in a run"), opendit.sampling(model, TIMES):
            pass
        euler(model, TIMES)
    assert run.calls == len(TIMES)
    with opendit.sampling(model, TIMES):
        euler(model, TIMES)


def test_latte():
    torch.manual_seed(0)
    model = randomise(UserLatte(depth=6)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.6)
    model.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: (args[0].to(mlp[0].weight.dtype),))
    opendit.accelerate(model, {"sampling": True})
    noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 4])

    def draw() -> Tensor:
        x = noise
        for t in TIMES:
            x = x - 0.1 * model(x, torch.full((2,), t), y)[:, :, :4]
        return x

    cache = opendit.calibrate(model, draw, TIMES, psnr=20)
    assert (cache.first, cache.last) == (1, 5)
    assert cache.blocks_reused > 0


class Scaling(UserDiT):
    """It does more between its blocks than passing x on."""

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(1.1 * x, c)
        return self.unpatchify(self.final_layer(x, c))


def test_models_that_can_not_be_cached_are_refused():
    model = opendit.accelerate(randomise(Scaling(depth=4, learn_sigma=False)).eval(), {"sampling": True})
    with pytest.raises(ValueError, match="between its blocks it does more than pass x on"):
        opendit.calibrate(model, lambda: euler(model, TIMES), TIMES, psnr=20)
    short = accelerated(flow(depth=2))
    with pytest.raises(ValueError, match="2 blocks; allowed: three or more"):
        opendit.calibrate(short, lambda: euler(short, TIMES), TIMES, psnr=20)


def test_never_in_training():
    model, cache = accelerated(flow()), schedule(0)
    with opendit.sampling(model, TIMES, cache):
        model.train()
        with pytest.raises(ValueError, match="in training mode inside"):
            euler(model, TIMES)
        model.eval()
        with pytest.raises(ValueError, match="with gradients enabled inside"):
            model(torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.full((2,), 1000.0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="training mode"), opendit.sampling(model.train(), TIMES, cache):
        pass


def test_mistakes_are_told():
    model, cache = accelerated(flow()), schedule(0)
    draw = lambda: euler(model, TIMES)  # noqa: E731
    with pytest.raises(ValueError, match="exactly one of them"):
        opendit.calibrate(model, draw, TIMES)
    with pytest.raises(ValueError, match="psnr: got -1"):
        opendit.calibrate(model, draw, TIMES, psnr=-1)
    with pytest.raises(ValueError, match="called the model 8 times"):
        opendit.calibrate(model, draw, [*TIMES, 0.0], psnr=20)
    numbers = iter(range(1000))
    with pytest.raises(ValueError, match="two uncached runs of it differ"):
        opendit.calibrate(model, lambda: euler(model, TIMES, (0,), numbers=(next(numbers),)), TIMES, psnr=20)
    with pytest.raises(ValueError, match="other timesteps"):
        opendit.sampling(model, TIMES[:-1], cache)
    with pytest.raises(TypeError, match="StepCache, from"):
        opendit.sampling(model, TIMES, 0.5)
    with pytest.raises(ValueError, match="it is for a model of 5 blocks"):
        opendit.sampling(model, TIMES, schedule(0, blocks=5))
    with pytest.raises(ValueError, match="the first of them True"):
        dataclasses.replace(cache, computed=(False,) * 8)


def test_as_json():
    cache = dataclasses.replace(schedule(1), psnr=31.5, worst_psnr=30.25, asked="PSNR of at least 30 dB")
    assert opendit.StepCache.from_json(cache.to_json()) == cache
    for text in ("[]", '{"a": 1}', "{}", json.dumps({**json.loads(cache.to_json()), "order": 7})):
        with pytest.raises(ValueError, match=r"allowed|not what"):
            opendit.StepCache.from_json(text)
