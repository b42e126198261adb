"""A plain DiT to be measured, where no model is given: the shapes of facebookresearch/DiT, in PyTorch's own operators.

    c = time(t) + label(y);   x = x + gate · f(LN(x)·(1 + scale) + shift),  f attention, then the MLP;   adaLN-Zero

(Peebles & Xie, arXiv 2212.09748.) It predicts as many channels as it is given. Names are those of the published
checkpoints. Nothing here knows of acceleration.

Shapes: x [B, C, I, I] latents, t [B], y [B] labels, of which num_classes means "no label"; L = (I/P)² tokens, D hidden.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# depth, hidden size, heads: arXiv 2212.09748, table 1; "Tiny" is for CPUs.
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6), "Tiny": (2, 96, 3)}
MODELS = {f"DiT-{size}/{patch}": (*SIZES[size], patch) for size in SIZES for patch in (2, 4, 8)}


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return cast(Tensor, self.proj_drop(self.proj(y.transpose(1, 2).flatten(2))))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(self.act(self.fc1(x))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_1, scale_1))
        return x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_2, scale_2))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return cast(Tensor, self.linear(modulate(self.norm_final(x), shift, scale)))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, device=t.device, dtype=torch.float32)
        angles = t[:, None].float() * torch.exp(steps * (-math.log(10000) / 128))
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return cast(Tensor, self.mlp(waves.to(cast(Tensor, self.mlp[0].weight).dtype)))


class LabelEmbedder(nn.Module):
    """A tenth of the labels become "no label" in training."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)
        self.classes = classes

    def forward(self, y: Tensor) -> Tensor:
        if self.training:
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.classes, y)
        return cast(Tensor, self.embedding_table(y))


class DiT(nn.Module):
    """One of `MODELS`, for latents of side `size`. No weight is zero: behind such gates nothing could be checked."""

    def __init__(self, name: str, size: int, channels: int = 4, classes: int = 1000) -> None:
        super().__init__()
        depth, dim, heads, self.patch = MODELS[name]
        if size % self.patch:
            raise ValueError(f"image_size: latents of {size} are no multiple of {name}'s patch {self.patch}")
        self.size, self.channels, self.num_classes = size, channels, classes
        self.x_embedder = PatchEmbed(channels, dim, self.patch)
        self.t_embedder, self.y_embedder = TimestepEmbedder(dim), LabelEmbedder(classes, dim)
        tokens = (size // self.patch) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, self.patch**2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        side: Any = self.size // self.patch
        x = self.final_layer(x, c).unflatten(1, (side, side)).unflatten(-1, (self.patch, self.patch, self.channels))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, self.size, self.size)
