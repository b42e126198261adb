"""Cases for `test_sequence_parallel`: a small layer's rows, as it is and with a mistake planted."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import peers, sequence_parallel, spread_models, spread_timeline
from tests.fastseq import going_wrong


def cases(world: int) -> dict[str, Any]:
    return {
        "right": _rows,
        "wrong": _wrong,
        "models": _models,
        "cramped": _cramped,
        "curve": _curve,
        "timeline": _timeline,
        "peers": _peers,
    }


def _rows() -> list[dict[str, Any]]:
    layer = sequence_parallel.Layer(4, 8, torch.device("cpu"))
    return list(sequence_parallel.layer_rows(layer, 19))


def _wrong() -> list[dict[str, Any]]:
    _, mistake = going_wrong.MUTANTS["q and k mixed up, fastseq"]
    with mistake():
        return _rows()


def _models() -> list[dict[str, Any]]:
    return list(spread_models.model_rows(spread_models.SMOKE, spread_models.WHAT, torch.device("cpu")))


def _cramped() -> list[dict[str, Any]]:
    """Where a model that keeps its activations has no room on one device."""
    run = spread_models.run

    def cramped(job: Any, what: str, variant: Any, device: torch.device) -> dict[str, Any]:
        if variant.sp == 1 and variant.config["activation_checkpointing"] != "full":
            raise torch.OutOfMemoryError
        return run(job, what, variant, device)

    spread_models.run = cramped  # type: ignore[assignment]
    try:
        return list(spread_models.model_rows(spread_models.SMOKE[:1], ["train"], torch.device("cpu")))
    finally:
        spread_models.run = run


def _curve() -> list[dict[str, Any]]:
    return list(spread_models.curve_rows(spread_models.SMOKE[0], 4, torch.device("cpu")))


def _timeline() -> list[dict[str, Any]]:
    return list(spread_timeline.timeline_rows(sequence_parallel.Layer(4, 8, torch.device("cpu")), 32))


def _peers() -> list[dict[str, Any]]:
    device = torch.device("cpu")
    layers = sequence_parallel.layer_rows(peers.PeerLayer(4, 8, device), 32, ("ulysses", "yunchang ulysses"))
    return [*layers, *peers.model_rows(peers.TINY["wan"], device)]
