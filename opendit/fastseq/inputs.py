"""A cheap look, in the first steps, at whether the processes that share a sequence were given the same one.

Different noise, timesteps or labels within a group give a loss that looks normal and gradients of no model. So the
arguments of the first block (of the model, where blocks are compiled) are sampled at a few places and compared, and so
is the random state in training, for label drops are drawn from it inside the model. Every process sees the same
comparison, so all stop.
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from opendit.fastseq.mesh import groups
from opendit.fastseq.ops import gather_into

STEPS = 3  # forwards of a model that are looked at
_TENSORS, _PLACES = 6, 32
# Of the largest value: equal inputs differ by the rounding of other kernels at most, different noise by all of it.
_TOLERANCE = 0.02


def compare(tensors: list[Tensor], sp_size: int, *, training: bool, of: str) -> str | None:
    """Raises `ValueError` on every process of a group whose inputs differ; returns what else is worth saying.

    `of`: whose arguments they are, in words.
    In training with gradients, equal inputs in different groups (data-parallel copies of one batch) are worth it.
    """
    place = groups(sp_size)
    device = tensors[0].device
    mine = _sample(tensors, training)
    here = device if place.mesh.device_type == "cuda" else torch.device("cpu")
    if not training:
        rows = _gathered(mine.to(here), place.sp)
        _check(rows, sp_size, place.dp_rank * sp_size, of)
        return None
    rows = _gathered(mine.to(here), dist.group.WORLD)
    for group in range(place.dp_size):
        _check(rows[group * sp_size : (group + 1) * sp_size], sp_size, group * sp_size, of)
    samples = rows[::sp_size, 2:]
    if place.dp_size > 1 and all(torch.equal(samples[0], other) for other in samples[1:]):
        return (
            f"all {place.dp_size} data-parallel groups were given the same inputs: shard the data by "
            "opendit.data_parallel_rank(model), and call opendit.seed(seed, model) for different noise"
        )
    return None


def _sample(tensors: list[Tensor], training: bool) -> Tensor:
    """A header of two (shapes, random state), then some values of each tensor; fp64, of one length everywhere."""
    shapes = repr([(tuple(t.shape), t.dtype) for t in tensors]).encode()
    state = _random_state(tensors[0].device) if training else 0
    found = torch.zeros(2 + _TENSORS * _PLACES, dtype=torch.float64)
    found[0], found[1] = zlib.crc32(shapes), state
    for i, t in enumerate(tensors[:_TENSORS]):
        flat = t.detach().reshape(-1)
        if flat.numel():
            at = torch.linspace(0, flat.numel() - 1, _PLACES, dtype=torch.float64).long()
            found[2 + i * _PLACES : 2 + (i + 1) * _PLACES] = flat[at.to(flat.device)].double().cpu()
    return found


def _random_state(device: torch.device) -> int:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return zlib.crc32(bytes(state.tolist()))


def _gathered(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rows = mine.new_empty((dist.get_world_size(group), mine.numel()))
    gather_into(rows.view(-1), mine, group)
    return rows.cpu()


def _check(rows: Tensor, sp_size: int, first: int, of: str) -> None:
    ranks = f"ranks {first} to {first + sp_size - 1}, which share a sequence (sp_size={sp_size}),"
    if not (rows[:, 0] == rows[0, 0]).all():
        raise ValueError(f"{ranks} were given inputs of different shapes or dtypes; give all of a group the same batch")
    samples = rows[:, 2:].view(sp_size, _TENSORS, _PLACES)
    largest = samples.abs().amax(dim=(0, 2), keepdim=True).clamp_min(1e-12)
    off = ((samples - samples[:1]).abs() / largest > _TOLERANCE).any(-1).any(0)
    # Not-a-number everywhere is the caller's own trouble, and not a difference.
    if off.any():
        raise ValueError(
            f"{ranks} were given different inputs (argument {int(off.nonzero()[0])} of {of}: noise, "
            "timesteps, labels or samples). Shard the data by opendit.data_parallel_rank(model), and call "
            "opendit.seed(seed, model) before anything random is drawn"
        )
    if not (rows[:, 1] == rows[0, 1]).all():
        raise ValueError(
            f"{ranks} were given the same inputs but their random states differ, so that label drops inside the model "
            "would; call opendit.seed(seed, model) after accelerate, and draw alike on all of a group"
        )
