"""Images to train on: the digits that come with scikit-learn, or whatever `examples.data` reads.

`Digits`: 1,797 real handwritten digits of 8×8 pixels and 17 grey levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(Dataset):
    """The training split (80 %); the held-out fifth is for judging (see judge.py). Digits are never flipped."""

    def __init__(self, image_size: int = 8):
        pixels, labels, _, _ = digits_split()
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        if image_size != 8:
            images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
        self.images, self.labels = images, labels.tolist()
        self.classes = list(NAMES)
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        return {"pixels": self.images[index], "label": self.labels[index], "id": index}


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training pixels (0 … 16) and labels, held-out pixels and labels; always the same split."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.data, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return train_x, train_y, test_x, test_y


def open_images(path: str, image_size: int, flip: bool, seed: int) -> Any:
    if path == "digits":
        return Digits(image_size)
    from examples.data import open_data

    return open_data(Path(path), image_size=image_size, flip=flip, seed=seed)
