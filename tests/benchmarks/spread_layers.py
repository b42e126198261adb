"""Cases for `test_sequence_parallel`: a small layer's rows, as it is and with a mistake planted."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import sequence_parallel
from tests.fastseq import going_wrong


def cases(world: int) -> dict[str, Any]:
    return {"right": _rows, "wrong": _wrong, "models": _models, "curve": _curve}


def _rows() -> list[dict[str, Any]]:
    layer = sequence_parallel.Layer(4, 8, torch.device("cpu"))
    return list(sequence_parallel.layer_rows(layer, 19))


def _wrong() -> list[dict[str, Any]]:
    _, mistake = going_wrong.MUTANTS["q and k mixed up, fastseq"]
    with mistake():
        return _rows()


def _models() -> list[dict[str, Any]]:
    jobs = sequence_parallel.SMOKE
    return [row for job in jobs for row in sequence_parallel.model_rows(job, torch.device("cpu"))]


def _curve() -> list[dict[str, Any]]:
    return list(sequence_parallel.curve_rows(sequence_parallel.SMOKE[0], 4, torch.device("cpu")))
