"""Imports go downwards only, so that every file can be understood from what is below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opendit"

# What each part may import of opendit; the longest matching prefix decides. Itself is always allowed.
MAY_IMPORT = {
    "opendit": {
        "opendit.api",
        "opendit.attaching",
        "opendit.calibrating",
        "opendit.checkpoint",
        "opendit.config",
        "opendit.draws",
        "opendit.ema",
        "opendit.ema_profiles",
        "opendit.ema_snapshots",
        "opendit.parallel",
        "opendit.patch.registry",
        "opendit.sampler",
        "opendit.sampling",
        "opendit.step_cache",
        "opendit.stepping",
        "opendit.training",
        "opendit.verify",
    },
    "opendit.sampling": {"opendit.patch", "opendit.step_cache", "opendit.wrapping"},
    "opendit.calibrating": {"opendit.everyone", "opendit.patch.steps", "opendit.sampling", "opendit.step_cache"},
    "opendit.step_cache": set(),
    "opendit.checkpoint": {
        "opendit",
        "opendit.attached",
        "opendit.everyone",
        "opendit.fastseq",
        "opendit.parallel",
        "opendit.patch.core",
        "opendit.pieces",
        "opendit.wrapping",
    },
    "opendit.attached": {"opendit.pieces"},
    "opendit.draws": set(),
    "opendit.sampler": {"opendit.draws"},
    "opendit.parallel": {"opendit.fastseq", "opendit.patch.core", "opendit.wrapping"},
    "opendit.__main__": {"opendit", "opendit.bench", "opendit.information"},
    "opendit.bench": {"opendit", "opendit.errors", "opendit.measuring"},
    "opendit.information": {
        "opendit",
        "opendit.attention",
        "opendit.engines",
        "opendit.fastseq",
        "opendit.kernels",
        "opendit.patch.registry",
    },
    "opendit.verify": {
        "opendit",
        "opendit.api",
        "opendit.config",
        "opendit.errors",
        "opendit.everyone",
        "opendit.fastseq",
        "opendit.measuring",
        "opendit.parallel",
        "opendit.patch.core",
        "opendit.patch.registry",
    },
    "opendit.measuring": {"opendit.doubles", "opendit.errors", "opendit.everyone", "opendit.fastseq"},
    "opendit.doubles": set(),
    "opendit.api": {
        "opendit.attaching",
        "opendit.config",
        "opendit.describing",
        "opendit.engines",
        "opendit.fastseq",
        "opendit.optim",
        "opendit.plan",
        "opendit.patch.core",
        "opendit.patch.graphs",
        "opendit.patch.lowered",
        "opendit.patch.sampled",
        "opendit.training",
        "opendit.watch",
        "opendit.wrapping",
    },
    "opendit.watch": set(),
    "opendit.training": {"opendit.config", "opendit.engines", "opendit.wrapping"},
    "opendit.wrapping": set(),
    "opendit.divided": {"opendit.pieces"},
    "opendit.divided_optimizer": {"opendit.divided"},
    "opendit.engines": {
        "opendit.config",
        "opendit.divided",
        "opendit.divided_optimizer",
        "opendit.fastseq.mesh",
        "opendit.optim",
    },
    "opendit.describing": {
        "opendit.attention",
        "opendit.kernels",
        "opendit.patch.core",
        "opendit.plan",
        "opendit.stepping",
        "opendit.wrapping",
    },
    "opendit.plan": {
        "opendit.attention",
        "opendit.config",
        "opendit.ema_profiles",
        "opendit.fastseq",
        "opendit.kernels",
        "opendit.patch",
        "opendit.stepping",
        "opendit.wrapping",
    },
    "opendit.optim": {"opendit.config"},
    "opendit.config": {"opendit.ema_profiles"},
    # Inside optimizer.step().
    "opendit.ema": {
        "opendit.wrapping",
        "opendit.everyone",
        "opendit.pieces",
        "opendit.sharded_ema",
        "opendit.stepping",
    },
    "opendit.attaching": {"opendit.attached", "opendit.ema", "opendit.ema_snapshots", "opendit.stepping"},
    "opendit.stepping": {
        "opendit.ema_profiles",
        "opendit.loss_scale",
        "opendit.nonfinite",
        "opendit.sharded_ema",
    },
    "opendit.nonfinite": {"opendit.everyone"},
    "opendit.loss_scale": {"opendit.patch.precision", "opendit.sharded_ema"},
    "opendit.sharded_ema": {"opendit.ema_profiles", "opendit.ema_snapshots", "opendit.everyone", "opendit.pieces"},
    "opendit.ema_snapshots": {"opendit.ema_profiles", "opendit.everyone"},
    "opendit.ema_profiles": set(),
    "opendit.attention": set(),
    "opendit.fastseq": set(),
    "opendit.kernels": set(),
    "opendit.patch": {"opendit.doubles"},
    "opendit.patch.adaln": {"opendit.attention", "opendit.fastseq", "opendit.kernels", "opendit.patch"},
    "opendit.patch.block": {"opendit.attention", "opendit.fastseq", "opendit.kernels", "opendit.patch.graphs"},
    "opendit.patch.diffusers_joint": {"opendit.attention", "opendit.kernels", "opendit.patch"},
    "opendit.patch.forward_only": {"opendit.attention", "opendit.fastseq", "opendit.patch"},
    "opendit.patch.sampled": {"opendit.fastseq", "opendit.patch"},
    "opendit.patch.diffusers_parts": {"opendit.attention", "opendit.kernels", "opendit.patch"},
    "opendit.patch.mlp": {"opendit.kernels", "opendit.patch"},
    "opendit.patch.norms": {"opendit.kernels", "opendit.patch"},
    "opendit.patch.rms_norm": {"opendit.kernels", "opendit.patch"},
    "opendit.patch.rotary": {"opendit.kernels", "opendit.patch"},
    "opendit.patch.spread": {"opendit.attention", "opendit.fastseq", "opendit.patch"},
    "opendit.patch.alternating": {"opendit.fastseq", "opendit.patch"},
    "opendit.patch.joint": {"opendit.fastseq", "opendit.patch"},
    "opendit.patch.rotated": {"opendit.doubles", "opendit.fastseq", "opendit.patch"},
    "opendit.patch.families": {
        "opendit.attention",
        "opendit.doubles",
        "opendit.fastseq",
        "opendit.kernels",
        "opendit.patch",
    },
}

# What each part may import from outside the standard library, at the top of its files.
OUTSIDE = {
    "opendit": {"torch", "typing_extensions"},
    "opendit.kernels": {"torch", "triton"},
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def rule(name: str, rules: dict[str, set[str]]) -> tuple[str, set[str]]:
    prefix = max((p for p in rules if name == p or name.startswith(p + ".")), key=len)
    return prefix, rules[prefix]


def imports(path: Path) -> list[tuple[str, bool]]:
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in tree.body:
        if isinstance(node, (ast.If, ast.Try)):
            top.update(id(inner) for inner in ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_downwards(name, path):
    prefix, allowed = rule(name, MAY_IMPORT)
    _, outside = rule(name, OUTSIDE)
    for imported, at_top in imports(path):
        root = imported.split(".")[0]
        if root == "opendit":
            # A package's own __init__ has no special rights: "opendit" does not mean everything below it.
            own = {prefix} if name != "opendit" else set()
            assert any(imported == a or imported.startswith(a + ".") for a in allowed | own), (
                f"{name} imports {imported}; allowed: {sorted(allowed | own)}"
            )
        elif root not in sys.stdlib_module_names and at_top:
            assert root in outside, f"{name} imports {root} at its top; allowed: {sorted(outside)}"


def test_every_module_opens_with_what_it_is_for():
    for name, path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), name


def test_importing_is_light_and_touches_nothing():
    code = (
        "import sys, time, torch\n"
        "before, state = set(sys.modules), torch.get_rng_state()\n"
        "names = {m: dict(vars(m)) for m in (torch, torch.nn, torch.nn.functional, torch.Tensor, torch.nn.Module)}\n"
        "start = time.process_time(); import opendit; took = time.process_time() - start\n"
        "heavy = {'triton', 'timm', 'diffusers', 'transformers', 'einops', 'numpy', 'flash_attn', 'colossalai',"
        " 'torch._dynamo', 'torch._inductor'}\n"
        "new = {m for m in set(sys.modules) - before if m in heavy}\n"
        "assert not new, new\n"
        "assert all(dict(vars(m)) == was for m, was in names.items())\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
        "print(took)"
    )
    took = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(took) < 0.5


@pytest.mark.parametrize("missing", [("triton",), ("diffusers", "timm", "einops", "transformers", "numpy", "triton")])
def test_works_with_torch_alone(missing):
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "import torch, opendit\nfrom tests.tiny_models import UserDiT\n"
        "model = opendit.accelerate(UserDiT())\n"
        "x, t, y = torch.randn(2, 4, 6, 6), torch.tensor([1, 2]), torch.tensor([0, 1])\n"
        "model(x, t, y).sum().backward()\n"
        "opendit.explain(model); opendit.restore(model)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert "triton" in out.stdout
