"""Random numbers by sample: known answers, any batch, any device, and what they are distributed like."""

from __future__ import annotations

import statistics

import pytest
import torch

import opendit
from opendit import draws

# Of Random123's known answers, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0xA4093822 | 0x299F31D0 << 32,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer, device):
    words = draws.philox4x32(torch.tensor([counter[0]], device=device), *counter[1:], key)
    assert " ".join(f"{int(word):08x}" for word in words) == answer


def test_philox_against_whole_numbers():
    """Against the definition in Python's own integers, on random counters and keys."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        *counter, low, high = torch.randint(0, 2**32, (6,), generator=generator).tolist()
        words = draws.philox4x32(torch.tensor([counter[0]]), *counter[1:], low | high << 32)
        assert [int(word) for word in words] == _philox(counter, [low, high])


def _philox(counter, key):
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


DRAWS = {
    "noise": lambda ids, **o: opendit.noise((3, 5), 7, 11, ids, **o),
    "uniform": lambda ids, **o: opendit.uniform((2,), 7, 11, ids, **o),
    "timesteps": lambda ids, **o: opendit.timesteps(1000, 7, 11, ids, **o),
    "label_drop": lambda ids, **o: opendit.label_drop(0.5, 7, 11, ids, **o),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_sample_gets_its_numbers_in_any_batch(name):
    draw, ids = DRAWS[name], torch.tensor([5, 0, 3, 2**40, 3, 2**56 - 1])
    together = draw(ids)
    for parts in ([1] * 6, [2, 4], [5, 1], [3, 3]):
        assert torch.equal(torch.cat([draw(part) for part in ids.split(parts)]), together)
    assert torch.equal(draw(ids.flip(0)), together.flip(0))
    assert torch.equal(draw(ids.tolist()), together)
    assert torch.equal(together[2], together[4])
    torch.manual_seed(99)
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw(ids), together)
    finally:
        torch.set_num_threads(1)
    assert draw(ids[:0]).shape == (0, *together.shape[1:])


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits(name):
    ids = torch.arange(4096)
    assert torch.equal(DRAWS[name](ids, device="cuda").cpu(), DRAWS[name](ids))


def test_everything_else_changes_the_numbers():
    ids = torch.arange(64)
    base = opendit.noise((4,), 1, 2, ids)
    others = [
        opendit.noise((4,), 2, 2, ids),
        opendit.noise((4,), 1 + 2**40, 2, ids),
        opendit.noise((4,), 1, 3, ids),
        opendit.noise((4,), 1, 2, ids + 64),
        opendit.noise((4,), 1, 2, ids + 2**33),
    ]
    for i, a in enumerate([base, *others]):
        for b in [base, *others][i + 1 :]:
            assert not torch.isin(a, b).any()
    streams = [opendit.uniform((4,), 1, 2, ids, stream=s) for s in (0, 1, 251)]
    streams += [(opendit.timesteps(2**31, 1, 2, ids).double() / 2**31).float()[:, None]]
    for i, a in enumerate(streams):
        assert not any(torch.isin(a, b).any() for b in streams[i + 1 :])


def test_blocks_and_samples_do_not_share_numbers():
    found = opendit.noise((64, 64), 0, 0, torch.arange(16), dtype=torch.float64)
    assert len(found.unique()) > 0.9999 * found.numel()


def test_normal_against_the_standard_library():
    p = (torch.randint(0, 2**32, (5000,)).double() + 0.5) * 2.0**-32
    edges = [2.0**-33, 1 - 2.0**-33, 0.5, 0.075, 0.925, 0.0749999, 1e-5, 0.3]
    p = torch.cat([p, torch.tensor(edges, dtype=torch.float64)])
    exact = statistics.NormalDist()
    expected = torch.tensor([exact.inv_cdf(float(v)) for v in p], dtype=torch.float64)
    assert (draws._normal(p) - expected).abs().max() <= 4e-15
    x = torch.rand(5000, dtype=torch.float64) * 10
    assert ((draws._log(x) - x.log()).abs() <= 4e-16 * (1 + x.log().abs())).all()


def test_distributions():
    ids = torch.arange(4096)
    x = opendit.noise((8, 4), 0, 0, ids, dtype=torch.float64)
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    flat = x.flatten()
    for shift in (1, 4, 32):
        assert abs((flat[shift:] * flat[:-shift]).mean()) < 5 / n**0.5
    u = opendit.uniform((8,), 0, 0, ids)
    assert (u >= 0).all()
    assert (u < 1).all()
    counts = torch.histc(u, 16, 0, 1)
    assert ((counts - u.numel() / 16) ** 2 / (u.numel() / 16)).sum() < 45
    t = opendit.timesteps(10, 0, 0, ids)
    assert t.unique().tolist() == list(range(10))
    assert ((t.bincount() - 409.6) ** 2 / 409.6).sum() < 35
    assert abs(opendit.label_drop(0.1, 0, 0, ids).double().mean() - 0.1) < 0.03
    assert not opendit.label_drop(0.0, 0, 0, ids).any()
    assert opendit.label_drop(1.0, 0, 0, ids).all()


def test_dtypes_are_roundings_of_one_number():
    x = opendit.noise((9,), 0, 0, [1, 2], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(opendit.noise((9,), 0, 0, [1, 2], dtype=dtype), x.to(dtype))
    assert opendit.noise((), 0, 0, [1, 2]).shape == (2,)


def test_permutations():
    for size in (1, 2, 97, 1000):
        order = draws.permutation(size, 3, 0)
        assert order.sort().values.tolist() == list(range(size))
    assert not torch.equal(draws.permutation(97, 3, 0), draws.permutation(97, 3, 1))
    assert not torch.equal(draws.permutation(97, 3, 0), draws.permutation(97, 4, 0))


def test_numbers_stay_what_they_are():
    """As of the first version: other numbers would change what a resumed run sees."""
    assert draws.permutation(8, 0, 0).tolist() == [0, 6, 5, 1, 2, 4, 3, 7]
    assert opendit.timesteps(1000, 0, 1, range(8)).tolist() == [586, 356, 250, 533, 608, 850, 110, 804]
    assert [v.hex() for v in opendit.noise((3,), 0, 1, [2]).flatten().tolist()] == [
        "-0x1.32fe480000000p+1",
        "-0x1.cae7800000000p-1",
        "-0x1.753a960000000p-1",
    ]
    assert [v.hex() for v in opendit.uniform((2,), 0, 1, [2], stream=1).flatten().tolist()] == [
        "0x1.044de40000000p-1",
        "0x1.3240600000000p-3",
    ]
    assert opendit.label_drop(0.3, 0, 1, range(16)).nonzero().flatten().tolist() == [3, 7, 10, 14, 15]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**64}, ValueError, "seed: got"),
        ({"seed": 1.0}, TypeError, "seed: got 1.0"),
        ({"step": 2**32}, ValueError, "step: got"),
        ({"step": True}, TypeError, "step: got True"),
        ({"ids": torch.tensor([-1])}, ValueError, "ids: got -1"),
        ({"ids": torch.tensor([2**56])}, ValueError, "ids: got"),
        ({"ids": torch.tensor([0.5])}, ValueError, "ids: got torch.float32"),
        ({"ids": torch.tensor(3)}, ValueError, "ids: got torch.int64 of shape"),
    ],
)
def test_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        opendit.noise((2,), **{"seed": 0, "step": 0, "ids": [1], **kwargs})


def test_more_arguments():
    with pytest.raises(ValueError, match="high: got 0"):
        opendit.timesteps(0, 0, 0, [1])
    with pytest.raises(ValueError, match="stream: got 252"):
        opendit.uniform((), 0, 0, [1], stream=252)
    with pytest.raises(ValueError, match=r"probability: got 1\.5"):
        opendit.label_drop(1.5, 0, 0, [1])
