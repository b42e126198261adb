"""Random states: one seed for all generators that training code draws from."""

from __future__ import annotations

import random
import sys

import torch


def set_everywhere(seed: int) -> int:
    """Seeds torch, Python and numpy (if loaded) with `seed` ≥ 0, and returns it."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    return seed
