"""How long a process's part of a sequence is, and how long the sequence was.

All parts have one length l ≥ L/sp, so that collectives are even and graphs are the same everywhere; what is missing at
the end is padding, which no attention sees and the final gather cuts off. A layer deep in the model, maybe run again by
gradient checkpointing long after other sequences went through, must find L from l alone. So within a process each l
stands for one L: where two lengths would share one, the later gets the next l that is free. Every process of a group
meets the same lengths in the same order, so they agree.

The price is padding where many lengths lie close together; where all are multiples of sp there is none. The log says
for each sp the first length whose l is a tenth too long.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def traced_as_constant(function: _F) -> _F:
    """Dynamo calls `function` while tracing, on constants, and takes the result for one."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# (sp, L) → l, and (sp, l) → L.
_local: dict[tuple[int, int], int] = {}
_total: dict[tuple[int, int], int] = {}
_said: set[int] = set()  # sizes for which long padding was said

_logger = logging.getLogger("opendit")


def local_length(total: int, sp: int) -> int:
    """The tokens that each of `sp` processes gets of `total` ≥ 1, padding included."""
    return _local_length(operator.index(total), sp)  # a traced length becomes a constant: each has a graph of its own


@traced_as_constant
def _local_length(total: int, sp: int) -> int:
    key = (sp, total)
    if key not in _local:
        local = -(-total // sp)
        while (sp, local) in _total:
            local += 1
        _say(total, sp, local)
        _local[key] = local
        _total[sp, local] = total
    return _local[key]


def _say(total: int, sp: int, local: int) -> None:
    if sp not in _said and 10 * (local - -(-total // sp)) > total / sp:
        _said.add(sp)
        _logger.warning(
            "sp_size=%d: a sequence of %d tokens takes %d on each process, padding included, where %d would do, for "
            "other lengths so far took what is between. Where all are multiples of sp_size there is no padding",
            sp,
            total,
            local,
            -(-total // sp),
        )


def total_length(local: int, sp: int) -> int:
    """The length of the sequence of which `local` tokens are here.

    Raises `ValueError` where no sequence was split so: the caller was given something that is not a part.
    """
    return _total_length(operator.index(local), sp)


@traced_as_constant
def _total_length(local: int, sp: int) -> int:
    if (sp, local) not in _total:
        raise ValueError(
            f"sp_size={sp}: a layer was given {local} tokens, which no sequence was split into; allowed: what the "
            "first block hands on. Call the whole model, not one of its blocks"
        )
    return _total[sp, local]


def real(total: int, local: int, rank: int) -> int:
    """How many of a process's `local` tokens are not padding."""
    return min(max(total - rank * local, 0), local)


def reals(total: int, local: int, n: int) -> tuple[int, ...]:
    """`real` of each of `n` processes."""
    return tuple(real(total, local, r) for r in range(n))


def evenly(n: int, parts: int) -> list[int]:
    """How many of `n` heads (or frames) each of `parts` processes computes: as even as can be, possibly none."""
    return [n // parts + (r < n % parts) for r in range(parts)]
