"""Trains a model of 48 M parameters on ColossalAI, and alone; prints how far apart they are, as JSON.

    torchrun --nproc-per-node=2 -m tests.engines.colossalai_on_gpu gemini [sp_size]

One process does as well. Large enough that Gemini divides its chunks. Without a GPU it runs on the CPU, with gloo.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import opendit
import opendit.fastseq.seed
from tests.engines.on_colossalai import apart
from tests.tiny_models import UserDiT, randomise


def main(plugin: str, sp: int) -> dict[str, Any]:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, alone = (randomise(UserDiT(size=32, dim=1152, depth=2, heads=16)).to(device) for _ in range(2))
    make: Any = functools.partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.01)
    reference = make(alone.parameters())
    cfg: dict[str, Any] = {"plugin": plugin, "engine": "colossalai", "fusion": "adaln"}
    if plugin == "gemini":
        from colossalai.nn.optimizer import HybridAdam

        cfg["reduction"] = "bf16"
        model = model.bfloat16()
        alone.load_state_dict(model.state_dict())
        make = functools.partial(HybridAdam, lr=1e-4, weight_decay=0.01)
    placed, optimizer = opendit.accelerate(model, cfg, optimizer=make, sp_size=sp)
    share, dp = opendit.data_parallel_rank(placed), opendit.data_parallel_size(placed)
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    for step in range(4):
        losses = [_loss(placed, share, 10 * step + micro, 1.0) for micro in range(2)]
        expected = [_loss(alone, s, 10 * step + micro, 1 / dp) for s in range(dp) for micro in range(2)]
        found["losses"].append(max(abs(a / b - 1) for a, b in zip(losses, expected[2 * share :], strict=False)))
        norms = [float(nn.utils.clip_grad_norm_(m.parameters(), 0.05)) for m in (placed, alone)]
        found["norms"].append(abs(norms[0] / norms[1] - 1))
        both = zip(model.parameters(), alone.parameters(), strict=True)
        pairs = [(p.grad, q.grad) for p, q in both if p.requires_grad]
        found["gradients"].append(apart([(_whole(a).float(), b) for a, b in pairs]))
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    weights = placed.state_dict(only_rank_0=False) if plugin == "gemini" else model.state_dict()
    found["parameters"] = apart([(weights[n].to(device).float(), q.detach()) for n, q in alone.named_parameters()])
    return {what: max(values) if isinstance(values, list) else values for what, values in found.items()}


def _whole(grad: torch.Tensor) -> torch.Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def _loss(model: nn.Module, share: int, micro: int, scale: float) -> float:
    device = next(model.parameters()).device
    opendit.fastseq.seed.set_everywhere(1000 * share + micro)
    x, y = torch.randn(3, 4, 32, 32), torch.tensor([0, 4, 2])
    out = model.eval()(x.to(device), torch.tensor([0, 17, 999], device=device), y.to(device))
    loss = (out.float() - torch.randn(1).to(device)).square().mean()
    (0.5 * scale * loss).backward()
    return loss.item()


if __name__ == "__main__":
    outcome = main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    if dist.get_rank() == 0:
        print(json.dumps(outcome), flush=True)
    dist.destroy_process_group()
