"""The small data files that the accuracy runs travel with, and the pictures they leave.

A file is safetensors. Images are lossless or lossy WebP, one after the other in one tensor of bytes:

    <name>.bytes     uint8 [total]       the files, end to end
    <name>.ends      int64 [N]           where each ends
    <name>.labels    int64 [N]           where they have any

Everything else in it is plain tensors by name, and lists of strings as JSON in the file's metadata.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def packed(name: str, files: Iterable[bytes]) -> dict[str, Tensor]:
    """Encoded images as tensors of a data file."""
    files = list(files)
    ends = torch.tensor([len(file) for file in files]).cumsum(0)
    return {f"{name}.bytes": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8), f"{name}.ends": ends}


def unpacked(tensors: dict[str, Tensor], name: str) -> list[np.ndarray]:
    """The images, uint8 [H, W, 3] each."""
    data, ends = tensors[f"{name}.bytes"].numpy().tobytes(), tensors[f"{name}.ends"].tolist()
    starts = [0, *ends[:-1]]
    return [
        np.array(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
        for start, end in zip(starts, ends, strict=True)
    ]


def write(path: Path, tensors: dict[str, Tensor], **lists: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: json.dumps(value) for name, value in lists.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the lists of strings beside them."""
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; write it with benchmarks/accuracy/prepare.py")
    with safe_open(path, "pt") as file:
        lists = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
        return {name: file.get_tensor(name) for name in file.keys()}, lists  # noqa: SIM118  not a dict


def to_bytes(images: Tensor) -> Tensor:
    """[−1, 1] to uint8."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def grid(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """[N, 3, H, W] in [−1, 1], row by row, as uint8 [rows·(H + gap), columns·(W + gap), 3]."""
    padded = torch.nn.functional.pad(to_bytes(images), (0, gap, 0, gap), value=96)
    rows = [torch.cat(list(row), dim=2) for row in padded.split(columns)]
    rows[-1] = torch.nn.functional.pad(rows[-1], (0, rows[0].shape[2] - rows[-1].shape[2]), value=96)
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


def save_grid(path: Path, images: Tensor, columns: int, scale: int = 1) -> None:
    picture = Image.fromarray(grid(images, columns))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def save_gif(path: Path, clips: Tensor, columns: int, scale: int = 1, fps: int = 8) -> None:
    """[N, F, 3, H, W] in [−1, 1]: a grid that moves."""
    frames = [Image.fromarray(grid(clips[:, i], columns)) for i in range(clips.shape[1])]
    size = (frames[0].width * scale, frames[0].height * scale)
    shown = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=1000 // fps, loop=0)


def command() -> str:
    """How this process was started, folders left out: what they are called elsewhere does not matter."""
    words = [word if word.startswith("-") else Path(word).name for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/accuracy/{Path(sys.argv[0]).name}", *words])
