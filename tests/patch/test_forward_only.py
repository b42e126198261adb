"""A block without a backward: the same numbers as the block in parts, for every kind of parameters a block may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import opendit
from opendit.patch import adaln, core, forward_only
from opendit.patch import block as block_file
from tests.comparing import twin
from tests.patch.plain_kernels import use_plain_kernels
from tests.tiny_models import TINY, randomise

BLOCKS = [tiny for tiny in TINY if tiny.whole and not tiny.slow and tiny.name != "diffusers-affine"]
IN_PARTS = ("dit-qk-norm",)  # what normalises q and k is not one function


def sampled_model(tiny, monkeypatch, dtype=torch.float64) -> tuple[nn.Module, nn.Module, list[int]]:
    """(plain, accelerated with whole blocks, how many blocks were computed without a backward)."""
    use_plain_kernels(monkeypatch, block_file)
    monkeypatch.setattr(adaln, "resolve", lambda *_: "triton")
    plain = randomise(tiny.build()).to(dtype).eval()
    cfg = {"sampling": True, "fusion": "block", "attention": "sdpa-flash", "kernels": "reference"}
    model = opendit.accelerate(twin(plain), cfg)
    if hasattr(plain, "t_embedder"):
        plain.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: (args[0].to(mlp[0].weight.dtype),))
    computed = [0]

    def counted(*args):
        computed[0] += 1
        return forward_only.forward_only(*args)

    monkeypatch.setattr(adaln, "forward_only", counted)
    return plain, model, computed


def error(model: nn.Module, plain: nn.Module, tiny, dtype: torch.dtype) -> float:
    args, kwargs = tiny.inputs(dtype, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = (tiny.output(m(*args, **kwargs)) for m in (model, plain))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("tiny", BLOCKS, ids=[t.name for t in BLOCKS])
def test_the_same_numbers(tiny, monkeypatch):
    plain, model, computed = sampled_model(tiny, monkeypatch)
    found = error(model, plain, tiny, torch.float64)
    said = " ".join(what for _, what in core.notes(model))
    assert ("fused in parts" in said) == (tiny.name in IN_PARTS) == (computed[0] == 0)
    assert found <= 1e-12
