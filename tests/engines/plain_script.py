"""A user's script, the same for one process, torchrun, and several nodes: `test_launchers` starts it.

    python -m tests.engines.plain_script PLUGIN SP_SIZE

Trains on a fixed global batch of four samples; the first process prints how its weights are divided, and what the
parameters are after three steps.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import opendit
from tests.tiny_models import UserDiT, randomise


def main(plugin: str, sp_size: int) -> None:
    torch.set_num_threads(1)
    model = (
        randomise(UserDiT(learn_sigma=False)).double().eval()
    )  # without label drops, whatever the number of processes
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cfg = {"plugin": plugin, "kernels": "reference"}
    model, optimizer = opendit.accelerate(model, cfg, optimizer=optimizer, sp_size=sp_size)
    rank, size = opendit.data_parallel_rank(model), opendit.data_parallel_size(model)
    x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
    for _ in range(3):
        model(x[mine], t[mine], y[mine]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    if dist.get_rank() == 0:
        place = getattr(next(p for p in model.parameters() if p.requires_grad), "placements", "whole")
        print(f"world {dist.get_world_size()}, {place}, {sum(p.detach().abs().sum().item() for p in whole):.12f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
