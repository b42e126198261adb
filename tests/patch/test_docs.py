"""The pages about families say what the code does: the example runs, the generated page is not stale."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import opendit
from opendit.patch import registry
from tools import families

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_families_page_is_what_the_plans_say():
    assert families.PAGE.read_text() == families.page(), "run python tools/families.py"


@pytest.fixture
def example():
    """What the code blocks of the guide define."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adding_a_family.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    assert len([line for line in blocks[1].splitlines() if line.strip()]) <= 30
    names: dict = {}
    try:
        for block in blocks:
            exec(block, names)
        yield names
    finally:
        registry._registered.pop("mine", None)


def results(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, c, weights = (torch.randn(s, generator=generator).double() for s in ((2, 5, 24), (2, 24), (2, 5, 24)))
    out = model(x.requires_grad_(), c.requires_grad_())
    return [out, *torch.autograd.grad((out * weights).sum(), [x, c, *model.parameters()])]


def test_the_guides_example(example):
    class OtherOrder(example["Layer"]):
        def forward(self, x, c):
            scale, shift = self.to_scale(c).chunk(2, dim=1)
            return x + self.mlp(self.norm(x) * (1 + scale[:, None]) + shift[:, None])

    model = example["Model"]().double()
    model.layers[1].__class__ = OtherOrder
    expected = results(model)
    fast = opendit.accelerate(copy.deepcopy(model))
    plan = opendit.explain(fast, file=io.StringIO())
    assert plan.family == "mine"
    assert [edit.fqn for edit in plan.edits] == ["layers.0", "layers.2"]
    assert "computes something else" in next(kept.why for kept in plan.kept if kept.fqn == "layers.1")
    for a, e in zip(results(fast), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    fast.layers[0].norm.register_forward_hook(lambda m, a, out: 2 * out)
    model.layers[0].norm.register_forward_hook(lambda m, a, out: 2 * out)
    for a, e in zip(results(fast), results(model), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_files_that_the_guide_names_exist():
    text = (DOCS / "adding_a_family.md").read_text()
    named = set(re.findall(r"`((?:opendit|tests|tools)/[\w/]+\.py)`", text)) | set(
        re.findall(r"(tests/[\w/]+\.py)", text)
    )
    missing = [name for name in named if not (DOCS.parent / name).exists()]
    assert len(named) > 8
    assert not missing
