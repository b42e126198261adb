"""An image file as uint8 [3, I, I]: the largest centred square, resized with Lanczos."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def decode_image(source: Path | bytes, size: int) -> Tensor:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        return crop(file.convert("RGB"), size)


def crop(image: Image.Image, size: int) -> Tensor:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
