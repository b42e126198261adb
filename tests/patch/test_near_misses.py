"""Models that are nearly of a family compute exactly what they computed: the odd part is fused or left, never wrong.

A near-miss takes a healthy tiny model and makes one thing odd in it. `left` names the modules that must not be edited,
with a reason in the plan; `fused` those that must be edited all the same, since their mixin computes the odd thing too.
"""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opendit
from opendit.patch import planner
from tests.comparing import build, run, worst
from tests.tiny_models import TINY, LightningBlock, LightningRMSNorm, Mlp, NewAttention, modulate, randomise

F64 = torch.float64
BY_NAME = {t.name: t for t in TINY}


@dataclass(frozen=True)
class NearMiss:
    name: str
    base: str
    make: Callable[[Any], None]
    left: tuple[str, ...]
    fused: tuple[str, ...]
    alters: bool  # whether what the model computes is changed by it
    slow: bool  # of a kind that another one shows


MISSES: list[NearMiss] = []


def miss(*bases: str, left: str = "", fused: str = "", alters: bool = True, slow: bool = False):
    def register(make: Callable[[Any], None]):
        for base in bases:
            name = f"{base}: {make.__name__.replace('_', ' ')}"
            MISSES.append(NearMiss(name, base, make, tuple(left.split()), tuple(fused.split()), alters, slow))
        return make

    return register


def becomes(module: nn.Module, forward: Callable, **more: Any) -> None:
    """A subclass of the module's own class with another forward, as a user would write it."""
    module.__class__ = type(f"Odd{type(module).__name__}", (type(module),), {"forward": forward, **more})


def parts(block: nn.Module, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(m.unsqueeze(1) for m in block.adaLN_modulation(c).chunk(6, dim=1))


# -- blocks that users write: DiT's and Latte's ------------------------------------------------------------------------

users = ("dit", "latte")


@miss(*users, left="blocks.1", fused="blocks.0 blocks.1.attn blocks.1.mlp")
def chunks_swapped(model):
    def forward(self, x, c):
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = parts(self, c)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", left="blocks.1")
def gates_before_scales(model):
    def forward(self, x, c):
        gate_a, shift_a, scale_a, gate_m, shift_m, scale_m = parts(self, c)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", left="blocks.1")
def gate_through_tanh(model):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(self, c)
        x = x + gate_a.tanh() * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m.tanh() * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", left="blocks.1")
def norm_after_the_sublayer(model):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(self, c)
        x = x + gate_a * (self.norm1(self.attn(x)) * (1 + scale_a) + shift_a)
        return x + gate_m * (self.norm2(self.mlp(x)) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", "latte", left="blocks.1")
def sublayers_beside_each_other(model):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(self, c)
        a = self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_a * a + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", left="blocks.1")
def residual_of_the_normed_input(model):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(self, c)
        h = self.norm1(x) * (1 + scale_a) + shift_a
        x = h + gate_a * self.attn(h)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", left="blocks.1")
def output_clamped(model):
    super_forward = type(model.blocks[1]).forward
    becomes(model.blocks[1], lambda self, x, c: super_forward(self, x, c).clamp(-0.5, 0.5))


@miss("dit", left="blocks.1", alters=False)
def condition_without_gradient(model):
    super_forward = type(model.blocks[1]).forward
    becomes(model.blocks[1], lambda self, x, c: super_forward(self, x, c.detach()))


@miss("dit", left="blocks.1")
def calm_in_evaluation_only(model):
    super_forward = type(model.blocks[1]).forward
    becomes(model.blocks[1], lambda self, x, c: super_forward(self, x, c) * (0.5 if self.training else 1.0))


@miss("dit", left="blocks.1", alters=False)
def computes_in_single_precision(model):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(self, c)
        x = x + gate_a * self.attn(self.norm1(x.float()).to(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss("dit", left="blocks.1", alters=False)
def a_part_too_many(model):
    model.blocks[1].norm3 = nn.LayerNorm(48)


@miss("dit", left="blocks.1", alters=False)
def an_attribute_that_forward_may_read(model):
    model.blocks[1].layer_scale = 1.0


@miss("dit", left="blocks.1")
def forward_on_the_instance(model):
    inner = model.blocks[1].forward
    model.blocks[1].forward = lambda x, c: 2 * inner(x, c)


@miss("dit", left="blocks.1")
def root_mean_square_norm(model):
    model.blocks[1].norm1 = nn.RMSNorm(48, eps=1e-6)


@miss("dit", left="blocks.1")
def norm_that_doubles(model):
    becomes(model.blocks[1].norm2, lambda self, x: 2 * nn.LayerNorm.forward(self, x))


@miss("dit", fused="blocks.1")
def norms_with_other_eps(model):
    model.blocks[1].norm1.eps, model.blocks[1].norm2.eps = 1e-1, 1e-2


@miss("dit", fused="blocks.1")
def norms_with_weights_and_no_bias(model):
    model.blocks[1].norm1, model.blocks[1].norm2 = (nn.LayerNorm(48, bias=False) for _ in range(2))


@miss("dit", left="blocks.1", alters=False)
def one_norm_for_both(model):
    model.blocks[1].norm2 = model.blocks[1].norm1


@miss("dit", "latte", fused="blocks.1")
def modulation_without_bias(model):
    model.blocks[1].adaLN_modulation[1] = nn.Linear(48, 288, bias=False)


@miss("dit", fused="blocks.1")
def modulation_by_gelu(model):
    model.blocks[1].adaLN_modulation[0] = nn.GELU()


@miss("dit", fused="blocks.1")
def modulation_of_two_layers(model):
    model.blocks[1].adaLN_modulation.insert(1, nn.Linear(48, 48))


# -- attention and MLPs that users write -------------------------------------------------------------------------------


@miss("dit-old-timm", "latte", left="blocks.1.attn", fused="blocks.1")
def attention_with_another_scale(model):
    model.blocks[1].attn.scale = 1.0


@miss("dit", left="blocks.1.attn", fused="blocks.1")
def attention_that_adds_its_input(model):
    super_forward = type(model.blocks[1].attn).forward
    becomes(model.blocks[1].attn, lambda self, x, *a, **k: x + super_forward(self, x, *a, **k))


@miss("dit", left="blocks.1.attn")
def causal_attention(model):
    super_forward = type(model.blocks[1].attn).forward
    becomes(model.blocks[1].attn, lambda self, x, attn_mask=None: super_forward(self, x, None, True))


@miss("dit", left="blocks.1.attn")
def attention_with_its_heads_cut_otherwise(model):
    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    becomes(model.blocks[1].attn, forward)


@miss("dit", left="blocks.1.attn")
def attention_with_keys_and_values_swapped(model):
    def forward(self, x, attn_mask=None, is_causal=False):
        q, v, k = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    becomes(model.blocks[1].attn, forward)


@miss("dit", fused="blocks.1.attn")
def attention_without_biases(model):
    model.blocks[1].attn.qkv, model.blocks[1].attn.proj = nn.Linear(48, 144, bias=False), nn.Linear(48, 48, bias=False)


@miss("dit", fused="blocks.1.attn")
def attention_that_normalises_queries_only(model):
    model.blocks[1].attn.q_norm = nn.RMSNorm(12)


@miss("dit", left="blocks.1.attn")
def attention_that_normalises_its_output(model):
    model.blocks[1].attn.norm = nn.LayerNorm(48)


@miss("dit", left="blocks.1.attn")
def attention_with_a_gate(model):
    model.blocks[1].attn = NewAttention(48, 4, gated=True)


@miss("dit", fused="blocks.1.attn")
def attention_with_a_linear_that_scales(model):
    becomes(model.blocks[1].attn.qkv, lambda self, x: 2 * nn.Linear.forward(self, x))


@miss("dit", fused="blocks.1.attn", alters=False)
def attention_with_parametrised_weights(model):
    nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv)


@miss("dit", "latte", left="blocks.1.mlp", fused="blocks.1")
def mlp_with_relu(model):
    model.blocks[1].mlp.act = nn.ReLU()


@miss("dit", fused="blocks.1.mlp")
def mlp_with_exact_gelu(model):
    model.blocks[1].mlp.act = nn.GELU()


@miss("dit", left="blocks.1.mlp")
def mlp_with_a_norm(model):
    model.blocks[1].mlp.norm = nn.LayerNorm(192)


@miss("dit", fused="blocks.1.mlp")
def mlp_without_bias(model):
    model.blocks[1].mlp.fc1 = nn.Linear(48, 192, bias=False)


@miss("dit", left="blocks.1 blocks.1.mlp", fused="blocks.1.attn")
def a_block_like_lightningdits(model):
    """Root mean square norms, rotated q and k, a gated MLP: today the attention runs as its own forward has it."""

    def rotate(x):
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / torch.arange(1, 7, dtype=x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def attention(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (q, k) if rope is None else (rope(q), rope(k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, c, rope=rotate):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(self, c)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rope=rope)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    block = model.blocks[1]
    block.norm1, block.norm2 = nn.RMSNorm(48), nn.RMSNorm(48)
    block.attn.q_norm, block.attn.k_norm = nn.RMSNorm(12), nn.RMSNorm(12)
    becomes(block.attn, attention)
    becomes(block, forward)
    mlp_with_a_gate(model)


@miss("dit", left="blocks.1.mlp", fused="blocks.1")
def mlp_with_a_gate(model):
    def forward(self, x):
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(a) * b)

    model.blocks[1].mlp = mlp = Mlp(48, 192)
    mlp.fc2 = nn.Linear(96, 48)
    becomes(mlp, forward)


@miss("dit", left="blocks.1.mlp")
def mlp_that_doubles(model):
    becomes(model.blocks[1].mlp, lambda self, x: 2 * Mlp.forward(self, x))


# -- LightningDiT's: norms, rotation, gated MLPs -----------------------------------------------------------------------

light, light_qk = "lightningdit", "lightningdit-qk-norm"


@miss(light, left="blocks.1", fused="blocks.0 blocks.1.attn blocks.1.mlp")
def shift_and_scale_swapped(model):
    def forward(self, x, c, feat_rope=None):
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = parts(self, c)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rope=feat_rope)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)

    becomes(model.blocks[1], forward)


@miss(light_qk, left="blocks.1", fused="blocks.0 blocks.1.attn", slow=True)
def gates_before_scales_without_shifts(model):
    def forward(self, x, c, feat_rope=None):
        gate_a, scale_a, gate_m, scale_m = (m.unsqueeze(1) for m in self.adaLN_modulation(c).chunk(4, dim=1))
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a), rope=feat_rope)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m))

    becomes(model.blocks[1], forward)


@miss(light, fused="blocks.0 blocks.1 blocks.1.attn blocks.1.mlp")
def one_block_without_shifts(model):
    model.blocks[1] = LightningBlock(48, 4, rms=True, qk_norm=True, swiglu=False, wo_shift=True)


@miss(light, left="blocks.1")
def a_block_that_turns_nothing(model):
    super_forward = type(model.blocks[1]).forward
    becomes(model.blocks[1], lambda self, x, c, feat_rope=None: super_forward(self, x, c))


@miss(light, left="blocks.1", alters=False, slow=True)
def a_block_with_an_attribute_of_its_own(model):
    model.blocks[1].depth = 1


@miss(light, left="blocks.1 blocks.1.norm1", fused="blocks.1.attn")
def norm_less_its_mean(model):
    super_forward = LightningRMSNorm.forward
    becomes(model.blocks[1].norm1, lambda self, x: super_forward(self, x - x.mean(-1, keepdim=True)))


@miss(light, left="blocks.1 blocks.1.norm2", fused="blocks.1.attn")
def norm_with_one_plus_its_weight(model):
    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)

    becomes(model.blocks[1].norm2, forward)


@miss(light, left="blocks.1 blocks.1.norm1")
def norm_with_its_eps_outside_the_root(model):
    model.blocks[1].norm1.eps = 1e-2
    becomes(
        model.blocks[1].norm1, lambda self, x: x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight
    )


@miss(light, left="blocks.1 blocks.1.norm1", slow=True)
def norm_of_groups(model):
    def forward(self, x):
        groups = x.unflatten(-1, (2, -1))
        return (groups * (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight

    becomes(model.blocks[1].norm1, forward)


@miss(light, left="blocks.1", fused="blocks.1.attn blocks.1.mlp")
def one_norm_of_either_kind(model):
    model.blocks[1].norm2 = nn.LayerNorm(48, elementwise_affine=False, eps=1e-6)


@miss(light, fused="blocks.1 blocks.1.norm1 blocks.1.norm2")
def torchs_own_root_mean_square_norms(model):
    model.blocks[1].norm1, model.blocks[1].norm2 = (nn.RMSNorm(48, eps=1e-2) for _ in range(2))


@miss(light, left="final_layer", fused="blocks.1")
def head_without_a_shift(model):
    def forward(self, x, c):
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(c).chunk(2, dim=1)[1].unsqueeze(1)))

    becomes(model.final_layer, forward)


def attention_as(model, forward):
    becomes(model.blocks[1].attn, lambda self, x, rope=None: forward(self, x, rope))


def heads(self, x):
    return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


def attended(self, q, k, v):
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@miss(light_qk, left="blocks.1.attn", fused="blocks.1")
def turned_before_they_are_normalised(model):
    def forward(self, x, rope):
        q, k, v = heads(self, x)
        return attended(self, self.q_norm(rope(q) if rope else q), self.k_norm(rope(k) if rope else k), v)

    attention_as(model, forward)


@miss(light, left="blocks.1.attn")
def values_turned_too(model):
    def forward(self, x, rope):
        return attended(self, *(rope(t) if rope else t for t in heads(self, x)))

    attention_as(model, forward)


@miss(light, left="blocks.1.attn", slow=True)
def keys_alone_are_turned(model):
    def forward(self, x, rope):
        q, k, v = heads(self, x)
        return attended(self, q, rope(k) if rope else k, v)

    attention_as(model, forward)


@miss(light_qk, left="blocks.1.attn", slow=True)
def keys_normalised_as_queries(model):
    def forward(self, x, rope):
        q, k, v = heads(self, x)
        q, k = self.q_norm(q), self.q_norm(k)
        return attended(self, *((rope(q), rope(k)) if rope else (q, k)), v)

    attention_as(model, forward)


@miss(light_qk, left="blocks.1.attn")
def normalised_across_heads(model):
    def forward(self, x, rope):
        def over_all(t, norm):
            return t * (t.square().mean((1, 3), keepdim=True) + norm.eps).rsqrt() * norm.weight

        q, k, v = heads(self, x)
        q, k = over_all(q, self.q_norm), over_all(k, self.k_norm)
        return attended(self, *((rope(q), rope(k)) if rope else (q, k)), v)

    attention_as(model, forward)


@miss(light_qk, fused="blocks.1.attn")
def queries_alone_normalised(model):
    model.blocks[1].attn.k_norm = nn.Identity()


@miss(light_qk, fused="blocks.1.attn", slow=True)
def another_eps_for_keys(model):
    model.blocks[1].attn.k_norm.eps = 1e-1


@miss(light_qk, fused="blocks.1.attn")
def queries_and_keys_normalised_by_two_kinds(model):
    model.blocks[1].attn.k_norm = nn.LayerNorm(20)


@miss(light_qk, fused="blocks.1.attn", slow=True)
def heads_normalised_by_what_is_not_known(model):
    becomes(model.blocks[1].attn.q_norm, lambda self, x: torch.tanh(x) * self.weight)


@miss(light, fused="feat_rope blocks.0.attn blocks.1.attn")
def pairs_half_a_head_apart(model):
    def forward(self, t):
        a, b = t.chunk(2, dim=-1)
        return t * self.freqs_cos + torch.cat([-b, a], dim=-1) * self.freqs_sin

    becomes(model.feat_rope, forward)


@miss(light, left="feat_rope blocks.0.attn blocks.1.attn", fused="blocks.0 blocks.1")
def turned_the_other_way(model):
    def forward(self, t):
        a, b = t[..., ::2], t[..., 1::2]
        return t * self.freqs_cos - torch.stack([-b, a], dim=-1).flatten(-2) * self.freqs_sin

    becomes(model.feat_rope, forward)


@miss(light, left="feat_rope blocks.0.attn", fused="blocks.0", slow=True)
def half_of_a_head_is_turned(model):
    def forward(self, t):
        still, moving = t.chunk(2, dim=-1)
        n = moving.shape[-1]
        a, b = moving[..., ::2], moving[..., 1::2]
        turned = torch.stack([-b, a], dim=-1).flatten(-2)
        return torch.cat([still, moving * self.freqs_cos[:, n:] + turned * self.freqs_sin[:, n:]], dim=-1)

    becomes(model.feat_rope, forward)


@miss(light, left="feat_rope blocks.0.attn")
def angles_that_are_learned(model):
    rope = model.feat_rope
    for name in ("freqs_cos", "freqs_sin"):
        table = getattr(rope, name)
        delattr(rope, name)
        setattr(rope, name, nn.Parameter(table))


@miss(light, left="blocks.1.mlp", fused="blocks.1 blocks.0.mlp")
def gate_and_value_swapped(model):
    def forward(self, x):
        b, a = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)

    becomes(model.blocks[1].mlp, forward)


@miss(light, left="blocks.1.mlp")
def gated_by_gelu(model):
    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.gelu(a) * b)

    becomes(model.blocks[1].mlp, forward)


@miss(light, left="blocks.1.mlp", slow=True)
def gates_and_values_interleaved(model):
    becomes(model.blocks[1].mlp, lambda self, x: self.w3(F.silu(self.w12(x)[..., ::2]) * self.w12(x)[..., 1::2]))


@miss(light, fused="blocks.1.mlp", slow=True)
def gated_without_biases(model):
    model.blocks[1].mlp.w12, model.blocks[1].mlp.w3 = nn.Linear(48, 64, bias=False), nn.Linear(32, 48, bias=False)


# -- heads, timesteps, models ------------------------------------------------------------------------------------------


@miss("dit", "latte", left="final_layer", fused="blocks.0 blocks.1")
def head_with_chunks_swapped(model):
    def forward(self, x, c):
        scale, shift = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

    becomes(model.final_layer, forward)


@miss("dit", left="final_layer")
def head_with_an_activation(model):
    super_forward = type(model.final_layer).forward
    becomes(model.final_layer, lambda self, x, c: super_forward(self, x, c).tanh())


@miss("dit", fused="final_layer")
def head_with_a_norm_of_its_own(model):
    model.final_layer.norm_final = nn.LayerNorm(48, eps=1e-3)


@miss("dit", left="t_embedder")
def timesteps_scaled(model):
    embedder = model.t_embedder
    becomes(embedder, lambda self, t: self.mlp(self.timestep_embedding(t, self.frequency_embedding_size) * 2))


@miss("dit", fused="t_embedder")
def timesteps_with_sine_first(model):
    embedding = type(model.t_embedder).timestep_embedding
    swapped = staticmethod(lambda t, dim, max_period=10000: embedding(t, dim, max_period).flip(-1))
    becomes(model.t_embedder, type(model.t_embedder).forward, timestep_embedding=swapped)


@miss("dit", fused="blocks.0 blocks.1 final_layer")
def model_that_runs_its_blocks_twice(model):
    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in (*self.blocks, *self.blocks):
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    becomes(model, forward)


@miss("dit", fused="blocks.1 blocks.1.attn", alters=False)
def the_same_block_twice(model):
    model.blocks[0] = model.blocks[1]


# -- diffusers' --------------------------------------------------------------------------------------------------------

theirs = ("diffusers", "pixart", "diffusers-latte")
single = ("pixart", "diffusers-latte")


@miss(*theirs, left="transformer_blocks.1", fused="transformer_blocks.0")
def subclass_of_the_block(model):
    super_forward = type(model.transformer_blocks[1]).forward
    becomes(model.transformer_blocks[1], lambda self, x, *a, **k: 0.5 * super_forward(self, x, *a, **k))


@miss(*theirs, left="transformer_blocks.1")
def block_with_another_forward(model):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + type(self).forward(self, hidden_states, *args, **kwargs)

    block = model.transformer_blocks[1]
    block.forward = types.MethodType(forward, block)


@miss(*theirs, left="transformer_blocks.1.attn1")
def attention_with_a_processor_of_ones_own(model):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Doubling(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    model.transformer_blocks[1].attn1.set_processor(Doubling())


@miss(*theirs, left="transformer_blocks.1.attn1", fused="transformer_blocks.1")
def attention_with_norms_on_queries(model):
    model.transformer_blocks[1].attn1.norm_q = nn.LayerNorm(16)


@miss(*theirs, left="transformer_blocks.1.attn1", fused="transformer_blocks.1")
def attention_with_a_residual(model):
    model.transformer_blocks[1].attn1.residual_connection = True


@miss(*theirs, fused="transformer_blocks.1.attn1")
def attention_with_a_factor(model):
    model.transformer_blocks[1].attn1.rescale_output_factor = 3.0


@miss("diffusers", "pixart", fused="transformer_blocks.1.attn1", alters=False)
def attention_with_dropout(model):
    model.transformer_blocks[1].attn1.to_out[1].p = 0.5


@miss(*theirs, fused="transformer_blocks.1")
def norm_of_the_feed_forward_with_weights(model):
    name = "norm3" if hasattr(model.transformer_blocks[1], "norm3") else "norm2"
    setattr(model.transformer_blocks[1], name, nn.LayerNorm(48, eps=1e-2))


@miss(*theirs, left="transformer_blocks.1")
def root_mean_square_norm_before_the_feed_forward(model):
    name = "norm3" if hasattr(model.transformer_blocks[1], "norm3") else "norm2"
    setattr(model.transformer_blocks[1], name, nn.RMSNorm(48, eps=1e-6))


@miss(*theirs, left="transformer_blocks.1.ff", fused="transformer_blocks.1")
def feed_forward_with_a_gate(model):
    from diffusers.models.attention import FeedForward

    model.transformer_blocks[1].ff = FeedForward(48, activation_fn="geglu")


@miss(*theirs, fused="transformer_blocks.1.ff")
def feed_forward_with_exact_gelu(model):
    model.transformer_blocks[1].ff.net[0].approximate = "none"


@miss("pixart", left="transformer_blocks.1.ff")
def feed_forward_with_a_final_dropout(model):
    model.transformer_blocks[1].ff.net.append(nn.Dropout(0.0))
    model.transformer_blocks[1].ff.net.append(nn.Linear(48, 48))


@miss("pixart", "diffusers-latte", left="transformer_blocks.1.attn2", fused="transformer_blocks.1")
def text_attention_with_a_residual(model):
    model.transformer_blocks[1].attn2.residual_connection = True


@miss("pixart", left="transformer_blocks.1.attn2")
def text_attention_with_a_normed_text(model):
    model.transformer_blocks[1].attn2.norm_cross = nn.LayerNorm(48)


@miss(*single, fused="transformer_blocks.1 transformer_blocks.1.attn1")
def no_text_attention_in_a_block(model):
    model.transformer_blocks[1].attn2 = None


@miss("pixart", fused="transformer_blocks.1", alters=False)
def a_frozen_table(model):
    model.transformer_blocks[1].scale_shift_table.requires_grad_(False)


@miss(*single, left="transformer_blocks.1")
def block_with_positions_of_its_own(model):
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    model.transformer_blocks[1].pos_embed = SinusoidalPositionalEmbedding(48, max_seq_length=80)


@miss("pixart", left="transformer_blocks.1", alters=False)
def block_with_grounding(model):
    model.transformer_blocks[1].fuser = nn.Identity()


@miss("diffusers-latte", fused="temporal_transformer_blocks.1")
def temporal_block_that_attends_to_text(model):
    from diffusers.models.attention import BasicTransformerBlock

    other = BasicTransformerBlock(
        48,
        3,
        16,
        cross_attention_dim=48,
        norm_type="ada_norm_single",
        activation_fn="gelu",
        norm_elementwise_affine=True,
    )
    model.temporal_transformer_blocks[1] = other.to(F64)


@miss("pixart", fused="transformer_blocks.0 transformer_blocks.1")
def subclass_of_the_model(model):
    super_forward = type(model).forward

    def forward(self, hidden_states, *args, **kwargs):
        return super_forward(self, 2 * hidden_states, *args, **kwargs)

    becomes(model, forward)


# -- parts of blocks that are modules of one's own, without the parts of diffusers' ------------------------------------


class Modulated(nn.Module):
    """An adaptive norm: what is normed, and `more` vectors [B, D] with it."""

    def __init__(self, more: int):
        super().__init__()
        self.more, self.made_of = more, nn.Linear(48, (2 + more) * 48)

    def forward(self, x, emb):
        scale, shift, *others = self.made_of(emb.tanh()).chunk(2 + self.more, dim=1)
        x = x.tanh() * scale[:, None] + shift[:, None]
        return (x, *others) if others else x


@miss("sd3", left="transformer_blocks.0", fused="transformer_blocks.0.attn transformer_blocks.1")
def norm_of_the_text_of_ones_own(model):
    model.transformer_blocks[0].norm1_context = Modulated(4)


@miss("flux", left="transformer_blocks.0", fused="transformer_blocks.0.attn single_transformer_blocks.0")
def norm_of_the_image_of_ones_own(model):
    model.transformer_blocks[0].norm1 = Modulated(4)


@miss("flux", left="single_transformer_blocks.0", fused="single_transformer_blocks.0.attn transformer_blocks.0")
def norm_of_one_stream_of_ones_own(model):
    model.single_transformer_blocks[0].norm = Modulated(1)


@miss("sd3", left="norm_out", fused="transformer_blocks.1.norm1_context")
def the_last_norm_of_ones_own(model):
    model.norm_out = Modulated(0)


@miss("sd3", left="transformer_blocks.0.ff", fused="transformer_blocks.0")
@miss("wan", left="blocks.1.ffn", fused="blocks.1")
def feed_forward_of_ones_own(model):
    block, name, width = (
        (model.blocks[1], "ffn", 36) if hasattr(model, "blocks") else (model.transformer_blocks[0], "ff", 48)
    )
    setattr(block, name, nn.Sequential(nn.Linear(width, 52), nn.SiLU(), nn.Linear(52, width)))


# -- blocks of two streams: diffusers' SD3 -----------------------------------------------------------------------------


@miss("sd3", left="transformer_blocks.0", fused="transformer_blocks.1")
def block_that_halves(model):
    super_forward = type(model.transformer_blocks[0]).forward
    becomes(model.transformer_blocks[0], lambda self, *a, **k: tuple(0.5 * x for x in super_forward(self, *a, **k)))


@miss("sd3", left="transformer_blocks.0")
def block_with_another_forward_on_it(model):
    block = model.transformer_blocks[0]

    def forward(self, hidden_states, *args, **kwargs):
        return type(self).forward(self, 2 * hidden_states, *args, **kwargs)

    block.forward = types.MethodType(forward, block)


@miss("sd3", left="transformer_blocks.0", fused="transformer_blocks.0.attn transformer_blocks.0.ff")
def adaptive_norm_of_the_text_with_chunks_swapped(model):
    super_forward = type(model.transformer_blocks[0].norm1_context).forward

    def forward(self, x, *args, **kwargs):
        x, gate_a, shift_m, scale_m, gate_m = super_forward(self, x, *args, **kwargs)
        return x, gate_m, shift_m, scale_m, gate_a

    becomes(model.transformer_blocks[0].norm1_context, forward)


@miss("sd3", left="transformer_blocks.0")
def adaptive_norm_in_single_precision(model):
    from diffusers.models.normalization import FP32LayerNorm

    model.transformer_blocks[0].norm1.norm = FP32LayerNorm(48, eps=1e-3, elementwise_affine=False)


@miss("sd3", fused="transformer_blocks.0")
def adaptive_norm_with_another_activation(model):
    model.transformer_blocks[0].norm1_context.silu = nn.GELU()


@miss("sd3", fused="transformer_blocks.0", alters=False)
def modulation_without_a_bias(model):
    model.transformer_blocks[0].norm1.linear = nn.Linear(48, 6 * 48, bias=False)


@miss("sd3", fused="transformer_blocks.0 transformer_blocks.1")
def plain_norms_with_weights_and_other_eps(model):
    model.transformer_blocks[0].norm2_context = nn.LayerNorm(48, eps=1e-2)
    model.transformer_blocks[1].norm2 = nn.LayerNorm(48, eps=1e-2)


@miss("sd3", left="transformer_blocks.1.norm1_context", fused="transformer_blocks.1")
def the_last_text_normed_with_chunks_swapped(model):
    def forward(self, x, c):
        shift, scale = self.linear(self.silu(c)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None] + shift[:, None]

    becomes(model.transformer_blocks[1].norm1_context, forward)


@miss("sd3", left="norm_out")
def the_last_norm_by_root_mean_square(model):
    from diffusers.models.normalization import AdaLayerNormContinuous

    model.norm_out = AdaLayerNormContinuous(48, 48, elementwise_affine=False, norm_type="rms_norm")


@miss("sd3", left="transformer_blocks.0.attn", fused="transformer_blocks.0")
def joint_attention_with_a_processor_of_ones_own(model):
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    class Doubling(JointAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return tuple(2 * y for y in super().__call__(*args, **kwargs))

    model.transformer_blocks[0].attn.set_processor(Doubling())


@miss("sd3", fused="transformer_blocks.0.attn transformer_blocks.0")
def joint_attention_that_normalises_the_texts_queries_only(model):
    model.transformer_blocks[0].attn.norm_added_q = nn.LayerNorm(16)


@miss("sd3", left="transformer_blocks.0.attn", fused="transformer_blocks.0")
def joint_attention_with_norms_across_heads(model):
    attn = model.transformer_blocks[0].attn
    attn.norm_q = nn.Softmax(dim=1)  # of [B, H, L, K]


@miss("sd3", fused="transformer_blocks.0.attn")
def joint_attention_with_fewer_heads(model):
    model.transformer_blocks[0].attn.heads = 2


@miss("sd3", left="transformer_blocks.0.ff_context", fused="transformer_blocks.0 transformer_blocks.0.ff")
def feed_forward_of_the_text_with_a_gate(model):
    from diffusers.models.attention import FeedForward

    model.transformer_blocks[0].ff_context = FeedForward(48, activation_fn="geglu")


# -- of two streams and of one: diffusers' Flux ------------------------------------------------------------------------

double, one = "transformer_blocks.0", "single_transformer_blocks.0"


@miss("flux", left=double, fused=one)
def block_of_two_streams_that_halves(model):
    super_forward = type(model.transformer_blocks[0]).forward
    becomes(model.transformer_blocks[0], lambda self, *a, **k: tuple(0.5 * x for x in super_forward(self, *a, **k)))


@miss("flux", left=one, fused=double)
def block_of_one_stream_that_halves(model):
    block = model.single_transformer_blocks[0]
    super_forward = type(block).forward
    becomes(block, lambda self, *a, **k: tuple(0.5 * x for x in super_forward(self, *a, **k)))


@miss("flux", left=one, fused=f"{one}.attn")
def norm_of_one_stream_with_chunks_swapped(model):
    def forward(self, x, emb=None):
        gate, scale, shift = self.linear(self.silu(emb)).chunk(3, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate

    becomes(model.single_transformer_blocks[0].norm, forward)


@miss("flux", left=one, fused=f"{one}.attn")
def one_stream_with_relu(model):
    model.single_transformer_blocks[0].act_mlp = nn.ReLU()


@miss("flux", fused=one)
def one_stream_with_exact_gelu(model):
    model.single_transformer_blocks[0].act_mlp = nn.GELU()


@miss("flux", fused=f"{double}.attn {one}.attn")
def attention_without_norms(model):
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        block.attn.norm_q = block.attn.norm_k = nn.Identity()


@miss("flux", left=f"{one}.attn", fused=one)
def attention_of_one_stream_that_doubles(model):
    attn = model.single_transformer_blocks[0].attn
    super_forward = type(attn).forward
    becomes(attn, lambda self, *a, **k: 2 * super_forward(self, *a, **k))


@miss("flux", left=f"{double}.attn", fused=double)
def attention_that_forgets_positions(model):
    super_forward = type(model.transformer_blocks[0].attn).forward

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs):
        return super_forward(self, hidden_states, encoder_hidden_states)

    becomes(model.transformer_blocks[0].attn, forward)


@miss("flux", left=f"{double}.attn", fused=double)
def joint_attention_with_a_processor_that_doubles(model):
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Doubling(FluxAttnProcessor):
        def __call__(self, *args, **kwargs):
            return tuple(2 * y for y in super().__call__(*args, **kwargs))

    model.transformer_blocks[0].attn.set_processor(Doubling())


@miss("flux", left=double)
def text_norm_in_single_precision(model):
    from diffusers.models.normalization import FP32LayerNorm

    model.transformer_blocks[0].norm1_context.norm = FP32LayerNorm(48, eps=1e-3, elementwise_affine=False)


@miss("flux", left="norm_out", fused=f"{double} {one}")
def the_last_norm_without_a_shift(model):
    def forward(self, x, c):
        return self.norm(x) * (1 + self.linear(self.silu(c)).chunk(2, dim=1)[0])[:, None]

    becomes(model.norm_out, forward)


# -- videos: Wan, CogVideoX, HunyuanVideo ------------------------------------------------------------------------------


@miss("wan", left="blocks.1", fused="blocks.0")
@miss("cogvideox", left="transformer_blocks.1", fused="transformer_blocks.0")
@miss("hunyuan-video", left="single_transformer_blocks.1", fused="single_transformer_blocks.0 transformer_blocks.1")
def subclass_of_a_video_block(model):
    name = next(n for n in ("blocks", "single_transformer_blocks", "transformer_blocks") if hasattr(model, n))
    block = getattr(model, name)[1]
    super_forward = type(block).forward

    def forward(self, *args, **kwargs):
        out = super_forward(self, *args, **kwargs)
        return tuple(0.5 * part for part in out) if isinstance(out, tuple) else 0.5 * out

    becomes(block, forward)


@miss("wan", left="blocks.1.attn1", fused="blocks.1 blocks.1.attn2")
@miss("cogvideox", left="transformer_blocks.1.attn1", fused="transformer_blocks.1")
@miss("hunyuan-video", left="transformer_blocks.1.attn", fused="transformer_blocks.1")
def video_attention_with_a_processor_of_ones_own(model):
    attn = _attention(model)

    class Doubling(type(attn.processor)):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            return tuple(2 * part for part in out) if isinstance(out, tuple) else 2 * out

    attn.set_processor(Doubling())


@miss("wan", left="blocks.1.attn1")
@miss("cogvideox", left="transformer_blocks.1.attn1")
@miss("hunyuan-video", left="transformer_blocks.1.attn")
def subclass_of_a_video_attention(model):
    attn = _attention(model)
    super_forward = type(attn).forward

    def forward(self, *args, **kwargs):
        out = super_forward(self, *args, **kwargs)
        return tuple(-part for part in out) if isinstance(out, tuple) else -out

    becomes(attn, forward)


@miss("wan", fused="blocks.1.attn1")
@miss("hunyuan-video", fused="transformer_blocks.1.attn")
def video_attention_with_other_norms(model):
    attn = _attention(model)
    attn.norm_q = nn.LayerNorm(attn.norm_q.weight.shape[0], bias=False)
    attn.norm_k = nn.Identity()


@miss("cogvideox", fused="transformer_blocks.1.attn1")
def joint_attention_without_norms(model):
    model.transformer_blocks[1].attn1.norm_q = model.transformer_blocks[1].attn1.norm_k = None


@miss("wan", fused="blocks.1")
def video_norms_with_other_eps(model):
    model.blocks[1].norm1.eps, model.blocks[1].norm3.eps = 1e-1, 1e-2


@miss("wan", left="blocks.1", alters=False)
def video_norm_of_torch(model):
    model.blocks[1].norm3 = nn.LayerNorm(36, eps=1e-6, elementwise_affine=False)


@miss("wan", left="blocks.1")
def video_norm_by_root_mean_square(model):
    model.blocks[1].norm2 = nn.RMSNorm(36)


@miss("wan", fused="blocks.1")
def no_norm_before_the_text(model):
    model.blocks[1].norm2 = nn.Identity()


@miss("wan", left="blocks.1.ffn", fused="blocks.1")
def video_feed_forward_with_a_gate(model):
    from diffusers.models.attention import FeedForward

    model.blocks[1].ffn = FeedForward(36, activation_fn="geglu")


@miss("cogvideox", left="transformer_blocks.1.ff", fused="transformer_blocks.1")
def joint_feed_forward_with_another_linear(model):
    model.transformer_blocks[1].ff.net.append(nn.Linear(48, 48))


@miss("cogvideox", fused="transformer_blocks.1.ff", alters=False)
def joint_feed_forward_without_its_last_dropout(model):
    del model.transformer_blocks[1].ff.net[3]


@miss("cogvideox", left="transformer_blocks.1")
def joint_norm_of_another_class(model):
    norm = model.transformer_blocks[1].norm2
    super_forward = type(norm).forward
    becomes(norm, lambda self, x, e, temb: super_forward(self, 2 + x * x, e, temb))


@miss("cogvideox", fused="transformer_blocks.1")
def joint_norms_with_another_eps(model):
    model.transformer_blocks[1].norm1.norm.eps = 1e-1


@miss("cogvideox", fused="transformer_blocks.1")
def joint_modulation_by_gelu(model):
    model.transformer_blocks[1].norm1.silu = nn.GELU()


@miss("hunyuan-video", left="single_transformer_blocks.1", fused="single_transformer_blocks.1.attn")
def single_block_with_relu(model):
    model.single_transformer_blocks[1].act_mlp = nn.ReLU()


@miss("hunyuan-video", fused="single_transformer_blocks.1")
def single_block_with_exact_gelu(model):
    model.single_transformer_blocks[1].act_mlp = nn.GELU()


@miss("hunyuan-video", left="transformer_blocks.1")
def double_block_with_a_root_mean_square_norm(model):
    model.transformer_blocks[1].norm2_context = nn.RMSNorm(48)


def _attention(model):
    if hasattr(model, "blocks"):
        return model.blocks[1].attn1
    block = model.transformer_blocks[1]
    return getattr(block, "attn1", None) or block.attn


def test_they_are_many():
    assert len(MISSES) >= 50
    families = {"dit", "latte", "diffusers_dit", "diffusers_pixart", "lightningdit"}
    assert {BY_NAME[m.base].family for m in MISSES} >= families
    assert sum(bool(m.left) for m in MISSES) >= 25


def _params():
    """Of diffusers' Latte, whose blocks are PixArt's, the default run has what is its own; of models of videos too."""
    shared = {base: {m.make for m in MISSES if m.base == base} for base in ("pixart", "wan")}
    first = {"diffusers-latte": "pixart", "cogvideox": "wan", "hunyuan-video": "wan"}
    for m in MISSES:
        again = m.base in first and m.make in shared[first[m.base]]
        yield pytest.param(m, id=m.name, marks=[pytest.mark.slow] if again or m.slow else [])


@pytest.mark.parametrize("case", _params())
def test_exact_or_left(case: NearMiss):
    tiny = BY_NAME[case.base]
    model = build(tiny, F64)
    healthy = run(model, tiny)["output"]
    case.make(model)
    randomise(model).to(F64)
    expected = run(model, tiny)
    if case.alters:
        assert not torch.allclose(expected["output"], healthy, rtol=1e-6), "it is no near-miss"
    # Not a copy: a forward that was replaced on an instance is bound to the one that it was replaced on.
    plan = opendit.explain(opendit.accelerate(model, {"kernels": "reference"}), file=io.StringIO())
    changed, reasons = {edit.fqn for edit in plan.edits}, {kept.fqn: kept.why for kept in plan.kept}
    assert not changed & set(case.left)
    assert all(reasons.get(fqn) for fqn in case.left), reasons
    assert set(case.fused) <= changed, reasons
    error, name = worst(run(model, tiny), expected)
    assert error <= 1e-10, name


@pytest.mark.parametrize(
    "name",
    [
        "dit: chunks swapped",
        "dit: attention with its heads cut otherwise",
        "lightningdit: gate and value swapped",
        "lightningdit: values turned too",
    ],
)
def test_the_probe_is_what_keeps_them_right(name, monkeypatch):
    """Without it these near-misses compute something else: they are as near as they are meant to be."""
    monkeypatch.setattr(planner, "disagreement", lambda *args, **options: None)
    case = next(m for m in MISSES if m.name == name)
    tiny = BY_NAME[case.base]
    model = build(tiny, F64)
    case.make(model)
    expected = run(model, tiny)
    opendit.accelerate(model, {"kernels": "reference"})
    assert worst(run(model, tiny), expected)[0] > 1e-3
