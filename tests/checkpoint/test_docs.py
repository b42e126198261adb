"""The example of docs/checkpoints.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import opendit
from tests.tiny_models import UserDiT, randomise

DOCS = Path(__file__).parent.parent.parent / "docs" / "checkpoints.md"


class _Failing(Dataset):
    def __init__(self, data):
        self.data, self.taken = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.taken += 1
        if self.taken > 12 * 8:
            raise RuntimeError("power cut")
        return self.data[index]


def test_the_example_resumes(tmp_path):
    code = re.search(r"<!-- example -->\n```python\n(.*?)```\n<!-- end -->", DOCS.read_text(), re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 4, 4, 4, generator=generator), torch.arange(20) % 5)

    def model(seed):
        return randomise(UserDiT(size=4, dim=16, heads=2, depth=1), seed).eval()

    whole, cut = model(0), model(0)
    scope["train"](whole, data, tmp_path / "whole", 20)
    with pytest.raises(RuntimeError, match="power"):  # in the thirteenth step; saved at 10
        scope["train"](cut, _Failing(data), tmp_path / "cut", 20)
    opendit.wait()
    assert opendit.latest_checkpoint(tmp_path / "cut").name == "step-00000010"
    resumed = model(1)
    scope["train"](resumed, data, tmp_path / "cut", 20)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len(code.split("def train")[1].splitlines()) <= 27
