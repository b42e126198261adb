"""Cases for the slow part of `test_fuzz`: every number of heads with every number of tokens."""

from __future__ import annotations

import functools
from typing import Any

from opendit.fastseq import joint
from tests.fastseq.fuzzing import TOKENS, _case
from tests.fastseq.whole_models import METHODS, sizes


def cases(world: int) -> dict[str, Any]:
    every = len(TOKENS)
    return {
        f"{m}/{sp}": functools.partial(_case, m, sp, every)
        for sp in sizes(world)
        for m in (*METHODS, "fastseq-overlapped-regather", *(f"joint {name}" for name in joint.METHODS))
    }
