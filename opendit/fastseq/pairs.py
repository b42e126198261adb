"""Pairs of processes that share a batch: with guidance, one has the conditional branch and the other the unconditional.

mesh dp × cfg × sp over the world; a pair are two processes sp apart, with the same place in their sequences
rows 0 … ⌈R/2⌉ − 1 of a batch are the first's, the others the second's; where R is odd the last row is computed twice
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opendit.fastseq import mesh
from opendit.fastseq.ops import gather_into


@dataclass(frozen=True)
class Pair:
    """This process's pair. `rank`: which of the two it is; `dp_rank`, `dp_size`: which pair of how many."""

    group: dist.ProcessGroup
    rank: int
    dp_rank: int
    dp_size: int


_built: dict[int, Pair] = {}
_built_for: list[object] = []


def check_size(sp_size: int) -> None:
    """Raises `ValueError` where the world has no pairs of groups of `sp_size`."""
    world = dist.get_world_size()
    if world % (2 * sp_size):
        raise ValueError(
            f"cfg_parallel: got True with {world} processes and sp_size={sp_size}; allowed: a number of processes that "
            f"2·sp_size = {2 * sp_size} divides. Start torchrun with as many, or leave cfg_parallel out"
        )


def pair(sp_size: int) -> Pair:
    """The first call makes process groups: every process of the world must make it."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None:
        raise ValueError(
            "cfg_parallel: the model was called without a process group; call accelerate in this process, or "
            "torch.distributed.init_process_group"
        )
    if _built_for[:1] != [world]:
        _built.clear()
        _built_for[:] = [world]
    if sp_size not in _built:
        from torch.distributed.device_mesh import init_device_mesh

        check_size(sp_size)
        dp_size = dist.get_world_size() // (2 * sp_size)
        shape, names = (dp_size, 2, sp_size), ("dp", "cfg", "sp")
        group = init_device_mesh(mesh.device_type(), shape, mesh_dim_names=names).get_group("cfg")
        outer = dist.get_rank() // sp_size
        _built[sp_size] = Pair(group, outer % 2, outer // 2, dp_size)
    return _built[sp_size]


def mine(leaves: Sequence[Any], rows: int, sp_size: int) -> list[Any]:
    """A call's arguments with this process's rows of those tensors that have a row per sample.

    Raises `ValueError` for a tensor of which that can't be told.
    """
    rank, half = pair(sp_size).rank, -(-rows // 2)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or (leaf.shape == (1,) and rows > 1):
            return leaf
        if len(leaf) != rows:
            raise ValueError(
                f"cfg_parallel: the model was given a tensor of shape {tuple(leaf.shape)} beside {rows} samples; "
                "allowed: tensors with a row per sample, and single numbers. Leave cfg_parallel out"
            )
        own = leaf[rank * half : (rank + 1) * half]
        missing = half - len(own)
        return torch.cat([own, leaf[-1:].expand(missing, *leaf.shape[1:])]) if missing else own

    return [part(leaf) for leaf in leaves]


def both(own: Tensor, rows: int, sp_size: int) -> Tensor:
    """All rows of an output, on both processes, of which this has half."""
    half = -(-rows // 2)
    if own.dim() == 0 or len(own) != half:
        raise ValueError(
            f"cfg_parallel: of {half} samples the model gave a tensor of shape {tuple(own.shape)}; allowed: outputs "
            "with a row per sample. Leave cfg_parallel out"
        )
    out = own.new_empty((2 * half, *own.shape[1:]))
    gather_into(out, own.contiguous(), pair(sp_size).group)
    return out[:rows]


def compare(leaves: Sequence[Any], sp_size: int) -> None:
    """Raises `ValueError`, on both, where the two processes were given different tensors."""
    tensors = [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor)]
    device = tensors[0].device
    sums = [torch.stack([t.sum(), (t * t).sum(), t.flatten()[:1].sum()]).to(device) for t in tensors]
    own = torch.stack(sums)
    found = own.new_empty((2 * len(own), 3))
    gather_into(found, own, pair(sp_size).group)
    first, second = found.chunk(2)
    if not torch.allclose(first, second, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            "cfg_parallel: the two processes of a pair called the model with different tensors; allowed: the same "
            "noise, timesteps and conditions on both. Seed both alike, by opendit.data_parallel_rank(model)"
        )
