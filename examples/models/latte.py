"""Latte (Ma et al., arXiv 2401.03048): videos, with blocks that alternate between space and time.

    for pairs of blocks:  x [B·F, T, D] ← spatial(x, c);   x → [B·T, F, D];   x ← x + temp_embed (first pair only)
                          x [B·T, F, D] ← temporal(x, c);  x → [B·F, T, D]

B batch, F frames, T = (I/P)² tokens of a frame, D hidden; videos are [B, F, C, I, I]. Block, head and condition are as
in DiT.

Names, shapes and numbers follow the published checkpoints (Vchitect/Latte, `models/latte.py`). What conditions the
model is `extras` there: 1 the timestep only, 2 a class too, 78 a text too, whose embedding (77·768 numbers in the
published one, `text_dim` here) is mapped by `text_embedding_projection` and which the head is not given.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.models.dit import (
    SIZES,
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    drop_rows,
    initialize,
    sincos_1d,
    sincos_2d,
)


class LatteAttention(Attention):
    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.attention_mode = "math"  # of upstream's modes, the one whose function this is


class Latte(nn.Module):
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        extras: int = 2,
        text_dim: int = 77 * 768,
    ):
        super().__init__()
        if depth % 2:
            raise ValueError(f"depth {depth} is odd; Latte's blocks come in pairs, one for space and one for time")
        if extras not in (1, 2, 78):
            raise ValueError(f"extras {extras}: there are 1 (timestep only), 2 (class) and 78 (text)")
        self.input_size, self.num_frames, self.patch_size = input_size, num_frames, patch_size
        self.in_channels, self.learn_sigma = in_channels, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.extras, self.class_dropout_prob = num_classes, extras, class_dropout_prob
        self.text_dim = text_dim if extras == 78 else None

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if extras == 2:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        if extras == 78:
            self.text_embedding_projection = nn.Sequential(nn.SiLU(), nn.Linear(text_dim, hidden_size))
        space, time = sincos_2d(hidden_size, input_size // patch_size), sincos_1d(hidden_size, num_frames)
        self.pos_embed = nn.Parameter(space.unsqueeze(0), requires_grad=False)
        self.temp_embed = nn.Parameter(time.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        for block in self.blocks:
            block.attn = LatteAttention(hidden_size, num_heads)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        initialize(self)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.num_frames, self.in_channels, self.input_size, self.input_size)

    def null_condition(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The null label; for texts, zeros, which are what training drops a share of the texts to."""
        if self.extras == 1:
            raise ValueError("this Latte has no condition (extras=1), so there is nothing to guide")
        if self.extras == 2:
            return {"y": self.y_embedder.null(cond["y"])}
        return {"text_embedding": torch.zeros_like(cond["text_embedding"])}

    def unpatchify(self, x_NTO: Tensor) -> Tensor:
        """O = P·P·out_channels, in that order; N = B·F frames."""
        side, P = self.input_size // self.patch_size, self.patch_size
        x = x_NTO.reshape(-1, side, side, P, P, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.num_frames, self.out_channels, side * P, side * P)

    def forward(
        self, x_BFCII: Tensor, t_B: Tensor, y: Tensor | None = None, text_embedding: Tensor | None = None
    ) -> Tensor:
        B, F, T = len(x_BFCII), self.num_frames, self.pos_embed.shape[1]
        if tuple(x_BFCII.shape[1:]) != self.sample_shape:
            raise ValueError(f"this model takes videos of {self.sample_shape}, got {tuple(x_BFCII.shape[1:])}")
        head_BD = c_BD = self.t_embedder(t_B)
        if self.extras == 2:
            head_BD = c_BD = c_BD + self.y_embedder(y, self.training)
        elif self.extras == 78:
            if self.training and self.class_dropout_prob > 0:
                text_embedding = drop_rows(text_embedding, self.class_dropout_prob)
            c_BD = c_BD + self.text_embedding_projection(text_embedding.flatten(1))
        spatial, temporal = c_BD.repeat_interleave(F, dim=0), c_BD.repeat_interleave(T, dim=0)

        x = self.x_embedder(x_BFCII.flatten(0, 1)) + self.pos_embed
        for i in range(0, len(self.blocks), 2):
            x = self.blocks[i](x, spatial)
            x = x.unflatten(0, (B, F)).transpose(1, 2).flatten(0, 1)
            if i == 0:
                x = x + self.temp_embed
            x = self.blocks[i + 1](x, temporal)
            x = x.unflatten(0, (B, T)).transpose(1, 2).flatten(0, 1)
        return self.unpatchify(self.final_layer(x, head_BD.repeat_interleave(F, dim=0)))


LATTE_MODELS = {f"Latte-{size}/{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in (2, 4, 8)}
"""Constructor arguments by published name: Latte(**LATTE_MODELS["Latte-XL/2"], num_frames=16)."""
