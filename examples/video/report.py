"""Clips as a file that shows them: an animated GIF, or an MP4 where PyAV is installed."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from examples.image.report import grid_of

FORMATS = {".gif", ".mp4"}


def save_clips(path: Path, clips: Tensor, columns: int, fps: int = 8) -> None:
    """`clips` [N, F, C, I, I] in [−1, 1], side by side in rows of `columns`, all playing at once."""
    _write(path, torch.stack([grid_of(clips[:, i], columns) for i in range(clips.shape[1])]), fps)


def save_frames(path: Path, clip: Tensor, fps: int = 8) -> None:
    """One clip [F, C, I, I] in [−1, 1] as it is."""
    frames = ((clip.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    _write(path, frames.expand(-1, -1, -1, 3) if frames.shape[-1] == 1 else frames[..., :3], fps)


def _write(path: Path, frames_FHW3: Tensor, fps: int) -> None:
    if path.suffix.lower() == ".gif":
        first, *rest = [Image.fromarray(frame.contiguous().numpy()) for frame in frames_FHW3]
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    else:
        write_mp4(path, frames_FHW3, fps)


def write_mp4(path: Path, frames_FHW3: Tensor, fps: int) -> None:
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path}: .mp4 needs PyAV (pip install av); .gif needs nothing more") from error
    height, width = (side + side % 2 for side in frames_FHW3.shape[1:3])  # H.264's chroma is at half the resolution
    padded = F.pad(frames_FHW3, (0, 0, 0, width - frames_FHW3.shape[2], 0, height - frames_FHW3.shape[1]))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in padded.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
