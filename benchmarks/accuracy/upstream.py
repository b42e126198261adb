"""facebookresearch/DiT's own models.py and diffusion/, from a clone, unmodified.

models.py takes three layers from timm. Where timm is not installed, layers of the same names, parameters and
mathematics stand in for them, and `layers` in the record says so.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from torch import nn

from examples.models import dit


class Attention(dit.Attention):
    """timm's signature."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, **others: Any):
        if not qkv_bias or others:
            raise ValueError(f"Attention: got qkv_bias={qkv_bias} and {sorted(others)}; allowed: DiT's, qkv_bias=True")
        super().__init__(dim, num_heads)


class Mlp(dit.Mlp):
    """timm's signature."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any = nn.GELU, drop: float = 0.0):
        if drop:
            raise ValueError(f"Mlp: got drop={drop}; allowed: DiT's, 0")
        super().__init__(in_features, hidden_features)
        self.act = act_layer()


class PatchEmbed(dit.PatchEmbed):
    """timm's signature."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True):
        super().__init__(img_size, patch_size, in_chans, embed_dim)
        self.patch_size = (patch_size, patch_size)


def layers() -> str:
    """Whose layers upstream's model is made of here."""
    return "stand-ins for timm's" if importlib.util.find_spec("timm") is None else "timm's"


def check(clone: Path) -> None:
    for name in ("models.py", "diffusion/__init__.py"):
        if not (clone / name).is_file():
            raise ValueError(f"upstream: {clone} has no {name}; allowed: a clone of facebookresearch/DiT")


def load(clone: Path) -> tuple[Any, Any]:
    """models.DiT_models and diffusion.create_diffusion.

    The process is upstream's from then on: `clone` goes first on sys.path, and the stand-ins are called timm.
    """
    check(clone)
    if importlib.util.find_spec("timm") is None:
        for name in ("timm", "timm.models", "timm.models.vision_transformer"):
            sys.modules[name] = types.ModuleType(name)
        for layer in (Attention, Mlp, PatchEmbed):
            setattr(sys.modules["timm.models.vision_transformer"], layer.__name__, layer)
    sys.path.insert(0, str(clone))
    models, diffusion = importlib.import_module("models"), importlib.import_module("diffusion")
    return models.DiT_models, diffusion.create_diffusion


def commit(clone: Path) -> str:
    """The clone's, or the hash of its files where it has no history of its own."""
    done = subprocess.run(["git", "-C", clone, "log", "-1", "--format=%H", "."], capture_output=True, text=True)
    inside = subprocess.run(["git", "-C", clone, "rev-parse", "--show-prefix"], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.strip() and not inside.stdout.strip():
        return done.stdout.strip()
    digest = hashlib.sha256()
    for path in sorted([clone / "models.py", *(clone / "diffusion").glob("*.py")]):
        digest.update(path.read_bytes())
    return f"files of sha256 {digest.hexdigest()[:16]}"
