"""How many generated digits are what they were asked to be, by a classifier that has only seen real ones."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from examples.image.data import digits_split


def judge_digits(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of `images` [B, 1, I, I] classified as `labels`, beside the classifier's score on held-out digits."""
    train_x, train_y, test_x, test_y = digits_split()
    classifier = SVC(gamma=0.001).fit(train_x, train_y)  # on pixel values 0 … 16
    small = F.interpolate(images.float().cpu(), size=(8, 8), mode="bilinear", antialias=True)
    generated = ((small.clamp(-1, 1) + 1) * 8).round().flatten(1).numpy()
    return {
        "requested_class_share": float(np.mean(classifier.predict(generated) == labels.cpu().numpy())),
        "classifier_held_out_accuracy": float(classifier.score(test_x, test_y)),
    }
