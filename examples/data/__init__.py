"""Data for training and evaluation: whatever lies at a path, as a map-style data set with one kind of sample.

`open_data(path, …)[i]` (or `[epoch, i]`) is a dict:

    pixels      float32 [3, I, I], or [T, 3, I, I] where num_frames > 1, in [−1, 1]; of raw data
    mean, std   float32 [C, h, w], or [T', C, h, w]; of preprocessed data
    label       int, where the data has classes
    caption     str, of raw data that has captions
    text, text_mask, pooled     float32 [L, E], bool [L], float32 [P]: the caption encoded; of preprocessed data
    id          int, the same for a sample in raw and in preprocessed data, on every rank
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from examples.data.find import list_samples
from examples.data.latents import Latents, read_index
from examples.data.listing import IMAGES, VIDEOS
from examples.data.samples import OneByOne, Samples, Unreadable

__all__ = ["Latents", "OneByOne", "Samples", "Unreadable", "open_data"]


def open_data(
    path: str | Path,
    *,
    image_size: int,
    num_frames: int = 1,
    frame_interval: int = 1,
    flip: bool = False,
    seed: int = 0,
    decoder: str = "pyav",
) -> Samples | Latents:
    """Images (num_frames 1), clips (above), or latents that preprocess.py made of either; formats: find.py."""
    for name, value in (("image_size", image_size), ("num_frames", num_frames), ("frame_interval", frame_interval)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; allowed: whole numbers from 1 on")
    if num_frames == 1 and frame_interval != 1:
        raise ValueError(f"frame_interval: got {frame_interval} with num_frames 1, whose one frame has no interval")
    if decoder not in ("pyav", "torchcodec"):
        raise ValueError(f"decoder: got {decoder!r}; allowed: 'pyav', 'torchcodec'")
    needed = "torchcodec" if decoder == "torchcodec" else "av"
    path = Path(path)
    shape = {"num_frames": num_frames, "frame_interval": frame_interval, "flip": flip, "seed": seed}
    if path.is_dir() and read_index(path) is not None:
        return Latents(path, image_size=image_size, **shape)
    if num_frames > 1 and not importlib.util.find_spec(needed):
        raise ValueError(f"num_frames: got {num_frames}; clips take {needed} to read. pip install {needed}")
    return Samples(list_samples(path, IMAGES if num_frames == 1 else VIDEOS), image_size, decoder=decoder, **shape)
