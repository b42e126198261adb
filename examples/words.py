"""A text encoder without a network: every word is a fixed random vector, drawn from its own letters.

    tokens = [start, word_1, …, word_n, 0, …] [S, E];   pooled = (Σ words) / √n [E], zeros for no words

It knows nothing of meaning, but tells captions apart, on any machine and without a download: enough to try text
conditioning, and for data whose captions are made from a few words.
"""

from __future__ import annotations

import functools
import hashlib
import re

import torch
from torch import Tensor

WIDTH, LENGTH = 64, 32  # E and S; further words are left out


class Words:
    def __init__(self, device: torch.device):
        self.device = device

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [B, S, E], mask [B, S], pooled [B, E]); order is told by the words' place only in `tokens`."""
        words = [re.findall(r"\w+", text.lower())[: LENGTH - 1] for text in texts]
        tokens = torch.zeros(len(texts), LENGTH, WIDTH)
        mask = torch.zeros(len(texts), LENGTH, dtype=torch.bool)
        pooled = torch.zeros(len(texts), WIDTH)
        for i, found in enumerate(words):
            rows = torch.stack([vector(""), *map(vector, found)])
            tokens[i, : len(rows)], mask[i, : len(rows)] = rows, True
            if found:
                pooled[i] = rows[1:].sum(0) / len(found) ** 0.5
        return tokens.to(self.device), mask.to(self.device), pooled.to(self.device)


@functools.lru_cache(maxsize=65536)
def vector(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") >> 1
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
