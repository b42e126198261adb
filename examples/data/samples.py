"""Images and clips as they are on disk, decoded, cropped and augmented: a map-style data set.

`data[i]` is sample i in its first epoch, `data[epoch, i]` in another. What is drawn at random for a sample (where its
window of frames starts, whether it is flipped) depends on (seed, epoch, i) and on nothing else: not on the worker, the
order, or the number of processes. A flip comes in every other epoch, and the seed says in which ones.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.images import decode_image
from examples.data.listing import Listing
from examples.data.video import decode_video


class Unreadable(Exception):
    """This sample can't be used; the message says which and why."""


class Samples(Dataset):
    """`labels` and `captions`: one per sample, or None. `names` say which file, member or row each is; `unlisted`
    what could not even become a sample."""

    def __init__(
        self,
        listing: Listing,
        image_size: int,
        *,
        num_frames: int = 1,
        frame_interval: int = 1,
        flip: bool = False,
        seed: int = 0,
        decoder: str = "pyav",
    ):
        self.listing, self.image_size, self.decoder = listing, image_size, decoder
        self.num_frames, self.frame_interval, self.flip, self.seed = num_frames, frame_interval, flip, seed
        self.names, self.classes = listing.names, listing.classes
        self.labels, self.captions, self.unlisted = listing.labels, listing.captions, listing.skipped
        self._bad = torch.zeros(len(listing.names), dtype=torch.bool).share_memory_()  # loader workers mark it too

    def __len__(self) -> int:
        return len(self.names)

    @property
    def skipped(self) -> list[str]:
        """What was met so far and could not be used, from the listing and from decoding, by this process's workers."""
        return self.unlisted + [self.names[i] for i in self._bad.nonzero().flatten().tolist()]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """The sample, or the next one that can be read; its "id" says which it is."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        reason = None
        for step in range(len(self)):
            i = (index + step) % len(self)
            if not self._bad[i]:
                try:
                    return self.read(i, epoch)
                except Unreadable as error:
                    reason = reason or error
        raise ValueError(f"none of the {len(self)} samples can be read; the first: {reason or self.names[index]}")

    def read(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """This very sample; raises Unreadable (said on stderr once) where its file is broken or its clip too short."""
        where, phase = self._draw(index, epoch)
        try:
            pixels = self._decode(index, where)
        except (ImportError, MemoryError):
            raise  # not the file's fault
        except Exception as error:  # whatever a decoder makes of a broken file
            if not self._bad[index]:
                self._bad[index] = True
                print(f"skipping {self.names[index]}: {_reason(error)}", file=sys.stderr, flush=True)
            raise Unreadable(f"{self.names[index]}: {_reason(error)}") from error
        if self.flip and phase:
            pixels = pixels.flip(-1)
        sample: dict[str, Any] = {"pixels": pixels.float() / 127.5 - 1, "id": index}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        if self.captions is not None:
            sample["caption"] = self.captions[index]
        return sample

    def _decode(self, index: int, where: float) -> Tensor:
        source = self.listing.load(index)
        if self.num_frames == 1:
            return decode_image(source, self.image_size)
        return decode_video(source, self.image_size, self.num_frames, self.frame_interval, where, self.decoder)

    def _draw(self, index: int, epoch: int) -> tuple[float, bool]:
        """In [0, 1): where the window of frames lies; and whether the image is mirrored, should `flip` be on."""
        where = random.Random(f"window {self.seed} {epoch} {index}").random()
        first = random.Random(f"flip {self.seed} {index}").random() < 0.5
        return where, first ^ bool(epoch % 2)


class OneByOne(Dataset):
    """`read` for a DataLoader: a sample that can't be used is {"id", "why"}, and no other takes its place."""

    def __init__(self, data: Samples):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            return self.data.read(index, epoch)
        except Unreadable as error:
            return {"id": index, "why": str(error)}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
