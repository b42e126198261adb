"""Small models in the shapes that users bring: one builder per family, and the inputs to run it on.

`UserDiT` stands for the classes of facebookresearch/DiT, SiT and fast-DiT, which live in users' own files,
on top of timm's Attention and Mlp as they were (`timm="old"`) and as they are (`timm="new"`). `UserLatte` and
`UserLatteIMG` stand for those of Vchitect/Latte, `UserLightningDiT` for those of hustvl/LightningDiT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class OldAttention(nn.Module):
    """timm's Attention before fused kernels: softmax written out, no head_dim attribute."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))


class NewAttention(OldAttention):
    """timm's Attention of today, with its extensions."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        qk_norm: type[nn.Module] | None = None,
        scale_norm: bool = False,
        gated: bool = False,
    ):
        super().__init__(dim, num_heads, qkv_bias, attn_drop)
        self.head_dim = dim // num_heads
        self.attn_dim = dim
        self.fused_attn = True
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.norm = nn.LayerNorm(dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim) if gated else None

    def forward(self, x, attn_mask=None, is_causal=False):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal
        )
        out = self.norm(out.transpose(1, 2).reshape(B, N, C))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float = 4.0, affine: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=affine, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=affine, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class Head(nn.Module):
    def __init__(self, dim: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Timesteps(nn.Module):
    """Upstream's embedder: the sinusoid is fp32 whatever the weights are."""

    def __init__(self, dim: int, frequency_embedding_size: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
        angles = t[:, None].float() * frequencies[None].float()
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t):
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size))


class Labels(nn.Module):
    def __init__(self, classes: int, dim: int, dropout: float):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)
        self.classes = classes
        self.dropout = dropout

    def forward(self, y, train):
        if train:
            y = torch.where(torch.rand(y.shape[0], device=y.device) < self.dropout, self.classes, y)
        return self.embedding_table(y)


class Patches(nn.Module):
    def __init__(self, size: int, patch: int, channels: int, dim: int):
        super().__init__()
        self.patch_size = (patch, patch)
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class UserDiT(nn.Module):
    def __init__(
        self,
        size: int = 6,
        patch: int = 2,
        channels: int = 4,
        dim: int = 48,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        classes: int = 5,
        learn_sigma: bool = True,
        drop_sigma: bool = False,
        timm: str = "new",
        affine: bool = False,
        checkpointing: bool = False,
        **attention: Any,
    ):
        super().__init__()
        self.in_channels = channels
        self.out_channels = 2 * channels if learn_sigma else channels
        self.drop_sigma = drop_sigma
        self.checkpointing = checkpointing
        self.x_embedder = Patches(size, patch, channels, dim)
        self.t_embedder = Timesteps(dim)
        self.y_embedder = Labels(classes, dim, 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, self.x_embedder.num_patches, dim) * 0.1, requires_grad=False)
        kind = OldAttention if timm == "old" else NewAttention
        self.blocks = nn.ModuleList(
            Block(dim, kind(dim, heads, **attention), mlp_ratio, affine=affine) for _ in range(depth)
        )
        self.final_layer = Head(dim, patch, self.out_channels)

    def unpatchify(self, x):
        p, side = self.x_embedder.patch_size[0], int(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], side, side, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], self.out_channels, side * p, side * p)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if self.checkpointing else block(x, c)
        x = self.unpatchify(self.final_layer(x, c))
        return x.chunk(2, dim=1)[0] if self.drop_sigma else x

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided, rest = out[:, :3], out[:, 3:]
        cond, uncond = guided.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class LatteAttention(OldAttention):
    """Latte's own Attention: one of its modes is not attention."""

    def __init__(self, dim: int, num_heads: int, attention_mode: str):
        super().__init__(dim, num_heads)
        self.attention_mode = attention_mode

    def forward(self, x):
        if self.attention_mode == "math":
            return super().forward(x)
        assert self.attention_mode == "flash"
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v).reshape(x.shape)))


class LatteTimesteps(Timesteps):
    def forward(self, t, use_fp16=False):
        sinusoid = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(sinusoid.half() if use_fp16 else sinusoid)


class UserLatte(nn.Module):
    """Videos [B, F, C, H, W]: blocks alternate between the tokens of a frame and the frames of a token.

    `extras` as upstream: 1 timestep only, 2 a class too, 78 a text embedding too.
    """

    def __init__(
        self,
        size: int = 4,
        patch: int = 2,
        channels: int = 4,
        dim: int = 48,
        depth: int = 2,
        heads: int = 4,
        frames: int = 3,
        classes: int = 5,
        extras: int = 2,
        text: int = 24,
        attention_mode: str = "math",
        frequencies: int = 32,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.out_channels = 2 * channels
        self.extras = extras
        self.checkpointing = checkpointing
        self.x_embedder = Patches(size, patch, channels, dim)
        self.t_embedder = LatteTimesteps(dim, frequencies)
        if extras == 2:
            self.y_embedder = Labels(classes, dim, 0.1)
        if extras == 78:
            self.text_embedding_projection = nn.Sequential(nn.SiLU(), nn.Linear(text, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.x_embedder.num_patches, dim), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.randn(1, frames, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, LatteAttention(dim, heads, attention_mode)) for _ in range(depth))
        self.final_layer = Head(dim, patch, self.out_channels)

    def forward(self, x, t, y=None, text_embedding=None, use_fp16=False):
        c = self.t_embedder(t, use_fp16=use_fp16)
        head = c
        if self.extras == 2:
            head = c = c + self.y_embedder(y, self.training)
        elif self.extras == 78:  # which the head is not given
            c = c + self.text_embedding_projection(text_embedding.flatten(1))
        frames, tokens = self.temp_embed.shape[1], self.pos_embed.shape[1]
        spatial, temporal = self.repeat(c, frames), self.repeat(c, tokens)
        return self.frames(x, spatial, temporal, self.repeat(head, frames), use_fp16)

    def repeat(self, c, times):
        return c.repeat_interleave(times, dim=0)

    def frames(self, x, spatial, temporal, head, use_fp16=False, images=0):
        """`images`: how many of the last frames are images of their own, which temporal blocks pass over."""
        batch = len(x)
        x = self.x_embedder((x.half() if use_fp16 else x).flatten(0, 1)) + self.pos_embed
        for i in range(0, len(self.blocks), 2):
            x = self.block(i, x, spatial)
            x = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
            x, apart = x.split([x.shape[1] - images, images], dim=1)
            x = self.block(i + 1, self.positioned(x, i), temporal)
            x = torch.cat([x, apart], dim=1).unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
        x = self.final_layer(x, head)
        p, side = self.x_embedder.patch_size[0], int(x.shape[1] ** 0.5)
        x = x.reshape(batch, -1, side, side, p, p, self.out_channels)
        return torch.einsum("bfhwpqc->bfchpwq", x).flatten(5, 6).flatten(3, 4)

    def positioned(self, x, i):
        return x + self.temp_embed if i == 0 else x

    def block(self, i, x, c):
        return checkpoint(self.blocks[i], x, c, use_reentrant=False) if self.checkpointing else self.blocks[i](x, c)

    def forward_with_cfg(self, x, t, y=None, cfg_scale=7.0, use_fp16=False, text_embedding=None):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y=y, use_fp16=use_fp16, text_embedding=text_embedding)
        guided, rest = out[:, :, :4], out[:, :, 4:]
        cond, uncond = guided.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=2)


class UserLatteIMG(UserLatte):
    """Images with labels of their own may follow each video's frames: `y_image` is one row per sample."""

    def forward(self, x, t, y=None, use_fp16=False, y_image=None, use_image_num=0):
        c = self.t_embedder(t, use_fp16=use_fp16)
        y = self.y_embedder(y, self.training)
        frames, tokens = self.temp_embed.shape[1], self.pos_embed.shape[1]
        labels = y[:, None].expand(-1, frames, -1)
        if y_image is not None:
            images = torch.cat([self.y_embedder(labels_of_one[None], self.training) for labels_of_one in y_image])
            labels = torch.cat([labels, images], dim=1)
        spatial = self.repeat(c, frames + use_image_num) + labels.flatten(0, 1)
        return self.frames(x, spatial, self.repeat(c + y, tokens), spatial, use_fp16, use_image_num)


class LightningRMSNorm(nn.Module):
    """Of Llama's descent, which computes in fp32 whatever comes; this one in fp64 too, to be compared in it."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x) * self.weight


class LightningRope(nn.Module):
    """Angles of a token's row and of its column, for pairs of neighbours."""

    def __init__(self, dim: int, side: int):
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2)[: dim // 2].float() / dim)
        angles = (torch.arange(side)[:, None] * frequencies).repeat_interleave(2, dim=1)
        rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
        table = torch.cat([rows, columns], dim=2).flatten(0, 1)
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def forward(self, t):
        a, b = t[..., ::2], t[..., 1::2]
        return t * self.freqs_cos + torch.stack([-b, a], dim=-1).flatten(-2) * self.freqs_sin


class LightningAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, norm: type[nn.Module] | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = norm(self.head_dim) if norm else nn.Identity()
        self.k_norm = norm(self.head_dim) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LightningBlock(nn.Module):
    def __init__(self, dim: int, heads: int, rms: bool, qk_norm: bool, swiglu: bool, wo_shift: bool):
        super().__init__()
        self.norm1, self.norm2 = (lightning_norm(dim, rms) for _ in range(2))
        norm = LightningRMSNorm if rms else nn.LayerNorm
        self.attn = LightningAttention(dim, heads, norm if qk_norm else None)
        self.mlp = SwiGLUFFN(dim, int(2 / 3 * 4 * dim)) if swiglu else Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (4 if wo_shift else 6) * dim))
        self.wo_shift = wo_shift

    def forward(self, x, c, feat_rope=None):
        chunks = [m.unsqueeze(1) for m in self.adaLN_modulation(c).chunk(4 if self.wo_shift else 6, dim=1)]
        if self.wo_shift:
            scale_a, gate_a, scale_m, gate_m = chunks
            shift_a = shift_m = 0
        else:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rope=feat_rope)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


def lightning_norm(dim: int, rms: bool) -> nn.Module:
    return LightningRMSNorm(dim) if rms else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class UserLightningDiT(UserDiT):
    def __init__(
        self,
        size: int = 6,
        dim: int = 48,
        depth: int = 2,
        heads: int = 4,
        use_qknorm: bool = False,
        use_swiglu: bool = False,
        use_rope: bool = False,
        use_rmsnorm: bool = False,
        wo_shift: bool = False,
        learn_sigma: bool = False,
        frequencies: int = 32,
        checkpointing: bool = False,
    ):
        super().__init__(size, dim=dim, depth=0, heads=heads, learn_sigma=learn_sigma, drop_sigma=learn_sigma)
        self.checkpointing = checkpointing
        self.t_embedder = Timesteps(dim, frequencies)
        self.feat_rope = LightningRope(dim // heads // 2, size // 2) if use_rope else None
        self.blocks = nn.ModuleList(
            LightningBlock(dim, heads, use_rmsnorm, use_qknorm, use_swiglu, wo_shift) for _ in range(depth)
        )
        self.final_layer.norm_final = lightning_norm(dim, use_rmsnorm)

    def forward(self, x, t=None, y=None):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            args = (x, c, self.feat_rope)
            x = checkpoint(block, *args, use_reentrant=False) if self.checkpointing else block(*args)
        x = self.unpatchify(self.final_layer(x, c))
        return x.chunk(2, dim=1)[0] if self.drop_sigma else x


@dataclass(frozen=True)
class Tiny:
    """A small model of a family, and the arguments it is called with."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype, torch.device], tuple[tuple[Any, ...], dict[str, Any]]]
    output: Callable[[Any], torch.Tensor] = field(default=lambda out: out)
    whole: bool = True  # whether its blocks can be fused as one function
    slow: bool = False  # a variant that shows little beyond others of its family
    rounds: bool = False  # whether its own forward rounds to fp32 what comes in fp64


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a value of the order of trained ones: no gate is zero, nothing is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(fan_in, 1) ** 0.5)
    return model


def _dit_inputs(size: int = 6, batch: int = 3, channels: int = 4, classes: int = 5):
    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, channels, size, size, generator=generator).to(device, dtype)
        t = torch.tensor([0, 17, 999][:batch], device=device)
        y = torch.tensor([0, classes - 1, 2][:batch], device=device)
        return (x, t, y), {}

    return inputs


def _latte_inputs(extras: int, size: int = 4, frames: int = 3, batch: int = 2, text: tuple[int, ...] = (3, 8)):
    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, frames, 4, size, size, generator=generator).to(device, dtype)
        t = torch.tensor([17, 999, 0][:batch], device=device)
        if extras == 78:
            return (x, t), {"text_embedding": torch.randn(batch, *text, generator=generator).to(device, dtype)}
        return (x, t, *([torch.tensor([0, 4, 2][:batch], device=device)] if extras == 2 else [])), {}

    return inputs


def _latte_img_inputs(dtype: torch.dtype, device: torch.device, frames: int = 3, images: int = 2):
    (x, t, y), _ = _latte_inputs(2, frames=frames + images)(dtype, device)
    return (x, t, y), {"y_image": [torch.arange(images, device=device) + i for i in (1, 3)], "use_image_num": images}


def _example_dit() -> nn.Module:
    from examples.models.dit import DiT

    return DiT(input_size=6, patch_size=2, hidden_size=48, depth=2, num_heads=4, num_classes=5)


def _diffusers_dit(**options: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 2,
        "sample_size": 6,
        "num_embeds_ada_norm": 5,
        "out_channels": 8,
        "norm_num_groups": 1,
    }
    return DiTTransformer2DModel(**{**config, **options})


def _diffusers_inputs(dtype: torch.dtype, device: torch.device):
    (x, t, y), _ = _dit_inputs()(dtype, device)
    return (x,), {"timestep": t, "class_labels": y}


def _pixart(**options: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 2,
        "sample_size": 6,
        "cross_attention_dim": 48,
        "caption_channels": 10,
        "norm_num_groups": 1,
    }
    return PixArtTransformer2DModel(**{**config, **options})


def _pixart_inputs(text: int, height: int = 6, width: int = 6, sizes: bool = False, masked: bool = True):
    """Text of 5 tokens, of which the samples have 5, 3 and 1; with `sizes`, micro-conditions too."""

    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 4, height, width, generator=generator).to(device, dtype)
        more: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(3, 5, text, generator=generator).to(device, dtype),
            "timestep": torch.tensor([0, 17, 999], device=device),
        }
        if masked:
            more["encoder_attention_mask"] = (torch.arange(5) < torch.tensor([[5], [3], [1]])).to(device)
        if sizes:
            more["added_cond_kwargs"] = {
                "resolution": torch.tensor([[512.0, 512.0], [1024.0, 512.0], [256.0, 768.0]]).to(device, dtype),
                "aspect_ratio": torch.tensor([[1.0], [2.0], [0.33]]).to(device, dtype),
            }
        return (x,), more

    return inputs


def _diffusers_latte(**options: Any) -> nn.Module:
    from diffusers import LatteTransformer3DModel

    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 48,
        "attention_bias": True,
        "sample_size": 4,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 10,
        "video_length": 3,
    }
    return LatteTransformer3DModel(**{**config, **options})


def _diffusers_latte_inputs(frames: int = 3, height: int = 4, width: int = 4, masked: bool = True):
    """The model repeats its text for every frame, but not the mask: pipelines pass one row per frame, or none."""

    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, frames, height, width, generator=generator).to(device, dtype)
        text = torch.randn(2, 5, 10, generator=generator).to(device, dtype)
        more: dict[str, Any] = {"timestep": torch.tensor([17, 999], device=device), "encoder_hidden_states": text}
        if masked:
            keep = (torch.arange(5) < torch.tensor([[5], [2]])).to(device)
            more["encoder_attention_mask"] = ((~keep)[:, None].to(dtype) * -10000.0).repeat_interleave(frames, 0)
        return (x,), more

    return inputs


def _sd3(**options: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 6,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 10,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**{**config, **options})


def _sd3_inputs(height: int = 6, width: int = 6):
    """Text of 5 tokens, and what is pooled of it."""

    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 4, height, width, generator=generator).to(device, dtype)
        text = torch.randn(3, 5, 10, generator=generator).to(device, dtype)
        pooled = torch.randn(3, 12, generator=generator).to(device, dtype)
        t = torch.tensor([0, 17, 999], device=device)
        return (x,), {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t}

    return inputs


def _flux(**options: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    config = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 10,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**config, **options})


def _flux_inputs(height: int = 3, width: int = 3, guided: bool = True):
    """Tokens of height × width patches, text of 5 tokens, and where each of them is."""

    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, height * width, 8, generator=generator).to(device, dtype)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        more: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(3, 5, 10, generator=generator).to(device, dtype),
            "pooled_projections": torch.randn(3, 12, generator=generator).to(device, dtype),
            "timestep": torch.tensor([0.25, 0.5, 1.0], device=device).to(dtype),
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(device, dtype),
            "txt_ids": torch.zeros(5, 3, device=device, dtype=dtype),
        }
        if guided:
            more["guidance"] = torch.tensor([1.0, 3.5, 0.0], device=device).to(dtype)
        return (x,), more

    return inputs


def _wan(**options: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 10,
        "freq_dim": 16,
        "ffn_dim": 52,
        "num_layers": 2,
        "rope_max_seq_len": 16,
    }
    return WanTransformer3DModel(**{**config, **options})


def _wan_inputs(frames: int = 3, height: int = 2, width: int = 6, text: int = 5, image: int | None = None):
    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, frames, height, width, generator=generator).to(device, dtype)
        more: dict[str, Any] = {
            "timestep": torch.tensor([17, 999], device=device),
            "encoder_hidden_states": torch.randn(2, text, 10, generator=generator).to(device, dtype),
        }
        if image is not None:
            more["encoder_hidden_states_image"] = torch.randn(2, image, 14, generator=generator).to(device, dtype)
        return (x,), more

    return inputs


def _cogvideox(**options: Any) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 20,
        "text_embed_dim": 10,
        "num_layers": 2,
        "sample_width": 6,
        "sample_height": 2,
        "sample_frames": 9,
        "max_text_seq_length": 5,
    }
    return CogVideoXTransformer3DModel(**{**config, **options})


def _cogvideox_inputs(frames: int = 3, height: int = 2, width: int = 6, turned: int | None = None, ofs: bool = False):
    """`turned`: K, for rotary positions; `ofs`: an offset, as the 1.5 model that starts from an image takes it."""

    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, frames, 4, height, width, generator=generator).to(device, dtype)
        text = torch.randn(2, 5, 10, generator=generator).to(device, dtype)
        more: dict[str, Any] = {"timestep": torch.tensor([17, 999], device=device), "encoder_hidden_states": text}
        if turned is not None:
            tokens = frames * height * width // (8 if ofs else 4)
            angles = torch.randn(tokens, turned // 2, generator=generator).to(device).repeat_interleave(2, 1)
            more["image_rotary_emb"] = angles.cos().to(dtype), angles.sin().to(dtype)
        if ofs:
            more["ofs"] = torch.tensor([2.0, 3.0], device=device)
        return (x,), more

    return inputs


def _hunyuan_video(**options: Any) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "rope_axes_dim": (4, 6, 6),
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 10,
        "pooled_projection_dim": 7,
    }
    return HunyuanVideoTransformer3DModel(**{**config, **options})


def _hunyuan_video_inputs(frames: int = 3, height: int = 2, width: int = 6, guided: bool = True):
    """Text of 5 tokens, of which the samples have 5 and 2."""

    def inputs(dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, frames, height, width, generator=generator).to(device, dtype)
        more: dict[str, Any] = {
            "timestep": torch.tensor([17, 999], device=device),
            "encoder_hidden_states": torch.randn(2, 5, 10, generator=generator).to(device, dtype),
            "encoder_attention_mask": (torch.arange(5) < torch.tensor([[5], [2]])).long().to(device),
            "pooled_projections": torch.randn(2, 7, generator=generator).to(device, dtype),
        }
        if guided:
            more["guidance"] = torch.tensor([6000.0, 1000.0], device=device)
        return (x,), more

    return inputs


def _sample(out: Any) -> torch.Tensor:
    return out.sample


_PUBLISHED = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}

TINY = [
    Tiny("dit", "dit", lambda: UserDiT(), _dit_inputs()),
    Tiny("dit-old-timm", "dit", lambda: UserDiT(timm="old"), _dit_inputs()),
    Tiny("dit-qk-norm", "dit", lambda: UserDiT(qk_norm=nn.LayerNorm, affine=True), _dit_inputs()),
    Tiny("sit-odd", "dit", lambda: UserDiT(dim=60, heads=3, depth=3, mlp_ratio=2.5, drop_sigma=True), _dit_inputs()),
    Tiny("fast-dit-patch4", "dit", lambda: UserDiT(size=8, patch=4, checkpointing=True), _dit_inputs(8)),
    Tiny("dit-patch8", "dit", lambda: UserDiT(size=24, patch=8, learn_sigma=False), _dit_inputs(24)),
    Tiny("example", "dit", _example_dit, _dit_inputs()),
    Tiny("latte", "latte", lambda: UserLatte(depth=4), _latte_inputs(2)),
    Tiny("latte-time-only", "latte", lambda: UserLatte(extras=1, dim=60, heads=3), _latte_inputs(1)),
    Tiny("latte-text", "latte", lambda: UserLatte(extras=78), _latte_inputs(78)),
    Tiny("latte-img", "latte", lambda: UserLatteIMG(), _latte_img_inputs),
    Tiny("lightningdit", "lightningdit", lambda: UserLightningDiT(**_PUBLISHED), _dit_inputs(), whole=False),
    Tiny(
        "lightningdit-qk-norm",  # and without shifts
        "lightningdit",
        lambda: UserLightningDiT(**_PUBLISHED, use_qknorm=True, wo_shift=True, dim=60, heads=3, learn_sigma=True),
        _dit_inputs(),
        whole=False,
    ),
    Tiny(
        "lightningdit-layernorm",
        "lightningdit",
        lambda: UserLightningDiT(use_qknorm=True, use_rope=True, size=10),
        _dit_inputs(10),
        whole=False,
        slow=True,
    ),
    Tiny("lightningdit-plain", "lightningdit", lambda: UserLightningDiT(), _dit_inputs(), slow=True),
    Tiny("diffusers", "diffusers_dit", _diffusers_dit, _diffusers_inputs, _sample),
    Tiny(
        "diffusers-affine",
        "diffusers_dit",
        lambda: _diffusers_dit(norm_elementwise_affine=True, attention_bias=False, norm_eps=1e-3),
        _diffusers_inputs,
        _sample,
    ),
    Tiny("pixart", "diffusers_pixart", _pixart, _pixart_inputs(10), _sample, whole=False),
    Tiny(
        "pixart-sizes",  # wide, with micro-conditions, text as wide as it comes, weights in the norms
        "diffusers_pixart",
        lambda: _pixart(
            num_attention_heads=4,
            attention_head_dim=12,
            use_additional_conditions=True,
            attention_bias=False,
            caption_channels=None,
            cross_attention_dim=20,
            norm_elementwise_affine=True,
            norm_eps=1e-3,
        ),
        _pixart_inputs(20, 4, 10, sizes=True, masked=False),
        _sample,
        whole=False,
    ),
    Tiny("diffusers-latte", "diffusers_latte", _diffusers_latte, _diffusers_latte_inputs(), _sample, whole=False),
    Tiny(
        "diffusers-latte-wide",
        "diffusers_latte",
        lambda: _diffusers_latte(attention_bias=False, num_attention_heads=4, attention_head_dim=12, video_length=2),
        _diffusers_latte_inputs(2, 4, 6, masked=False),
        _sample,
        whole=False,
        slow=True,
    ),
    Tiny(  # q and k normalised, a second attention in the first of its blocks, as in SD3.5 medium
        "sd3.5",
        "diffusers_sd3",
        lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0,), num_attention_heads=6, attention_head_dim=8),
        _sd3_inputs(4, 10),
        _sample,
        whole=False,
    ),
    Tiny("sd3", "diffusers_sd3", _sd3, _sd3_inputs(), _sample, whole=False, slow=True),
    Tiny("flux", "diffusers_flux", _flux, _flux_inputs(), _sample, whole=False),
    Tiny(
        "flux-schnell",  # without guidance
        "diffusers_flux",
        lambda: _flux(
            guidance_embeds=False,
            num_attention_heads=4,
            attention_head_dim=12,
            axes_dims_rope=(4, 4, 4),
            num_layers=2,
            num_single_layers=2,
        ),
        _flux_inputs(2, 4, guided=False),
        _sample,
        whole=False,
        slow=True,
    ),
    Tiny("wan", "diffusers_wan", _wan, _wan_inputs(), _sample, whole=False, rounds=True),
    Tiny(
        "wan-image",  # an image's tokens beside the text's, no norm before them
        "diffusers_wan",
        lambda: _wan(num_attention_heads=4, cross_attn_norm=False, image_dim=14, added_kv_proj_dim=48),
        _wan_inputs(2, 4, 6, text=512, image=4),
        _sample,
        whole=False,
        slow=True,
        rounds=True,
    ),
    Tiny("cogvideox", "diffusers_cogvideox", _cogvideox, _cogvideox_inputs(), _sample, whole=False, rounds=True),
    Tiny(
        "cogvideox-rotary",  # version 1.5: rotary positions, patches of two frames, norms without weights
        "diffusers_cogvideox",
        lambda: _cogvideox(
            num_attention_heads=4,
            attention_head_dim=12,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            ofs_embed_dim=20,
            patch_bias=False,
            norm_elementwise_affine=False,
            attention_bias=False,
        ),
        _cogvideox_inputs(6, 2, 6, turned=12, ofs=True),
        _sample,
        whole=False,
        slow=True,
        rounds=True,
    ),
    Tiny(
        "hunyuan-video",
        "diffusers_hunyuan_video",
        _hunyuan_video,
        _hunyuan_video_inputs(),
        _sample,
        whole=False,
        rounds=True,
    ),
]
