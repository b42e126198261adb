"""PixArt-α (Chen et al., arXiv 2310.00426): a DiT that reads a text by cross-attention.

    m = t_block(time(t)) [B, 6, D];   shift, scale, gate of block i: m + scale_shift_table_i     (adaLN-single)
    x = x + gate_1 · attention(LN(x)·(1 + scale_1) + shift_1)
    x = x + cross_attention(x, text)
    x = x + gate_2 · mlp(LN(x)·(1 + scale_2) + shift_2)

Shapes: B batch, L image tokens, S text tokens, E width of the text encoder, D hidden, H heads, K = D/H. The condition
is y [B, S, E] with mask [B, S], true where there is text.

Names, shapes and numbers follow the published 256 px and 512 px checkpoints (PixArt-alpha/PixArt-alpha,
`diffusion/model/nets/PixArt.py`). The null text is the buffer `y_embedder.y_embedding` of random rows that the model is
made with; a share of the texts becomes it in training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.models.dit import SIZES, Attention, Mlp, PatchEmbed, TimestepEmbedder, drop_rows, initialize, sincos_2d


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        q_BHLK = self.q_linear(x_BLD).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        kv = self.kv_linear(text_BSD).unflatten(-1, (2, self.num_heads, self.head_dim))
        k_BHSK, v_BHSK = kv.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHSK, v_BHSK, attn_mask=mask_BS[:, None, None, :])
        return self.proj(y_BHLK.transpose(1, 2).flatten(2))


class PixArtBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, m_B6D: Tensor, mask_BS: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (self.scale_shift_table + m_B6D).chunk(6, dim=1)
        x_BLD = x_BLD + gate_1 * self.attn(self.norm1(x_BLD) * (1 + scale_1) + shift_1)
        x_BLD = x_BLD + self.cross_attn(x_BLD, text_BSD, mask_BS)
        return x_BLD + gate_2 * self.mlp(self.norm2(x_BLD) * (1 + scale_2) + shift_2)


class PixArtFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x_BLD: Tensor, t_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t_BD[:, None]).chunk(2, dim=1)
        return self.linear(self.norm_final(x_BLD) * (1 + scale) + shift)


class CaptionEmbedder(nn.Module):
    def __init__(self, text_dim: int, hidden_size: int, dropout_prob: float, max_tokens: int):
        super().__init__()
        self.y_proj = Mlp(text_dim, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.randn(max_tokens, text_dim) / text_dim**0.5)
        self.dropout_prob = dropout_prob

    def forward(self, y_BSE: Tensor, train: bool) -> Tensor:
        if y_BSE.shape[1] > len(self.y_embedding):
            raise ValueError(f"this model takes texts of up to {len(self.y_embedding)} tokens, got {y_BSE.shape[1]}")
        if train and self.dropout_prob > 0:
            y_BSE = drop_rows(y_BSE, self.dropout_prob, self.null(y_BSE))
        return self.y_proj(y_BSE)

    def null(self, y_BSE: Tensor) -> Tensor:
        return self.y_embedding[: y_BSE.shape[1]].to(y_BSE.dtype).expand_as(y_BSE)


class PixArt(nn.Module):
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        text_dim: int = 4096,
        max_tokens: int = 120,
    ):
        super().__init__()
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.learn_sigma, self.text_dim = in_channels, learn_sigma, text_dim
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, input_size // patch_size).unsqueeze(0))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(text_dim, hidden_size, class_dropout_prob, max_tokens)
        self.blocks = nn.ModuleList(PixArtBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = PixArtFinalLayer(hidden_size, patch_size, self.out_channels)
        initialize(self)
        for linear in (self.t_block[1], self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.input_size, self.input_size)

    def null_condition(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The null text, as long as each text is."""
        return {"y": self.y_embedder.null(cond["y"]), "mask": cond["mask"]}

    def unpatchify(self, x_BLO: Tensor) -> Tensor:
        side, P = self.input_size // self.patch_size, self.patch_size
        x = x_BLO.reshape(-1, side, side, P, P, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * P, side * P)

    def forward(self, x_BCII: Tensor, t_B: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x_BLD = self.x_embedder(x_BCII) + self.pos_embed
        t_BD = self.t_embedder(t_B)
        m_B6D = self.t_block(t_BD).unflatten(-1, (6, -1))
        text_BSD = self.y_embedder(y, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD, text_BSD, m_B6D, mask)
        return self.unpatchify(self.final_layer(x_BLD, t_BD))


PIXART_MODELS = {
    f"PixArt-{size}/{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in (2, 4, 8)
}
"""Constructor arguments by published name: PixArt(**PIXART_MODELS["PixArt-XL/2"], input_size=32)."""
