"""This process's place among others, for samplers and random states."""

from __future__ import annotations

import torch
from torch import nn

from opendit.patch import core
from opendit.wrapping import unwrap


def data_parallel_rank(model: nn.Module) -> int:
    """Which share of every batch this process trains on, from 0; processes that share a sequence give the same.

    It is the `rank` for a `DistributedSampler`, with `data_parallel_size(model)` as `num_replicas`. Without sequence
    parallelism it is the process's rank, and 0 without processes.
    """
    return _data_parallel(model)[0]


def data_parallel_size(model: nn.Module) -> int:
    """Into how many shares a batch is divided: the processes over `sp_size`, and over 2 with `cfg_parallel`."""
    return _data_parallel(model)[1]


def seed(seed: int, model: nn.Module) -> int:
    """Seeds torch (GPUs too), Python's `random`, and numpy where it is loaded; returns the seed that was used.

    Processes that share a sequence get one seed, so that noise, timesteps and label drops are equal there; others get
    others: seed · data_parallel_size + data_parallel_rank, as facebookresearch/DiT does with ranks. Call it after
    `accelerate`, before anything random is drawn.

    Raises `TypeError` where `seed` is no int, `ValueError` where it is negative.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {seed!r}; allowed: an int of at least 0")
    if seed < 0:
        raise ValueError(f"seed: got {seed}; allowed: an int of at least 0")
    from opendit.fastseq.seed import set_everywhere

    rank, size = _data_parallel(model)
    return set_everywhere(seed * size + rank)


def _data_parallel(model: nn.Module) -> tuple[int, int]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: the torch.nn.Module given to accelerate")
    plan = core.plan_of(unwrap(model))
    sequence = plan.choices.sequence if plan is not None else None
    if plan is not None and plan.choices.sampling is not None and plan.choices.sampling.pairs:
        from opendit.fastseq import pairs

        pair = pairs.pair(sequence.size if sequence is not None else 1)
        return pair.dp_rank, pair.dp_size
    if sequence is not None:
        from opendit.fastseq import mesh

        place = mesh.groups(sequence.size)
        return place.dp_rank, place.dp_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
