"""State dicts between this DiT (the published layout) and diffusers' DiTTransformer2DModel, both ways.

What differs: diffusers keeps a copy of the timestep and label embedders in every block, splits qkv into three
linears, and computes its position embedding instead of storing it.

The weights carry over exactly, the function does not quite: diffusers spaces its 128 timestep frequencies as
10000^(-i/127), the published model as 10000^(-i/128), and its second norm defaults to eps 1e-5 instead of 1e-6
(`norm_eps=1e-6` mends that one). tests/examples/test_models.py measures both.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
_LABELS = ("y_embedder.embedding_table.weight", "class_embedder.embedding_table.weight")
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_WB = ("weight", "bias")


def count_blocks(state: dict[str, Tensor], prefix: str = "blocks") -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(prefix + "."))


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {f"{theirs}.{p}": state[f"{ours}.{p}"] for ours, theirs in _OUTER.items() for p in _WB}
    for i in range(count_blocks(state)):
        block = f"transformer_blocks.{i}"
        for p in _WB:
            for ours, theirs in _EMBEDDERS.items():
                out[f"{block}.norm1.emb.{theirs}.{p}"] = state[f"{ours}.{p}"]
            for ours, theirs in _BLOCK.items():
                out[f"{block}.{theirs}.{p}"] = state[f"blocks.{i}.{ours}.{p}"]
            for name, part in zip("qkv", state[f"blocks.{i}.attn.qkv.{p}"].chunk(3), strict=True):
                out[f"{block}.attn1.to_{name}.{p}"] = part
        out[f"{block}.norm1.emb.{_LABELS[1]}"] = state[_LABELS[0]]
    return out


def from_diffusers(state: dict[str, Tensor], pos_embed: Tensor) -> dict[str, Tensor]:
    """`pos_embed` is ours to add: diffusers does not store it (take it from a new DiT, or `sincos_2d`)."""
    out = {f"{ours}.{p}": state[f"{theirs}.{p}"] for ours, theirs in _OUTER.items() for p in _WB}
    out["pos_embed"] = pos_embed
    first = "transformer_blocks.0.norm1.emb"
    out[_LABELS[0]] = state[f"{first}.{_LABELS[1]}"]
    out |= {f"{ours}.{p}": state[f"{first}.{theirs}.{p}"] for ours, theirs in _EMBEDDERS.items() for p in _WB}
    for i in range(count_blocks(state, "transformer_blocks")):
        block = f"transformer_blocks.{i}"
        for name in (*(f"{theirs}.{p}" for theirs in _EMBEDDERS.values() for p in _WB), _LABELS[1]):
            if not torch.equal(state[f"{block}.norm1.emb.{name}"], state[f"{first}.{name}"]):
                raise ValueError(
                    f"{block}.norm1.emb.{name} differs from block 0's: this model was trained in diffusers, where "
                    "every block has embedders of its own, and the published layout has room for one"
                )
        for p in _WB:
            for ours, theirs in _BLOCK.items():
                out[f"blocks.{i}.{ours}.{p}"] = state[f"{block}.{theirs}.{p}"]
            out[f"blocks.{i}.attn.qkv.{p}"] = torch.cat([state[f"{block}.attn1.to_{n}.{p}"] for n in "qkv"])
    return out
