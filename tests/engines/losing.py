"""A training script for `test_watch`: a tiny model trains for a minute; says each step it has done.

    python -m tests.engines.losing PLUGIN TIMEOUT STEPS FAIL_AT [SP_SIZE]

The process whose rank is in LOST raises after step FAIL_AT, if that is not 0; with SP_SIZE in a block's forward of the
next one, while others wait for its tokens.
"""

from __future__ import annotations

import os
import sys
import time

import torch

import opendit
from tests.tiny_models import UserDiT


def main(plugin: str, timeout: float, steps: int, fail_at: int, sp_size: int = 1) -> None:
    def fail(*_: object) -> None:
        if step == fail_at + (sp_size > 1) and fail_at and os.environ["RANK"] == os.environ.get("LOST"):
            raise KeyError("a mistake in the script")

    step = 0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = UserDiT()
    if sp_size > 1:
        model.blocks[1].mlp.register_forward_pre_hook(fail)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    cfg = {"plugin": plugin, "timeout": timeout, "kernels": "reference"}
    model, optimizer = opendit.accelerate(model, cfg, optimizer=optimizer, sp_size=sp_size)
    for step in range(1, steps + 1):
        model(torch.randn(2, 4, 6, 6), torch.tensor([1, 2]), torch.tensor([0, 1])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}", flush=True)
        fail()
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))
