"""Writes the shards that `examples/data/latents.py` reads: on several processes, and on from where a killed run was.

Shards are whole or absent: each is written beside its place and moved there. Processes share the missing ones evenly,
and `index.json` comes last, when none is missing. A shard is the same whoever makes it, and however often the run was
killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.common import Process
from examples.data.latents import FORMAT
from examples.data.samples import OneByOne, Samples
from examples.encoders import TextEncoder, Vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_SHARD = 1024


class Preparation:
    """A folder being filled. `settings`: all that the scripts take which changes what is written."""

    def __init__(self, folder: Path, data: Samples, settings: dict[str, Any], *, shard_size: int, process: Process):
        self.folder, self.data, self.shard_size, self.process = folder, data, shard_size, process
        listed = json.dumps([data.names, data.captions, data.labels]).encode()
        self.settings = {**settings, "shard_size": shard_size, "data": hashlib.sha256(listed).hexdigest()}
        self.captions = ["", *dict.fromkeys(data.captions)] if settings.get("text_encoder") and data.captions else []
        if process.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self._same_settings_or_new()
        self.files = [f"latents-{k:05d}.safetensors" for k in range(-(-len(data) // shard_size))]
        self.text_files = [f"text-{k:05d}.safetensors" for k in range(-(-len(self.captions) // TEXT_SHARD))]
        missing = [[name for name in [*self.text_files, *self.files] if not (folder / name).is_file()]]
        if dist.is_initialized():  # looked up once, or a fast process's new shards would change a slow one's share
            dist.broadcast_object_list(missing)
        mine = missing[0][process.rank :: process.world]
        self.mine = [name for name in mine if name.startswith("latents")]
        self.my_text = [name for name in mine if name.startswith("text")]

    def _same_settings_or_new(self) -> None:
        path = self.folder / "settings.json"
        if path.is_file():
            begun = any(self.folder.glob("*.safetensors"))  # else it ended in a mistake, and binds to nothing
            old = json.loads(path.read_text()) if begun else self.settings
            for name in self.settings.keys() | old.keys():
                if old.get(name) != self.settings.get(name):
                    raise ValueError(
                        f"out: {self.folder} was begun with {name} {old.get(name)!r}, not {self.settings.get(name)!r}. "
                        "Give the same, or another folder"
                    )
        elif any(self.folder.iterdir()):
            raise ValueError(f"out: {self.folder} is not empty, and was not made by preprocess. Give another folder")
        _write(path, json.dumps(self.settings, indent=2))

    def run(self, vae: Vae, text: TextEncoder | None, *, batch_size: int, workers: int = 0) -> dict[str, Any]:
        """Makes what is missing; the index, once every process is done."""
        if self.captions:
            assert text is not None
            for name in tqdm(self.my_text, desc="captions", unit="shard", disable=not self.process.is_main):
                self._write_text(name, text)
        self._write_latents(vae, batch_size, workers)
        if dist.is_initialized():
            dist.barrier()
        if self.process.is_main:
            _write(self.folder / "index.json", json.dumps(self._index(), indent=2))
        if dist.is_initialized():
            dist.barrier()
        return json.loads((self.folder / "index.json").read_text())

    def _write_text(self, name: str, text: TextEncoder) -> None:
        start = int(name[5:10]) * TEXT_SHARD
        tokens, mask, pooled = text.encode(self.captions[start : start + TEXT_SHARD])
        if not (tokens.isfinite().all() and pooled.isfinite().all()):
            raise ValueError(f"mixed_precision: the embeddings of {text.name} are not finite. Use fp32 or bf16")
        dtype = DTYPES[self.settings["text_dtype"]]
        self._save(name, {"tokens": tokens.to(dtype), "mask": mask, "pooled": pooled.to(dtype)}, [])

    def _write_latents(self, vae: Vae, batch_size: int, workers: int) -> None:
        variants, dtype = self.settings["variants"], DTYPES[self.settings["dtype"]]
        number = {caption: i for i, caption in enumerate(self.captions)}
        spans = {name: self._ids(name) for name in self.mine}
        keys = {name: [(variant, i) for i in ids for variant in range(variants)] for name, ids in spans.items()}
        groups = [part[i : i + batch_size] for part in keys.values() for i in range(0, len(part), batch_size)]
        loader = DataLoader(OneByOne(self.data), batch_sampler=groups, num_workers=workers, collate_fn=list)
        read = iter(loader)
        unit = "img" if self.data.num_frames == 1 else "clip"
        total = sum(map(len, keys.values()))
        with tqdm(total=total, desc="latents", unit=unit, disable=not self.process.is_main) as bar:
            for name, ids in spans.items():
                means: dict[int, list[Tensor]] = {i: [] for i in ids}
                stds: dict[int, list[Tensor]] = {i: [] for i in ids}
                why: dict[int, str] = {}
                for _ in range(-(-len(keys[name]) // batch_size)):
                    samples = next(read)
                    why |= {sample["id"]: sample["why"] for sample in samples if "why" in sample}
                    good = [sample for sample in samples if "why" not in sample]
                    if good:
                        mean, std = vae.encode(torch.stack([sample["pixels"] for sample in good]))
                        if not mean.isfinite().all():
                            bad = [s["id"] for s, m in zip(good, mean, strict=True) if not m.isfinite().all()]
                            raise ValueError(
                                f"mixed_precision: the VAE's latents of {self.data.names[bad[0]]} are not finite. "
                                "Use fp32 or bf16"
                            )
                        for sample, m, s in zip(good, mean.to(dtype).cpu(), std.to(dtype).cpu(), strict=True):
                            means[sample["id"]].append(m)
                            stds[sample["id"]].append(s)
                    bar.update(len(samples))
                self._save_latents(name, ids, means, stds, why, number)

    def _ids(self, name: str) -> range:
        start = int(name[8:13]) * self.shard_size
        return range(start, min(start + self.shard_size, len(self.data)))

    def _save_latents(self, name: str, ids: range, means: dict, stds: dict, why: dict[int, str], number: dict) -> None:
        whole = next((i for i in ids if i not in why), None)
        tensors: dict[str, Tensor] = {}
        if whole is not None:
            for i in why:  # a hole keeps its row
                means[i], stds[i] = ([torch.zeros_like(x) for x in parts[whole]] for parts in (means, stds))
            tensors["mean"] = torch.stack([torch.stack(means[i]) for i in ids])
            std = torch.stack([torch.stack(stds[i]) for i in ids])
            if std.any():
                tensors["std"] = std
        if self.data.labels is not None:
            tensors["label"] = torch.tensor([self.data.labels[i] for i in ids])
        if self.captions and self.data.captions:
            tensors["caption"] = torch.tensor([number[self.data.captions[i]] for i in ids])
        self._save(name, tensors, [{"id": i, "why": reason} for i, reason in sorted(why.items())])

    def _save(self, name: str, tensors: dict[str, Tensor], holes: list[dict[str, Any]]) -> None:
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        part = self.folder / f"{name}.part"
        part.write_bytes(save(tensors, metadata={"holes": json.dumps(holes)}))  # save_file's are its owner's alone
        os.replace(part, self.folder / name)

    def _index(self) -> dict[str, Any]:
        names = [*self.text_files, *self.files]
        return {
            "format": FORMAT,
            "settings": self.settings,
            "samples": len(self.data),
            "classes": self.data.classes,
            "shard_size": self.shard_size,
            "text_shard_size": TEXT_SHARD,
            "captions": len(self.captions),
            "files": {name: (self.folder / name).stat().st_size for name in names},
            "holes": list(self._holes()),
            "skipped": self.data.unlisted,
        }

    def _holes(self) -> Iterator[dict[str, Any]]:
        for name in self.files:
            with safe_open(self.folder / name, "pt") as file:
                yield from json.loads(file.metadata()["holes"])


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    os.replace(part, path)


def summary(index: dict[str, Any], folder: Path) -> str:
    """What the scripts print last; raises where nothing could be used."""
    samples, holes = index["samples"], index["holes"]
    if len(holes) == samples:
        raise ValueError(f"data_path: none of the {samples} samples can be read; the first: {holes[0]['why']}")
    left_out = len(holes) + len(index["skipped"])
    size = sum(index["files"].values()) / 2**20
    text = f", {index['captions'] - 1} captions" if index["captions"] else ""
    skipped = f"; {left_out} could not be used and are named in index.json" if left_out else ""
    return f"wrote {folder}: {samples - len(holes)} samples{text}, {size:.1f} MiB{skipped}"
