"""What all processes do together: agree, and fail together.

Objects travel through a gloo group of our own: a background save must not mix its messages with the training's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError
from opendit.everyone import several

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# The group, with the default group that it was made for.
_group: list[tuple[object, ProcessGroup]] = []


def rank() -> int:
    return dist.get_rank() if several() else 0


def size() -> int:
    return dist.get_world_size() if several() else 1


def prepare() -> None:
    """Makes the group. Every process calls it, from its main thread."""
    if several() and (not _group or _group[0][0] is not dist.group.WORLD):
        _group[:] = [(dist.group.WORLD, dist.new_group(backend="gloo"))]


def everyones(value: T, problem: Exception | None = None) -> list[T]:
    """Each process's `value`. Where one has a problem, all raise it."""
    told = None
    if problem is not None:
        text = " ".join(str(problem).split())
        told = (type(problem).__name__, text, getattr(problem, "intact", None))
    found: list[Any] = [(value, told)]
    if several():
        found = [None] * size()
        dist.all_gather_object(found, (value, told), group=_group[0][1])
    problems = [(r, *p) for r, (_, p) in enumerate(found) if p is not None]
    if not problems:
        return [v for v, _ in found]
    damaged = all(kind == DamagedCheckpointError.__name__ for _, kind, _, _ in problems)
    ranks = [f"rank {r}: " if several() else "" for r, *_ in problems]
    error = (DamagedCheckpointError if damaged else CheckpointError)(
        "; ".join(rank + _named(kind, text) for rank, (_, kind, text, _) in zip(ranks, problems, strict=True))
    )
    if isinstance(error, DamagedCheckpointError):
        error.intact = problems[0][3]
    raise error from problem


def _named(kind: str, text: str) -> str:
    """The kind of an error of ours says nothing; that of another, such as OSError, does."""
    return text if kind in (CheckpointError.__name__, DamagedCheckpointError.__name__) else f"{kind}: {text}"
