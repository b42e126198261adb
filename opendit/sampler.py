"""An order of samples that survives resumes on another number of processes.

The samples of all epochs are one stream:  s = 0, 1, 2, …;  s is sample `permutation(size, seed, s // size)[s % size]`.
A global batch is the next `batch_size` of the stream, and data-parallel rank r of d takes the r-th of its d equal
parts. The position in the stream is all there is to remember, and no number of processes is in it. Batches run on
across the ends of epochs, so every epoch has each sample exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from opendit.draws import permutation

BatchT = TypeVar("BatchT")


class ResumableSampler(Sampler[list[int]]):
    """A `batch_sampler` for `DataLoader`; yields this rank's part of each global batch.

        sampler = opendit.ResumableSampler(
            len(data),
            batch_size=256,
            seed=0,
            rank=opendit.data_parallel_rank(model),
            ranks=opendit.data_parallel_size(model),
        )
        loader = DataLoader(data, batch_sampler=sampler, num_workers=4)
        for x, y in sampler.over(loader):  # counts what was consumed, not what workers fetched ahead
            noise = opendit.noise(x.shape[1:], 0, step, sampler.ids, x.device)

    Args:
        size: the number of samples.
        batch_size: of a global batch, over all ranks; a multiple of `ranks`.
        seed: of the order.
        rank, ranks: this process's data-parallel rank, of how many.
        epochs: after how many the stream ends; what is then left of a global batch is dropped. `None`: never.

    Attributes:
        position: how many samples of the stream all ranks together have consumed.
        ids: int64 [batch_size / ranks], where in the stream the batch that `over` yielded last is from: the ids for
            `opendit.noise` and its like.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        epochs: int | None = None,
    ) -> None:
        for name, value, least in (("size", size, 1), ("batch_size", batch_size, 1), ("ranks", ranks, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: got {value!r}; allowed: an int of at least {least}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: got {rank!r}; allowed: 0 to {ranks - 1}")
        if batch_size % ranks:
            raise ValueError(
                f"batch_size: got {batch_size}, the size of a batch over all {ranks} ranks; allowed: a multiple of that"
            )
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs: got {epochs}; allowed: at least 1, or None")
        self.size, self.batch_size, self.seed, self.rank, self.ranks = size, batch_size, seed, rank, ranks
        self.epochs = epochs
        self.position = 0
        self._ahead = False  # batches were handed out that `over` does not count
        self._counting = False
        self._last: int | None = None  # where the batch that was yielded last begins
        self._order: tuple[int, Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Of the next sample, from 0."""
        return self.position // self.size

    @property
    def ids(self) -> Tensor:
        if self._last is None:
            raise RuntimeError("ids: no batch was yielded yet; iterate over sampler.over(loader)")
        return torch.arange(*self._part(self._last))

    def __iter__(self) -> Iterator[list[int]]:
        self._ahead = not self._counting
        position = self.position
        end = None if self.epochs is None else self.epochs * self.size
        while end is None or position + self.batch_size <= end:
            yield [self._sample(s) for s in range(*self._part(position))]
            position += self.batch_size

    def over(self, loader: Iterable[BatchT]) -> Iterator[BatchT]:
        """The loader's batches, each counted as consumed when it is yielded, on all ranks."""
        self._counting = True
        try:
            # A DataLoader's iterator draws from torch's random state when it is made; a resumed run makes one more.
            state = torch.get_rng_state()
            batches = iter(loader)
            torch.set_rng_state(state)
            for batch in batches:
                self._ahead, self._last = False, self.position
                self.position += self.batch_size
                yield batch
        finally:
            self._counting = False

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it counts in. Raises `RuntimeError` where batches were consumed without `over`."""
        if self._ahead:
            raise RuntimeError(
                "sampler: batches were drawn from it that nobody counted; iterate over sampler.over(loader), not loader"
            )
        return {"position": self.position, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; the batch size and the number of ranks may differ.

        Raises `ValueError` where the order would be another one: other data, or another seed.
        """
        for name in ("size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"sampler: the state is from {name}={state[name]!r}, this sampler has {getattr(self, name)!r}; "
                    "allowed: the same, for the order of samples depends on it"
                )
        self.position = state["position"]
        self._ahead, self._last = False, None

    def _part(self, position: int) -> tuple[int, int]:
        mine = self.batch_size // self.ranks
        return position + self.rank * mine, position + (self.rank + 1) * mine

    def _sample(self, s: int) -> int:
        epoch, place = divmod(s, self.size)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.size, self.seed, epoch))
        return int(self._order[1][place])
