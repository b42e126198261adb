"""What all processes say, where there are several: small things, sent as objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    return not several() or dist.get_rank() == 0


def carrier(device: torch.device) -> torch.device:
    """Where tensors of `device` must be for the default process group to send them: NCCL takes none of the host's."""
    if several() and device.type == "cpu" and torch.cuda.is_available() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def gathered(value: Any) -> list[Any]:
    """Everyone's `value`."""
    if not several():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def agreed(problems: list[str]) -> list[str]:
    """Everyone's, each once."""
    return list(dict.fromkeys(problem for found in gathered(problems) for problem in found))


def agreed_rows(rows: list[tuple[str, float, float, str, int]]) -> list[tuple[str, float, float, str, int]]:
    """For each comparison the worst of all processes."""
    worst: dict[str, tuple[str, float, float, str, int]] = {}
    for found in gathered(rows):
        for row in found:
            if row[0] not in worst or row[1] > worst[row[0]][1]:
                worst[row[0]] = row
    return list(worst.values())
