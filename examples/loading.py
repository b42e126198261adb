"""Data to batches: what is held out, in which order, to which process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import opendit


class Part(Dataset):
    """Some samples of a data set; a key is an index, or (epoch, index) as the data's own are."""

    def __init__(self, data: Any, indices: list[int]):
        self.data, self.indices, self.classes = data, indices, data.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(key, tuple):
            return self.data[key[0], self.indices[key[1]]]
        return self.data[self.indices[key]]


def split(data: Any, fraction: float, seed: int) -> tuple[Any, Part | None]:
    """What is trained on and what is held out, a random `fraction` that depends on the seed alone."""
    held_out = round(len(data) * fraction)
    if fraction and not 0 < held_out < len(data):
        raise ValueError(f"--val_fraction {fraction}: of {len(data)} samples it leaves nothing to judge by")
    if not held_out:
        return data, None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return Part(data, sorted(order[held_out:])), Part(data, sorted(order[:held_out]))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, texts as long as the longest, numbers as a tensor, captions as a list."""
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if name in ("text", "text_mask"):
            batch[name] = pad_sequence(values, batch_first=True)
        elif isinstance(first, Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, int):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


class WithEpochs:
    """The sampler's batches as (epoch, index), so that what is drawn for a sample differs from epoch to epoch."""

    def __init__(self, sampler: opendit.ResumableSampler):
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sampler = self.sampler
        at = sampler.position + sampler.rank * (sampler.batch_size // sampler.ranks)
        for batch in sampler:
            yield [((at + j) // sampler.size, index) for j, index in enumerate(batch)]
            at += sampler.batch_size


def loader_for(
    data: Any, model: nn.Module, *, batch_size: int, seed: int, workers: int, device: torch.device
) -> tuple[opendit.ResumableSampler, DataLoader]:
    """Endless batches; each data-parallel process gets its share, in an order that the seed fixes."""
    ranks = opendit.data_parallel_size(model)
    if len(data) < batch_size * ranks:
        raise ValueError(f"--batch_size {batch_size}: with {ranks} shares it is more than the {len(data)} samples")
    sampler = opendit.ResumableSampler(
        len(data), batch_size * ranks, seed=seed, rank=opendit.data_parallel_rank(model), ranks=ranks
    )
    loader = DataLoader(
        data,
        batch_sampler=WithEpochs(sampler),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )
    return sampler, loader
