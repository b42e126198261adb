"""Images as float tensors [C, I, I] in [−1, 1], with a class index each.

`Digits`: the 1,797 real handwritten digits of 8×8 pixels and 17 grey levels that come inside scikit-learn.
`ImageFolder`: one sub-folder per class; centre crop, optional flip. A file that does not decode is named on stderr,
marked in `bad`, and its place is taken by the next one that does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from examples.common import Process

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class Digits(Dataset):
    """The training split (80 %); the held-out fifth is for judging (see judge.py). Digits are never flipped."""

    channels = 1

    def __init__(self, image_size: int = 8):
        pixels, labels, _, _ = digits_split()
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        if image_size != 8:
            images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
        self.images, self.labels = images, torch.from_numpy(labels)
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def unreadable_files(self) -> list[str]:
        return []


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training pixels (0 … 16) and labels, held-out pixels and labels; always the same split."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.data, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return train_x, train_y, test_x, test_y


class ImageFolder(Dataset):
    channels = 3

    def __init__(self, root: Path, image_size: int, flip: bool = True):
        if root.exists() and not root.is_dir():
            raise ValueError(f"--data {root} is a file; it takes a folder with a sub-folder per class")
        if not root.is_dir():
            raise ValueError(f"data folder {root} does not exist")
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        found = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in EXTENSIONS
        ]
        if not found:
            raise ValueError(f"data folder {root} holds no images in class sub-folders (<class>/<name>.png, .jpg, …)")
        self.paths = [path for path, _ in found]
        self.labels = [label for _, label in found]
        self.classes = [folder.name for folder in folders]
        self.image_size, self.flip = image_size, flip
        self.bad = torch.zeros(len(found), dtype=torch.bool).share_memory_()  # loader workers mark it too
        self._load_next(0)  # all broken: better known now

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._load_next(index)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, label

    def unreadable_files(self) -> list[str]:
        return [str(self.paths[i]) for i in self.bad.nonzero().flatten().tolist()]

    def _load_next(self, index: int) -> tuple[Tensor, int]:
        for step in range(len(self)):
            i = (index + step) % len(self)
            if self.bad[i]:
                continue
            try:
                return load_image(self.paths[i], self.image_size), self.labels[i]
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
                self.bad[i] = True
                print(f"skipping {self.paths[i]}: {error}", file=sys.stderr)
        raise ValueError(f"none of the {len(self)} images under {self.paths[0].parent.parent} can be read")


def load_image(path: Path, size: int) -> Tensor:
    """The largest centred square, resized to size × size."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def batches(
    dataset: Dataset, batch_size: int, *, process: Process, seed: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches on the device; each rank sees its own share, in an order that the seed fixes."""
    sampler = DistributedSampler(dataset, num_replicas=process.world, rank=process.rank, seed=seed)
    if len(sampler) < batch_size:
        raise ValueError(f"--batch-size {batch_size} is more than the {len(sampler)} images of a process")
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=process.device.type == "cuda",
        generator=torch.Generator().manual_seed(seed + process.rank),  # seeds the workers' flips
    )

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            for images, labels in loader:
                yield images.to(process.device, non_blocking=True), labels.to(process.device, non_blocking=True)
            epoch += 1

    return forever()
