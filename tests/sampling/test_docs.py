"""The example of docs/sampling.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import opendit
from tests.sampling.drawing import flow

PAGE = Path(__file__).parent.parent.parent / "docs" / "sampling.md"


def test_the_example_draws_what_the_plain_model_draws(monkeypatch):
    from diffusers import DDIMScheduler

    code = re.search(r"<!-- example -->\n```python\n(.*?)```\n<!-- end -->", PAGE.read_text(), re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    model = flow(dtype=torch.float32)
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    given = (scheduler, noise, torch.tensor([1, 2]), torch.tensor([5, 5]))
    rounded = scope["draw"](scope["accelerated"](model), *given)
    ours = scope["draw"](opendit.accelerate(opendit.restore(model), {"sampling": True}), *given)
    with monkeypatch.context() as plain:
        plain.setattr(opendit, "sampling", lambda *_, **__: torch.no_grad())
        theirs = scope["draw"](opendit.restore(model), *given)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
    # The first step of DDIM divides a random model's rounding errors by √ā = 0.006.
    assert ((rounded - theirs).norm() / theirs.norm()).item() < 0.5
