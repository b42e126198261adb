"""Reads and writes models: our folder (model.safetensors + config.json) and the published `.pt` files.

Nothing here unpickles objects: `.pt` files are read with weights_only=True.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.diffusion import OBJECTIVES
from examples.models.convert import count_blocks
from examples.models.dit import DIT_MODELS
from examples.models.registry import ARCHITECTURES, build
from opendit.checkpoint import published


def save_checkpoint(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """`config["model"]` holds the constructor's arguments. A crash while writing leaves the previous files whole."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / "model.tmp")
    (folder / "config.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.tmp", "config.tmp"):  # on the disk before they take the others' places
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    os.replace(folder / "config.tmp", folder / "config.json")
    os.replace(folder / "model.tmp", folder / "model.safetensors")


def load_checkpoint(path: Path, kind: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The model (on the CPU, in eval mode) and its config; `path` is a folder, a .safetensors or a .pt file.

    `kind`: "image" or "video", where the model must be for one of them.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    state, config = _read_published(path) if path.suffix in (".pt", ".pth") else _read_ours(path)
    if kind is not None and kind != (found := "video" if config["architecture"] in ("VDiT", "Latte") else "image"):
        raise ValueError(f"checkpoint {path} is of a model for {found}s; take examples/{found}/sample.py")
    try:
        model = build(config)
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"checkpoint {path} does not fit a {config.get('architecture', 'DiT')}: {error}") from error
    return model.eval(), config


def _read_ours(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is not a safetensors file: {error}") from error
    beside = path.with_name("config.json")
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path} has no config.json beside it") from error
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON: {error}") from error
    for key, kind in {"model": dict, "objective": str, "pixels": bool}.items():
        if not isinstance(config, dict) or key not in config:
            raise ValueError(f"{beside} has no {key!r}")
        if not isinstance(config[key], kind):
            raise ValueError(f"{beside}: {key!r} is {config[key]!r}, which is no {kind.__name__}")
    if config.setdefault("architecture", "DiT") not in ARCHITECTURES:
        raise ValueError(
            f"{beside}: 'architecture' is {config['architecture']!r}; there are {', '.join(ARCHITECTURES)}"
        )
    if config["objective"] not in OBJECTIVES:
        raise ValueError(f"{beside}: 'objective' is {config['objective']!r}; there are {', '.join(OBJECTIVES)}")
    return state, config


def _read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DiT-XL-2-256x256.pt is a flat state dict; a training run's file holds "model", "ema", "opt" and "args"."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            blob = torch.load(path, map_location="cpu", weights_only=True)
        # opendit's own reader of these files knows DiT's and Latte's, not PixArt's "state_dict".
        state = published.checked(blob.get("ema", blob.get("model", blob.get("state_dict", blob))), path)
        architecture = architecture_in(state)
        config = {
            "architecture": architecture,
            "model": infer_arguments(state, architecture),
            "objective": "gaussian",
            "pixels": False,
            "published": architecture,
        }
    except Exception as error:  # torch.load raises many kinds, each meaning that this is no such file
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {path} does not hold a model's tensors: {first_line}") from error
    return state, config


def architecture_in(state: dict[str, Tensor]) -> str:
    if "temp_embed" in state:
        return "Latte"
    return "PixArt" if "t_block.1.weight" in state else "DiT"


def infer_arguments(state: dict[str, Tensor], architecture: str = "DiT") -> dict[str, Any]:
    """The constructor's arguments, from the shapes of a published state dict."""
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    heads = {size["hidden_size"]: size["num_heads"] for size in DIT_MODELS.values()}
    if hidden_size not in heads:
        raise ValueError(f"no known DiT has hidden size {hidden_size}, and its head count is not in the file")
    tokens = state["pos_embed"].shape[1]
    found = {
        "input_size": round(tokens**0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": count_blocks(state),
        "num_heads": heads[hidden_size],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "learn_sigma": state["final_layer.linear.bias"].shape[0] == 2 * in_channels * patch_size**2,
    }
    if architecture == "PixArt":
        max_tokens, text_dim = state["y_embedder.y_embedding"].shape
        return {**found, "text_dim": text_dim, "max_tokens": max_tokens}
    if (table := state.get("y_embedder.embedding_table.weight")) is not None:
        found["num_classes"] = table.shape[0] - 1  # the last row is "no label"
    if architecture == "Latte":
        text = state.get("text_embedding_projection.1.weight")
        found["num_frames"] = state["temp_embed"].shape[1]
        found["extras"] = 78 if text is not None else 2 if table is not None else 1
        if text is not None:
            found["text_dim"] = text.shape[1]
    return found
