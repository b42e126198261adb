"""Pieces: together they are the tensor, each is a view, and what is no range is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from opendit.pieces import piece_of
from tests.launch import of_every_rank


def test_a_plain_tensor_is_one_piece_that_shares_its_memory():
    x = torch.arange(6.0).view(2, 3)
    piece = piece_of(x)
    assert (piece.shape, piece.start, piece.stop) == ((2, 3), 0, 6)
    piece.values[4] = -1.0
    assert x[1, 1] == -1.0


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_odd_shapes(shape):
    piece = piece_of(torch.zeros(shape))
    assert (piece.stop - piece.start, piece.values.numel()) == (torch.zeros(shape).numel(),) * 2


def test_another_order_of_memory_is_refused():
    with pytest.raises(ValueError, match="row-major"):
        piece_of(torch.zeros(2, 3).t())


def cases(world: int):
    return {"shards": _shards, "hybrid": _hybrid, "columns": _columns}


def _shards():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for rows in (1, 3, 4, 7):
        whole = torch.arange(rows * 5.0).view(rows, 5)
        piece = piece_of(distribute_tensor(whole, mesh, [Shard(0)]))
        assert torch.equal(whole.view(-1)[piece.start : piece.stop], piece.values)
        found.append((piece.start, piece.stop))
    return found


def _hybrid():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    whole = torch.arange(35.0).view(7, 5)
    piece = piece_of(distribute_tensor(whole, mesh, [Replicate(), Shard(0)]))
    assert torch.equal(whole.view(-1)[piece.start : piece.stop], piece.values)
    return piece.start, piece.stop


def _columns():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match="dimension 0"):
        piece_of(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))


@pytest.mark.parametrize("world", [2, 4])
def test_pieces_of_all_processes_are_the_tensor(world):
    for rows, ranges in zip((1, 3, 4, 7), zip(*of_every_rank(__name__, world, "shards"), strict=True), strict=True):
        covered = sorted(i for start, stop in ranges for i in range(start, stop))
        assert covered == list(range(rows * 5))
    ranges = of_every_rank(__name__, world, "hybrid")
    assert sorted(set(ranges)) == ([(0, 35)] if world == 2 else [(0, 20), (20, 35)])
    of_every_rank(__name__, world, "columns")
