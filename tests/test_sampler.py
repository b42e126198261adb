"""An epoch has every sample once, whoever takes it, and however often the run is cut and its size changed."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils.data import DataLoader

import opendit
from opendit.draws import permutation


def _ranks(size, batch, ranks, position=0, **more):
    found = [opendit.ResumableSampler(size, batch, seed=5, rank=r, ranks=ranks, **more) for r in range(ranks)]
    for sampler in found:
        sampler.load_state_dict({"position": position, "size": size, "seed": 5})
    return found


def test_all_ranks_together_are_the_stream():
    stream = [int(i) for epoch in range(3) for i in permutation(10, 5, epoch)]
    for ranks in (1, 2, 4):
        samplers = _ranks(10, 4, ranks, epochs=3)
        batches = [list(s.over(s)) for s in samplers]
        taken = [i for step in zip(*batches, strict=True) for part in step for i in part]
        assert taken == stream[:28], "the stream runs on across the ends of epochs; 2 of 30 don't fill a batch"
        assert all(s.position == 28 for s in samplers)


def test_cut_at_random_and_continued_by_others():
    """Every resume on another number of ranks, and another batch size: in each epoch 0 repeated, 0 missed."""
    dice = random.Random(0)
    for _ in range(50):
        size, position, taken, ids = dice.randint(5, 60), 0, [], []
        while position < 3 * size:
            ranks = dice.choice([1, 2, 3, 4])
            samplers = _ranks(size, ranks * dice.randint(1, 5), ranks, position)
            steps = dice.randint(1, 6)
            for step in zip(*(itertools.islice(_with_ids(s), steps) for s in samplers), strict=True):
                taken += [i for part, _ in step for i in part]
                ids += [i for _, part in step for i in part]
            (state,) = {tuple(s.state_dict().items()) for s in samplers}
            position = dict(state)["position"]
        for epoch in range(3):
            assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert ids == list(range(position)), "ids are unique, and count the stream"


def _with_ids(sampler):
    for part in sampler.over(sampler):
        yield part, sampler.ids.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_fetch_ahead_is_not_counted(workers):
    data = list(range(100, 120))
    sampler = opendit.ResumableSampler(20, 4, seed=1)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    state = torch.get_rng_state()
    batches = sampler.over(loader)
    first = [next(batches).tolist() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state), "iterating draws nothing from torch"
    assert sampler.state_dict()["position"] == 8
    resumed = opendit.ResumableSampler(20, 4, seed=1, epochs=1)
    resumed.load_state_dict(sampler.state_dict())
    rest = [b.tolist() for b in resumed.over(DataLoader(data, batch_sampler=resumed))]
    assert sorted(i for b in first + rest for i in b) == data
    batches.close()


def test_batches_that_nobody_counts_are_noticed():
    sampler = opendit.ResumableSampler(20, 4)
    for _, _ in zip(range(2), DataLoader(range(20), batch_sampler=sampler), strict=False):
        pass
    with pytest.raises(RuntimeError, match=r"iterate over sampler\.over\(loader\)"):
        sampler.state_dict()
    with pytest.raises(RuntimeError, match="no batch was yielded yet"):
        _ = opendit.ResumableSampler(20, 4).ids


def test_epochs():
    sampler = opendit.ResumableSampler(6, 4, epochs=2)
    assert [sampler.epoch for _ in sampler.over(sampler)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((0, 4), {}, "size: got 0"),
        ((5, 0), {}, "batch_size: got 0"),
        ((5, 2.0), {}, "batch_size: got 2.0"),
        ((5, 3), {"ranks": 2}, "batch_size: got 3, the size of a batch over all 2 ranks"),
        ((5, 4), {"ranks": 2, "rank": 2}, "rank: got 2"),
        ((5, 4), {"epochs": 0}, "epochs: got 0"),
    ],
)
def test_arguments(args, kwargs, match):
    with pytest.raises(ValueError, match=match):
        opendit.ResumableSampler(*args, **kwargs)


def test_another_order_is_refused():
    sampler = opendit.ResumableSampler(20, 4, seed=1)
    for other, match in (
        (opendit.ResumableSampler(21, 4, seed=1), "size=20"),
        (opendit.ResumableSampler(20, 4), "seed=1"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(sampler.state_dict())
