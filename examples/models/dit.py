"""DiT (Peebles & Xie, arXiv 2212.09748): a transformer that denoises image patches, in plain single-device PyTorch.

    c = time(t) + condition(y)                              one vector per sample conditions every block
    x = x + gate_1 · attention(LN(x)·(1 + scale_1) + shift_1)
    x = x + gate_2 · mlp(LN(x)·(1 + scale_2) + shift_2)     the six vectors are a linear map of SiLU(c), zero at first

Shapes: B batch, C channels, I image side, P patch side, L = (I/P)² tokens, D hidden, H heads, K = D/H.

y is a class label, or with `text_dim` the pooled embedding of a text [B, text_dim].

Names, shapes and numbers follow the published checkpoints (facebookresearch/DiT), which load with
`load_state_dict(..., strict=True)`; nothing in this file knows of acceleration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping P×P patches, each mapped to D channels."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"image size {input_size} is not a multiple of patch size {patch_size}")
        self.img_size = (input_size, input_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (input_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCII: Tensor) -> Tensor:
        if tuple(x_BCII.shape[-2:]) != self.img_size:
            raise ValueError(f"this model takes images of {self.img_size}, got {tuple(x_BCII.shape[-2:])}")
        return self.proj(x_BCII).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """A two-layer MLP over [cos(t·w), sin(t·w)], w_i = max_period^(-i / half); t may be fractional."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
        half = dim // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t[:, None].float() * torch.exp(steps * (-math.log(max_period) / half))
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))

    def forward(self, t_B: Tensor) -> Tensor:
        waves = self.timestep_embedding(t_B, self.frequency_embedding_size)
        # The waves need float32 (t goes to 1000); the MLP wants its own dtype after model.bfloat16().
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of num_classes rows and, when labels are dropped, one more for "no label" (index num_classes)."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)

    def null(self, labels: Tensor) -> Tensor:
        """As many times "no label"."""
        if self.embedding_table.num_embeddings == self.num_classes:
            raise ValueError("this model was built without a null label (class_dropout_prob=0): it can't be guided")
        return torch.full_like(labels, self.num_classes)


class TextEmbedder(nn.Module):
    """Maps one vector per text to D; zeros mean "no text", and stand in for a share of them in training."""

    def __init__(self, text_dim: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.proj = nn.Linear(text_dim, hidden_size)
        self.dropout_prob = dropout_prob

    def forward(self, text_BE: Tensor, train: bool) -> Tensor:
        if train and self.dropout_prob > 0:
            text_BE = drop_rows(text_BE, self.dropout_prob)
        return self.proj(text_BE)

    def null(self, text_BE: Tensor) -> Tensor:
        return torch.zeros_like(text_BE)


def drop_rows(x: Tensor, probability: float, instead: Tensor | float = 0.0) -> Tensor:
    """x [B, …] with a share of its rows replaced."""
    drop = torch.rand(len(x), device=x.device) < probability
    return torch.where(drop.view(-1, *[1] * (x.dim() - 1)), instead, x)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden size {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(x_BLD).view(B, L, 3, self.num_heads, self.head_dim)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout_p = self.attn_drop.p if self.training else 0.0
        y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, dropout_p=dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(y_BHLK.transpose(1, 2).reshape(B, L, D)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BLD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BLD = x_BLD + gate_1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BLD), shift_1, scale_1))
        x_BLD = x_BLD + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BLD), shift_2, scale_2))
        return x_BLD


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BLD), shift, scale))


class DiT(nn.Module):
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
        num_classes: int = 1000,
        learn_sigma: bool = True,
        text_dim: int | None = None,
    ):
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_heads = num_heads
        self.num_classes, self.text_dim = num_classes, text_dim

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = condition_embedder(num_classes, text_dim, hidden_size, class_dropout_prob)
        pos_embed = sincos_2d(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(pos_embed.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        initialize(self)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.input_size, self.input_size)

    def null_condition(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What classifier-free guidance leads away from, one row for each row of `cond`."""
        return {"y": self.y_embedder.null(cond["y"])}

    def unpatchify(self, x_BLF: Tensor) -> Tensor:
        """F = P·P·out_channels, in that order, becomes an image of out_channels."""
        side, P = self.input_size // self.patch_size, self.patch_size
        x = x_BLF.reshape(-1, side, side, P, P, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * P, side * P)

    def forward(self, x_BCII: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        x_BLD = self.x_embedder(x_BCII) + self.pos_embed
        c_BD = self.t_embedder(t_B) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD, c_BD)
        return self.unpatchify(self.final_layer(x_BLD, c_BD))

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance: uncond + cfg_scale·(cond − uncond).

        The batch holds every sample twice: y is the labels, then as many null labels (num_classes); the second
        half of x is ignored. The published samples guide three of the four latent channels, so that is the
        default; None guides all in_channels. The other channels, a learned variance among them, stay as predicted.
        """
        first = x[: len(x) // 2]
        out = self.forward(torch.cat([first, first]), t, y)
        guided = self.in_channels if guided_channels is None else guided_channels
        prediction, rest = out[:, :guided], out[:, guided:]
        cond, uncond = prediction.chunk(2)
        mixed = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)


def condition_embedder(
    num_classes: int, text_dim: int | None, hidden_size: int, dropout_prob: float
) -> LabelEmbedder | TextEmbedder:
    if text_dim is None:
        return LabelEmbedder(num_classes, hidden_size, dropout_prob)
    return TextEmbedder(text_dim, hidden_size, dropout_prob)


def initialize(model: nn.Module) -> None:
    """The published start: blocks are the identity where adaLN gates them, and the model's output is zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))  # as the linear map that it is
    nn.init.zeros_(model.x_embedder.proj.bias)
    tables = [model.t_embedder.mlp[0], model.t_embedder.mlp[2]]
    if isinstance(getattr(model, "y_embedder", None), LabelEmbedder):
        tables.insert(0, model.y_embedder.embedding_table)
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)
    zeroed = [
        part.adaLN_modulation[1] for part in (*model.blocks, model.final_layer) if hasattr(part, "adaLN_modulation")
    ]
    for linear in [*zeroed, model.final_layer.linear]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def sincos_1d(dim: int, length: int) -> Tensor:
    """[length, dim]: sin, then cos."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(dim: int, side: int) -> Tensor:
    """[side², dim]: the first half of the channels encodes the column, the second the row; each is sin, then cos."""
    if dim % 4:
        raise ValueError(f"hidden size {dim} is not a multiple of 4, which the position embedding needs")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1).float()


SIZES = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "Digits": {"depth": 4, "hidden_size": 128, "num_heads": 4},  # minutes on two CPU cores
}
DIT_MODELS = {f"DiT-{size}/{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in (2, 4, 8)}
"""Constructor arguments by published name: DiT(**DIT_MODELS["DiT-XL/2"], input_size=32)."""
