"""Preprocessed data: VAE latents and text embeddings in safetensors shards, found through `index.json`.

    index.json              settings, classes, number of samples, shards with their sizes, what was skipped
    latents-00000.safetensors   samples [k·S, (k+1)·S): mean, std [n, V, (T,) C, h, w]; label [n]; caption [n]
    text-00000.safetensors      captions [k·M, (k+1)·M): tokens [m, L, E], mask [m, L], pooled [m, P]

V variants of each sample are the augmentations of epochs 0 … V − 1; epoch e reads variant e mod V. A VAE without a
posterior has no std: it is zero. `caption` counts through all text shards; captions that repeat are kept once,
and the empty one, for guidance, is the first. Skipped samples keep their place, so that ids are those of the raw data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

FORMAT = "opendit-latents-1"


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a preprocessed folder; None where there is none, ValueError where it is of another kind."""
    path = folder / "index.json"
    if not path.is_file():
        if any(folder.glob("latents-*.safetensors")):
            raise ValueError(f"data_path: preprocessing of {folder} was not finished. Run the same command again")
        return None
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data_path: {path} is not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"data_path: {path} has format {found!r}; allowed: {FORMAT!r}. Run preprocess again")
    return index


class Latents(Dataset):
    """`data[i]` and `data[epoch, i]` as of `Samples`, with "mean" and "std" for "pixels", and the text encoded."""

    def __init__(self, folder: Path, *, image_size: int, num_frames: int, frame_interval: int, flip: bool, seed: int):
        index = read_index(folder)
        assert index is not None
        self.settings = index["settings"]
        asked = {"image_size": image_size, "num_frames": num_frames, "frame_interval": frame_interval, "flip": flip}
        for name, value in asked.items():
            if self.settings[name] != value:
                remedy = "Train with --no_flip" if name == "flip" and value else "Give the same"
                raise ValueError(
                    f"{name}: got {value}; the latents in {folder} were made with {self.settings[name]}. "
                    f"{remedy}, or run preprocess again"
                )
        if (flip or num_frames > 1) and self.settings["seed"] != seed:
            raise ValueError(
                f"seed: got {seed}; the augmentations in {folder} were drawn with {self.settings['seed']}. "
                "Give the same, or run preprocess again"
            )
        self.folder, self.classes, self.samples = folder, index["classes"], index["samples"]
        self.shard_size, self.text_shard_size = index["shard_size"], index["text_shard_size"]
        self.holes = {hole["id"] for hole in index["holes"]}
        if len(self.holes) == self.samples:
            raise ValueError(f"data_path: none of the samples that {folder} was made from could be read")
        self.skipped = [hole["why"] for hole in index["holes"]] + index["skipped"]
        for name, size in index["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ValueError(
                    f"data_path: {folder / name} is missing or not {size} bytes long. Delete it if it is there, and "
                    "run preprocess again: it makes only what is missing"
                )
        self._open: dict[str, Any] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        while index in self.holes:  # as Samples goes on to the next that can be read
            index = (index + 1) % len(self)
        shard, row = divmod(index, self.shard_size)
        file = self._shard(f"latents-{shard:05d}.safetensors")
        names = file.keys()
        variant = epoch % self.settings["variants"]
        mean = file.get_slice("mean")[row : row + 1, variant].squeeze(0).float()
        std = file.get_slice("std")[row : row + 1, variant].squeeze(0).float() if "std" in names else mean.new_zeros(())
        sample: dict[str, Any] = {"mean": mean, "std": std.expand_as(mean), "id": index}
        if "label" in names:
            sample["label"] = int(file.get_slice("label")[row : row + 1])
        if "caption" in names:
            sample |= self.text(int(file.get_slice("caption")[row : row + 1]))
        return sample

    def text(self, number: int = 0) -> dict[str, Tensor]:
        """Encoded caption `number`; 0 is the empty one."""
        shard, row = divmod(number, self.text_shard_size)
        file = self._shard(f"text-{shard:05d}.safetensors")
        names = {"text": "tokens", "text_mask": "mask", "pooled": "pooled"}
        rows = {name: file.get_slice(stored)[row : row + 1][0] for name, stored in names.items()}
        return {name: value if value.dtype == torch.bool else value.float() for name, value in rows.items()}

    def _shard(self, name: str) -> Any:
        if self._process != os.getpid():  # a loader's worker: files of its own
            self._open, self._process = {}, os.getpid()
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt")
        return self._open[name]
