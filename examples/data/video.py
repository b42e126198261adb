"""Frames of a video file as uint8 [T, 3, I, I], decoded with PyAV, or with torchcodec where that is asked for.

T frames, each `interval` after the one before, are a window of (T − 1)·interval + 1 frames; where it starts is drawn by
the caller's `random` in [0, 1). Frames count in the order in which they are shown, so variable rates are no problem.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.data.images import crop


def decode_video(
    source: Path | bytes, size: int, num_frames: int, interval: int, random: float, decoder: str = "pyav"
) -> Tensor:
    if decoder == "torchcodec":
        return _with_torchcodec(source, size, num_frames, interval, random)
    import av

    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # loader workers are the parallelism
        # The packets, without decoding: what the header says may be wrong, or missing.
        times = sorted(p.pts for p in container.demux(stream) if p.pts is not None and p.size)
        wanted = [times[i] for i in window(len(times), num_frames, interval, random)]
        frames: dict[int, Tensor] = {}
        # From the key frame before. Some containers seek by decoding order and land behind the first wanted frame:
        # then from the beginning.
        for start in (wanted[0], times[0]):
            container.seek(start, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    frames[frame.pts] = crop(frame.to_image(), size)
                if frame.pts is not None and frame.pts >= wanted[-1]:
                    break
            if len(frames) == num_frames:
                break
    if len(frames) < num_frames:
        raise ValueError(f"only {len(frames)} of the {num_frames} wanted frames can be decoded")
    return torch.stack([frames[time] for time in wanted])


def _with_torchcodec(source: Path | bytes, size: int, num_frames: int, interval: int, random: float) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(source if isinstance(source, bytes) else str(source), dimension_order="NHWC")
    indices = list(window(video.metadata.num_frames, num_frames, interval, random))
    return torch.stack([crop(Image.fromarray(frame.numpy()), size) for frame in video.get_frames_at(indices).data])


def window(available: int, num_frames: int, interval: int, random: float) -> range:
    """The frames to take of `available`; all starts are equally likely when `random` is uniform in [0, 1)."""
    span = (num_frames - 1) * interval + 1
    if available < span:
        raise ValueError(f"too short: {available} frames, {num_frames} at an interval of {interval} need {span}")
    start = int(random * (available - span + 1))
    return range(start, start + span, interval)
