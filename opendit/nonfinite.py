"""Is a gradient inf or NaN, on any process? And which ones.

    found = max over processes of [max |g| over this process's gradients is no finite number]        one scalar, fp32

NaN is the maximum of whatever it is among, so one pass over the gradients finds both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit.everyone import carrier, gathered, several


@dataclass
class Seen:
    """The largest |g| of each gradient of this process [n], and whose it is."""

    names: list[str]
    norms: Tensor | None

    def worst(self) -> str:
        """Which are inf or NaN, on which processes, in words. Every process asks."""
        norms = self.norms.tolist() if self.norms is not None else []
        mine = [name for name, n in zip(self.names, norms, strict=True) if n != n or n == float("inf")]
        rows = []
        for rank, (count, some) in enumerate(gathered((len(mine), mine[:5]))):
            if count:
                where = f" on process {rank}" if several() else ""
                rows.append(f"{', '.join(some)}{f' and {count - 5} more' if count > 5 else ''}{where}")
        return "; ".join(rows) or "none in what this optimizer holds"


@torch.no_grad()
def look(optimizer: Optimizer, names: Mapping[int, str], given: Tensor | None) -> tuple[Tensor, Seen]:
    """1 where a gradient of `optimizer` is inf or NaN on any process, or where `given` is 1; else 0.

    `names` are those of parameters, by `id`. Every process makes this call; nobody waits for the device.
    """
    held = parameters(optimizer)
    seen = Seen([], None)
    local: list[Tensor] = []
    for i, p in enumerate(held):
        gradient: Any = p.grad
        if gradient is None:
            continue
        gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        gradient = gradient._values() if gradient.is_sparse else gradient
        if gradient.numel():
            local.append(gradient)
            seen.names.append(names.get(id(p), f"parameter {i} of the optimizer"))
    device = local[0].device if local else held[0].device
    found = torch.zeros((), device=device)
    if local:
        seen.norms = torch.stack([n.to(device) for n in torch._foreach_norm(local, float("inf"))])
        found = (~seen.norms.isfinite().all()).float()
    if given is not None:
        found = torch.maximum(found, given.to(device))
    if several():
        sent = found.to(carrier(device))
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        found = sent.to(device)
    return found, seen


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass
class Pending:
    """What a step came to, on its way from the device."""

    found: Tensor
    event: Any

    @classmethod
    def of(cls, found: Tensor) -> Pending:
        if found.device.type != "cuda":
            return cls(found, None)
        host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        host.copy_(found, non_blocking=True)
        event: Any = cast(Any, torch.cuda).Event()
        event.record(torch.cuda.current_stream(found.device))
        return cls(host, event)

    def read(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.found)
