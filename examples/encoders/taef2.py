"""TAEF2, a tiny autoencoder for FLUX.2's latents (madebyollin/taesd): 3 × 8h × 8w in [0, 1] ↔ 32 × h × w.

A folder in its layout holds config.json with `"name": "TAEF2 …"`, `latent_channels`, `latent_mean`, `latent_std`, and
taef2_encoder.safetensors and taef2_decoder.safetensors, whose keys number the layers below. diffusers' AutoencoderTiny
has no place for the `pool` branch of the blocks at the lowest resolution.

    block(x) = relu(conv(relu(conv(relu(conv(x))))) + x),   with a pool branch: x ← x + pool(x) first,
    pool = 1×1 conv to 4·width, GroupNorm of 4 groups, relu, 1×1 conv back
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, pool: bool):
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.pool = None
        if pool:
            wide, back = nn.Conv2d(width, 4 * width, 1, bias=False), nn.Conv2d(4 * width, width, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * width), nn.ReLU(), back)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Latents far outside the usual range would otherwise ring: 3·tanh(z / 3)."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


def encoder(channels: int, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width, pool=False)]
    for pool in (False, False, True):
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
        layers += [Block(width, pool) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


def decoder(channels: int, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for pool in (True, False, False):
        layers += [Block(width, pool) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(width, pool=False), nn.Conv2d(width, 3, 3, padding=1))


class Taef2(nn.Module):
    """`encode` gives latents as trained, `decode` images in [0, 1] (not clamped)."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.encoder, self.decoder = encoder(channels), decoder(channels)

    @classmethod
    def load(cls, folder: Path) -> tuple[Taef2, dict]:
        config = json.loads((folder / "config.json").read_text())
        model = cls(config["latent_channels"])
        for half, module in (("encoder", model.encoder), ("decoder", model.decoder)):
            weights = load_file(folder / f"taef2_{half}.safetensors")
            module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return model, config

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)
