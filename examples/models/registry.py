"""The models by name: what kind of data each is for, and its constructor's arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from examples.models import families  # noqa: F401  tells opendit about PixArt
from examples.models.dit import DIT_MODELS, DiT
from examples.models.latte import LATTE_MODELS, Latte
from examples.models.pixart import PIXART_MODELS, PixArt
from examples.models.vdit import VDIT_MODELS, VDiT

ARCHITECTURES: dict[str, type[nn.Module]] = {"DiT": DiT, "PixArt": PixArt, "VDiT": VDiT, "Latte": Latte}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "image": {**DIT_MODELS, **PIXART_MODELS},
    "video": {**VDIT_MODELS, **LATTE_MODELS},
}


def architecture_of(name: str) -> str:
    return name.partition("-")[0]


def build(config: dict[str, Any]) -> nn.Module:
    """The model of a config {"architecture": …, "model": constructor arguments}."""
    return ARCHITECTURES[config.get("architecture", "DiT")](**config["model"])
