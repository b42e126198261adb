"""Modulations of all timesteps computed at once: the numbers of a loop that computes them step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import opendit
from opendit.patch import sampled
from tests.comparing import twin
from tests.sampling.replaying import use_replays
from tests.tiny_models import TINY, Tiny, randomise

TIMES = [999.0, 500.5, 17.0]
# How many modules are looked up: blocks, the head, the timestep embedder; of LatteIMG's blocks the temporal ones, since
# in a spatial one each row has a condition of its own; of diffusers' the blocks.
SITES = {"dit": 4, "latte": 6, "latte-text": 4, "latte-img": 2, "diffusers": 2, "example": 4}
RUN = 3


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model in eval mode and step(model, t, x): what it gives for that timestep and x."""
    tiny: Tiny = next(t for t in TINY if t.name == name)
    model = randomise(tiny.build()).to(dtype).eval()
    args, kwargs = tiny.inputs(dtype, torch.device("cpu"))
    keyword = "timestep" in kwargs

    def step(model: nn.Module, t: float, x: Tensor) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.float64)
        if keyword:
            return tiny.output(model(x, **{**kwargs, "timestep": times.long()}))
        return tiny.output(model(x, times, *args[2:], **kwargs))

    step.x = args[0]  # type: ignore[attr-defined]
    return model, step


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs) > 0
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


def cast_timesteps(model: nn.Module) -> nn.Module:
    """Upstream's embedder runs in fp32 only; ours casts."""
    if hasattr(model, "t_embedder"):
        model.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: (args[0].to(mlp[0].weight.dtype),))
    return model


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", list(SITES))
def test_the_same_as_step_by_step(name, graphs, monkeypatch):
    model, step = build(name)
    if graphs:
        use_replays(monkeypatch)
    times = [float(int(t)) for t in TIMES] if name == "diffusers" else TIMES
    xs = [torch.randn_like(step.x) for _ in range(RUN * len(times))]
    with torch.no_grad():
        plain = cast_timesteps(twin(model))
        wanted = [step(plain, t, x) for t, x in zip(times * RUN, xs, strict=True)]
        opendit.accelerate(model, {"sampling": True, "cuda_graphs": graphs})
        calls = count_modulations(model)
        with opendit.sampling(model, timesteps=times) as run:
            found = [step(model, t, x) for t, x in zip(times * RUN, xs, strict=True)]
        looked_up = len(run._places)
    assert worst(found, wanted) <= 1e-12
    assert looked_up == SITES[name]
    # Twice to try, and once for each run of the loop, whatever the number of timesteps; LatteIMG's lists don't repeat.
    assert calls[0] == 2 + RUN * (len(times) if name == "latte-img" else 1)
    if graphs:
        assert sampled.kept_of(model).graphs.replays == RUN * len(times) - 1


def count_modulations(model: nn.Module) -> list[int]:
    """How often the last block's modulation is computed; its Linear is replaced by one that counts."""
    counter = [0]
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    last = blocks[-1]
    linear = last.adaLN_modulation[-1] if hasattr(last, "adaLN_modulation") else last.norm1.linear

    class Counting(type(linear)):
        def forward(self, x):
            counter[0] += 1
            return super().forward(x)

    linear.__class__ = Counting
    return counter
