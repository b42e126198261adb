"""Against the real files of facebookresearch/DiT, SiT and fast-DiT, where a copy of them is at hand.

OPENDIT_UPSTREAM names a folder with clones `DiT`, `SiT`, `fast-DiT`; timm must be importable. None of it is part of
this project, so without them these tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import opendit
from opendit.kernels.backend import INTERPRETING
from tests.comparing import relative_errors, run, twin, worst
from tests.patch.test_families import total
from tests.tiny_models import Tiny, _dit_inputs, randomise

FOLDER = Path(os.environ.get("OPENDIT_UPSTREAM", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="OPENDIT_UPSTREAM names no folder with clones")

SMALL = {"input_size": 8, "depth": 3, "hidden_size": 96, "num_heads": 4, "num_classes": 10}


def load(repository: str, module: str):
    pytest.importorskip("timm")
    sys.path.insert(0, str(FOLDER / repository))
    try:
        for name in [n for n in sys.modules if n.split(".")[0] in ("models", "diffusion")]:
            del sys.modules[name]
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(FOLDER / repository))


def tiny(repository: str, cls: str, **options) -> Tiny:
    models = load(repository, "models")
    return Tiny(repository, "dit", lambda: getattr(models, cls)(**{**SMALL, **options}), _dit_inputs(8, classes=10))


CASES = [
    ("DiT", "DiT", {}),
    ("DiT", "DiT", {"patch_size": 4, "learn_sigma": False}),
    ("DiT", "DiT", {"input_size": 8, "patch_size": 8, "hidden_size": 72, "num_heads": 2, "mlp_ratio": 3.0}),
    ("SiT", "SiT", {}),
    ("fast-DiT", "DiT", {}),
]
each_case = pytest.mark.parametrize(("repository", "cls", "options"), CASES)


def build(case: Tiny, dtype: torch.dtype, device: torch.device):
    model = randomise(case.build()).to(device, dtype)
    model.t_embedder.mlp.register_forward_pre_hook(lambda m, a: (a[0].to(m[0].weight.dtype),))
    return model


@each_case
def test_fp64(repository, cls, options, device):
    case = tiny(repository, cls, **options)
    model = build(case, torch.float64, device)
    error, name = worst(run(opendit.accelerate(twin(model)), case), run(model, case))
    assert error <= 1e-10, name


@each_case
def test_fp32_kernels(repository, cls, options, device):
    if device.type == "cpu" and not INTERPRETING:
        pytest.skip("the kernels are compiled for the GPU here")
    case = tiny(repository, cls, **options)
    model = build(case, torch.float32, device)
    torch.backends.cudnn.allow_tf32 = False
    plan = opendit.explain(opendit.accelerate(fast := twin(model), {"kernels": "triton"}))
    assert {f"blocks.{i}" for i in range(3)} | {"final_layer"} <= {edit.fqn for edit in plan.edits}
    assert {f"blocks.{i}.attn" for i in range(3)} <= {edit.fqn for edit in plan.edits}
    error, name = worst(run(fast, case), run(model, case))
    assert error <= 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize(("repository", "cls"), [("DiT", "DiT"), ("SiT", "SiT"), ("fast-DiT", "DiT")])
def test_published_size_in_bf16(repository, cls):
    case = Tiny(
        repository,
        "dit",
        lambda: getattr(load(repository, "models"), cls)(depth=28, hidden_size=1152, num_heads=16),
        _dit_inputs(32, classes=1000),
    )
    model = build(case, torch.float32, torch.device("cuda"))
    truth = run(model, case)
    theirs = relative_errors(run(model, case, autocast=torch.bfloat16), truth)
    ours = relative_errors(run(opendit.accelerate(model), case, autocast=torch.bfloat16), truth)
    print(f"{repository}: error of bf16 {total(theirs):.2e} plain, {total(ours):.2e} accelerated")
    assert total(ours) <= 1.2 * total(theirs)


def test_upstreams_own_training_losses(device):
    """facebookresearch/DiT's own diffusion and loop, with the accelerate line and without."""
    create_diffusion = load("DiT", "diffusion").create_diffusion
    case = tiny("DiT", "DiT")
    plain = build(case, torch.float32, device)
    fast = twin(plain)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, weight_decay=0) for m in (plain, fast)]
    fast, optimizers[1] = opendit.accelerate(fast, optimizer=optimizers[1])
    curves = []
    for model, optimizer in zip((plain, fast), optimizers, strict=True):
        diffusion = create_diffusion(timestep_respacing="")
        torch.manual_seed(0)
        losses = []
        for _ in range(20):
            x = torch.randn(8, 4, 8, 8, device=device)
            y = torch.randint(0, 10, (8,), device=device)
            t = torch.randint(0, diffusion.num_timesteps, (8,), device=device)
            loss = diffusion.training_losses(model.train(), x, t, {"y": y})["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
