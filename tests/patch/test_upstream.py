"""Against the real files of facebookresearch/DiT, SiT, fast-DiT, Vchitect/Latte and hustvl/LightningDiT, where a copy
of them is at hand.

OPENDIT_UPSTREAM names a folder with clones `DiT`, `SiT`, `fast-DiT`, `Latte`, `LightningDiT`; timm (and einops, for the
last) must be importable. None of it is part of this project, so without them these tests are skipped, each without its
clone.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import opendit
from opendit.kernels.backend import INTERPRETING
from opendit.patch.core import notes
from tests.comparing import relative_errors, run, twin, worst
from tests.patch.test_families import total
from tests.tiny_models import (
    LightningRMSNorm,
    Tiny,
    UserLatte,
    UserLatteIMG,
    UserLightningDiT,
    _dit_inputs,
    _latte_img_inputs,
    _latte_inputs,
    randomise,
)

FOLDER = Path(os.environ.get("OPENDIT_UPSTREAM", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="OPENDIT_UPSTREAM names no folder with clones")

SMALL = {"input_size": 8, "depth": 3, "hidden_size": 96, "num_heads": 4, "num_classes": 10}


def load(repository: str, module: str):
    pytest.importorskip("timm")
    if not (FOLDER / repository).is_dir():
        pytest.skip(f"{FOLDER} has no clone {repository}")
    sys.path.insert(0, str(FOLDER / repository))
    try:
        for name in [n for n in sys.modules if n.split(".")[0] in ("models", "diffusion", "latte", "latte_img")]:
            del sys.modules[name]
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(FOLDER / repository))


def tiny(repository: str, cls: str, **options) -> Tiny:
    if repository == "Latte":
        return latte(cls, **options)
    models = load(repository, "models")
    return Tiny(repository, "dit", lambda: getattr(models, cls)(**{**SMALL, **options}), _dit_inputs(8, classes=10))


SMALL_LATTE = {"input_size": 4, "depth": 4, "hidden_size": 96, "num_heads": 4, "num_classes": 5, "num_frames": 3}


def latte(cls: str, **options) -> Tiny:
    # Its package imports all models, another one's dependencies too, so its files are imported by themselves.
    models = load("Latte/models", "latte_img" if cls == "LatteIMG" else "latte")
    extras = options.get("extras", 2)
    inputs = _latte_img_inputs if cls == "LatteIMG" else _latte_inputs(extras, text=(77, 768))
    return Tiny(cls, "latte", lambda: models.Latte(**{**SMALL_LATTE, "extras": 2, **options}), inputs)


CASES = [
    ("DiT", "DiT", {}),
    ("DiT", "DiT", {"patch_size": 4, "learn_sigma": False}),
    ("DiT", "DiT", {"input_size": 8, "patch_size": 8, "hidden_size": 72, "num_heads": 2, "mlp_ratio": 3.0}),
    ("SiT", "SiT", {}),
    ("fast-DiT", "DiT", {}),
    ("Latte", "Latte", {}),
    ("Latte", "Latte", {"extras": 1, "hidden_size": 72, "num_heads": 3, "depth": 2, "learn_sigma": False}),
    ("Latte", "Latte", {"extras": 78, "patch_size": 1}),
    ("Latte", "LatteIMG", {}),
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
    changed = {edit.fqn for edit in plan.edits}
    assert {f"blocks.{i}{part}" for i in range(len(model.blocks)) for part in ("", ".attn", ".mlp")} <= changed
    assert {"final_layer", "t_embedder"} <= changed
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
    losses_alike(plain, fast, create_diffusion(timestep_respacing=""), (8, 4, 8, 8), classes=10)


def losses_alike(plain: nn.Module, fast: nn.Module, diffusion, shape: tuple[int, ...], classes: int) -> None:
    device = next(plain.parameters()).device
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, weight_decay=0) for m in (plain, fast)]
    fast, optimizers[1] = opendit.accelerate(fast, optimizer=optimizers[1])
    curves = []
    for model, optimizer in zip((plain, fast), optimizers, strict=True):
        torch.manual_seed(0)
        losses = []
        for _ in range(20):
            x = torch.randn(shape, device=device)
            y = torch.randint(0, classes, shape[:1], device=device)
            t = torch.randint(0, diffusion.num_timesteps, shape[:1], device=device)
            loss = diffusion.training_losses(model.train(), x, t, {"y": y})["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


LATTES = [("Latte", extras, UserLatte) for extras in (1, 2, 78)] + [("LatteIMG", 2, UserLatteIMG)]


@pytest.mark.parametrize(("cls", "extras", "own"), LATTES)
def test_our_latte_is_theirs(cls, extras, own):
    """The tiny models that the other tests stand on compute what upstream's compute, all gradients too."""
    case = latte(cls, extras=extras)
    same = replace(case, build=lambda: own(dim=96, depth=4, extras=extras, text=77 * 768, frequencies=256))
    theirs, ours = (build(c, torch.float64, torch.device("cpu")) for c in (case, same))
    ours.load_state_dict(theirs.state_dict())
    error, name = worst(run(ours, case), run(theirs, case))
    assert error <= 1e-10, name


@pytest.mark.parametrize("extras", [1, 2, 78])
def test_latte_sampling(extras, device):
    case = latte("Latte", extras=extras)
    model = build(case, torch.float64, device).eval()
    args, more = case.inputs(torch.float64, device)
    expected = model.forward_with_cfg(*args, cfg_scale=3.0, **more)
    found = opendit.accelerate(model).forward_with_cfg(*args, cfg_scale=3.0, **more)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("cls", "mode", "reason"),
    [
        ("Latte", "flash", "heads and tokens are mixed"),
        ("Latte", "xformers", "'xformers' needs GPU kernels"),
        ("LatteIMG", "xformers", "'xformers' needs GPU kernels"),
    ],
)
def test_lattes_other_modes_are_left_alone(cls, mode, reason):
    case = latte(cls, attention_mode=mode)
    model = build(case, torch.float32, torch.device("cpu"))
    kind = type(model.blocks[0].attn)
    expected = run(model, case) if mode == "flash" else {}
    opendit.accelerate(model)
    left = {kept.fqn: kept.why for kept in opendit.explain(model).kept}
    assert all(type(block.attn) is kind for block in model.blocks)
    assert all(reason in left[f"blocks.{i}.attn"] for i in range(4))
    if expected:
        error, name = worst(run(model, case), expected)
        assert error <= 1e-5, name


def test_lattes_own_training_losses(device):
    """Vchitect/Latte's own diffusion and loss, with the accelerate line and without."""
    create_diffusion = load("Latte", "diffusion").create_diffusion
    case = latte("Latte")
    plain = build(case, torch.float32, device)
    fast = twin(plain)
    losses_alike(plain, fast, create_diffusion(timestep_respacing=""), (4, 3, 4, 4, 4), classes=5)


# -- LightningDiT ------------------------------------------------------------------------------------------------------

SMALL_LIGHTNING = {"input_size": 6, "patch_size": 2, "in_channels": 4, "depth": 2, "num_classes": 5}
LIGHTNING = [
    {},
    {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True},  # as its published configs have it
    {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "use_qknorm": True, "wo_shift": True},
    {"use_rope": True, "use_qknorm": True, "learn_sigma": True},
    {"use_swiglu": True, "wo_shift": True},
    {"use_rope": True, "use_checkpoint": True},
]
each_option = pytest.mark.parametrize("options", LIGHTNING, ids=lambda options: "-".join(options) or "none")


@pytest.fixture
def eager():
    """Upstream's torch.compile decorators do nothing meanwhile: what is compared is what is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def lightning(dim: int = 96, heads: int = 4, **options) -> Tiny:
    # Its norm's file imports model-parallel layers that it does not use.
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel", "fairscale.nn.model_parallel.initialize"):
        sys.modules.setdefault(name, types.ModuleType(name))
    layers = types.ModuleType("fairscale.nn.model_parallel.layers")
    for name in ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear"):
        setattr(layers, name, None)
    sys.modules.setdefault(layers.__name__, layers)
    models = load("LightningDiT", "models.lightningdit")
    sizes = {**SMALL_LIGHTNING, "hidden_size": dim, "num_heads": heads}
    return Tiny("LightningDiT", "lightningdit", lambda: models.LightningDiT(**sizes, **options), _dit_inputs())


def in_full(model: nn.Module) -> nn.Module:
    """Its norms compute in fp32 whatever comes, so that in fp64 only rounding would be compared: as ours in tests."""
    for module in model.modules():
        if type(module).__name__ == "RMSNorm" and type(module).__module__ == "models.rmsnorm":
            module.__class__ = LightningRMSNorm
    return model


@each_option
def test_our_lightningdit_is_theirs(options, eager):
    case = lightning(**options)
    known = {"use_swiglu", "use_rope", "use_rmsnorm", "use_qknorm", "wo_shift", "learn_sigma"}
    mine = {name: value for name, value in options.items() if name in known}
    same = replace(case, build=lambda: UserLightningDiT(dim=96, frequencies=256, **mine))
    theirs, ours = (build(c, torch.float64, torch.device("cpu")) for c in (case, same))
    ours.load_state_dict(theirs.state_dict())
    error, name = worst(run(ours, case), run(in_full(theirs), case))
    assert error <= 1e-10, name


@each_option
@pytest.mark.parametrize("full", [True, False], ids=["norms-in-full", "norms-as-they-are"])
def test_lightningdit_fp64(options, full, eager, device):
    case = lightning(**options)
    model = build(case, torch.float64, device)
    model = in_full(model) if full else model
    fast = opendit.accelerate(twin(model))
    changed = {edit.fqn for edit in opendit.explain(fast).edits}
    assert {f"blocks.{i}{part}" for i in range(2) for part in ("", ".attn", ".mlp")} <= changed
    assert {"final_layer", "t_embedder"} <= changed
    # Where norms of q and k round to fp32, their sums feel the layout of memory.
    rounded = not full and options.keys() >= {"use_rmsnorm", "use_qknorm"}
    error, name = worst(run(fast, case), run(model, case))
    assert error <= (1e-6 if rounded else 1e-10), name
    assert not list(notes(fast))


@each_option
def test_lightningdit_fp32_kernels(options, eager, device):
    if device.type == "cpu" and not INTERPRETING:
        pytest.skip("the kernels are compiled for the GPU here")
    case = lightning(**options)
    model = build(case, torch.float32, device)
    torch.backends.cudnn.allow_tf32 = False
    error, name = worst(run(opendit.accelerate(twin(model), {"kernels": "triton"}), case), run(model, case))
    assert error <= 1e-5, name


@each_option
def test_lightningdit_sampling(options, eager, device):
    case = lightning(**options)
    model = in_full(build(case, torch.float64, device)).eval()
    (x, t, y), _ = case.inputs(torch.float64, device)
    args = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 5)]), 3.0, True, 10
    with torch.no_grad():
        expected = model.forward_with_cfg(*args)
        found = opendit.accelerate(model).forward_with_cfg(*args)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
def test_published_lightningdit_in_bf16(eager):
    case = lightning(1152, 16, **LIGHTNING[1])
    case = replace(case, inputs=_dit_inputs(6, batch=3))
    model = build(case, torch.float32, torch.device("cuda"))
    truth = run(model, case)
    theirs = relative_errors(run(model, case, autocast=torch.bfloat16), truth)
    ours = relative_errors(run(opendit.accelerate(model), case, autocast=torch.bfloat16), truth)
    assert total(ours) <= 1.2 * total(theirs)
