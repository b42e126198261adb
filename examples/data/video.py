"""Frames of a video file as uint8 [T, 3, I, I], decoded with PyAV, or with torchcodec where that is asked for.

T frames, each `interval` after the one before, are a window of (T − 1)·interval + 1 frames; where it starts is drawn by
the caller's `random` in [0, 1). Frames count in the order in which they are shown, so variable rates are no problem.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from examples.data.images import crop

if TYPE_CHECKING:
    import av


def decode_video(
    source: Path | bytes, size: int, num_frames: int, interval: int, random: float, decoder: str = "pyav"
) -> Tensor:
    if decoder == "torchcodec":
        return _with_torchcodec(source, size, num_frames, interval, random)
    place = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    frames = _by_seeking(place, size, num_frames, interval, random)
    if frames is None:
        frames = _from_the_start(place, size, num_frames, interval, random)
    return torch.stack(frames)


def _by_seeking(
    place: io.BytesIO | str, size: int, num_frames: int, interval: int, random: float
) -> list[Tensor] | None:
    """From the key frame before the window. None where the file's times don't lead to the window.

    Some files have packets without times, and some containers seek by decoding order and land behind the first frame.
    """
    import av

    with av.open(place) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # loader workers are the parallelism
        # The packets, without decoding: what the header says may be wrong, or missing.
        packets = [packet.pts for packet in container.demux(stream) if packet.size]
        if None in packets or len(set(packets)) < len(packets):
            return None
        times = sorted(packets)
        wanted = [times[i] for i in window(len(times), num_frames, interval, random)]
        frames: dict[int, Tensor] = {}
        container.seek(wanted[0], stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames[frame.pts] = crop(frame.to_image(), size)
            if frame.pts is None or frame.pts >= wanted[-1]:
                break
    return [frames[time] for time in wanted] if len(frames) == num_frames else None


def _from_the_start(place: io.BytesIO | str, size: int, num_frames: int, interval: int, random: float) -> list[Tensor]:
    """Decodes all frames to count them, and again to take those of the window."""
    import av

    def decoded() -> Iterator[av.VideoFrame]:
        if isinstance(place, io.BytesIO):
            place.seek(0)
        with av.open(place) as container:
            container.streams.video[0].thread_type = "NONE"
            yield from container.decode(container.streams.video[0])

    wanted = window(sum(1 for _ in decoded()), num_frames, interval, random)
    return [crop(frame.to_image(), size) for i, frame in enumerate(islice(decoded(), wanted[-1] + 1)) if i in wanted]


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
