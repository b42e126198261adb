"""Which samples a step trains on: a function of (seed, step), so that resuming needs the number of steps alone.

Epoch e visits the samples in the order of a permutation drawn from (seed, e); step s of it takes the next
batch_size·ranks of them, and the ranks share those. The global batch therefore does not depend on how many
ranks make it up. What is left at an epoch's end and fills no batch is left out in that epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Order(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index) for a DataLoader's `batch_sampler`, from step `start` on.

    `rank` of `ranks`: among the data-parallel ones (`opendit.data_parallel_rank`), not among all processes.
    """

    def __init__(self, samples: int, batch_size: int, *, rank: int = 0, ranks: int = 1, seed: int = 0, start: int = 0):
        if samples < batch_size * ranks:
            raise ValueError(
                f"batch_size: got {batch_size} on {ranks} data-parallel ranks; the data has only {samples} samples. "
                "Lower batch_size"
            )
        self.samples, self.batch_size, self.rank, self.ranks = samples, batch_size, rank, ranks
        self.seed, self.start = seed, start
        self.steps_per_epoch = samples // (batch_size * ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = divmod(self.start, self.steps_per_epoch)
        while True:
            order = self._epoch(epoch)
            for s in range(step, self.steps_per_epoch):
                first = (s * self.ranks + self.rank) * self.batch_size
                yield [(epoch, i) for i in order[first : first + self.batch_size]]
            epoch, step = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[int]:
        mixed = hashlib.sha256(f"order {self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)
        return torch.randperm(self.samples, generator=generator).tolist()


def batches(data: Dataset, order: Order, *, workers: int = 0, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
    """Endless collated batches: `batches(data, Order(len(data), 32, rank=r, ranks=n, seed=0, start=step))`."""
    # Augmentation takes nothing from torch's generator; a generator of its own keeps the loader from advancing it.
    own = torch.Generator().manual_seed(0)
    return iter(DataLoader(data, batch_sampler=order, num_workers=workers, pin_memory=pin_memory, generator=own))
