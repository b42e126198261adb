"""Averages of the parameters over time, in fp32, each process holding its part only.

    a parameter that processes hold whole (one process, DDP)   n elements, of which process r of w has
                                                                [r·c, (r+1)·c),  c = ⌈n / w⌉
    a parameter divided by FSDP2 (a DTensor)                    the same part as of the parameter

so an average takes 4 bytes per parameter over the number of processes, and the whole of it is nowhere. The update is

    e ← e + (1 − d)·(θ − e)                (torch._foreach_lerp_)

which after 10 000 steps at d = 0.9999 is within 1.4e-5 of an fp64 EMA (L2) for parameters that move, 3e-6 where they
move as in training. e·d + θ·(1−d) rounds d itself to fp32, so its two factors don't add up to 1, and ends 5e-5 to 3e-4
off; a compensated sum gives 3e-8, for twice the memory. What limits this form: once θ − e < ulp(e) / (2·(1−d)), which
is 6e-4·|e| at most for d = 0.9999, e stops following a θ that no longer changes.

Frozen parameters and buffers are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opendit.ema_profiles import EMA
from opendit.everyone import carrier, gathered, several
from opendit.pieces import piece_of


@dataclass(frozen=True)
class Part:
    """This process's elements [start, stop) of one parameter; `divided`: others hold the rest of an equal copy."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    stop: int
    divided: bool

    def whole(self) -> Tensor:
        """What is in this process of the parameter, flat, sharing its memory."""
        p: Any = self.parameter.detach()
        return cast(Tensor, p.to_local() if hasattr(p, "device_mesh") else p).view(-1)

    def here(self) -> Tensor:
        """The elements that are averaged here, sharing the parameter's memory."""
        return self.whole()[self.start : self.stop] if self.divided else self.whole()


class ShardedEma:
    """All averages of one model, over the parameters that need gradients now.

    Raises `ValueError` where a parameter's part is no range of its elements (see `piece_of`), or has no values yet.
    """

    def __init__(self, model: nn.Module, description: EMA) -> None:
        reshard(model)
        self.description, self.profiles = description, description.profiles()
        self.steps = 0
        self.parts = [_part(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.known = {id(part.parameter) for part in self.parts}
        for part in self.parts:
            if part.parameter.is_meta:
                raise ValueError(
                    f"model: its parameter {part.name!r} is on the meta device, and an EMA starts at the parameters' "
                    "values; accelerate without an optimizer, and call opendit.attach(model, optimizer) then"
                )
        self.values = {label: _copies([part.here() for part in self.parts]) for label in self.profiles}
        self.snapshots: list[int] = []

    @torch.no_grad()
    def update(self, found: Tensor | None = None) -> None:
        """The update of a step that was taken, or, with `found` on the parameters' device, only where that is 0."""
        self.steps += 1
        now = [part.here().float() for part in self.parts]
        self._move(now)
        for label, profile in self.profiles.items():
            weight = profile.weight(self.steps)
            values: Any = self.values[label]
            if found is None:
                torch._foreach_lerp_(values, now, weight)
                continue
            masked = {d: (weight * (1 - found)).to(d) for d in {v.device for v in values}}
            torch._foreach_lerp_(values, now, [masked[v.device] for v in values])

    def _move(self, now: list[Tensor]) -> None:
        """The averages go where the parameters went since."""
        for label, values in self.values.items():
            if any(v.device != n.device for v, n in zip(values, now, strict=True)):
                self.values[label] = _copies([v.to(n.device) for v, n in zip(values, now, strict=True)])

    def retract(self) -> None:
        """The last update's `found` was 1."""
        self.steps -= 1

    def snapshot_due(self, *, next: bool = False) -> bool:
        """Whether one is to be written now, or after the next step that is taken."""
        every, steps = self.description.snapshot_every, self.steps + next
        return every > 0 and steps % every == 0 and steps not in self.snapshots

    def snapshot(self) -> None:
        """Writes the power-function averages, each process its parts."""
        from opendit.ema_snapshots import write

        write(cast(str, self.description.snapshots), self)
        self.snapshots.append(self.steps)

    def check(self, model: nn.Module) -> None:
        """Raises `RuntimeError` where these are not the model's parameters any more, or not all that are trained, or
        copies differ among processes.

        Every process calls it.
        """
        reshard(model)
        now = {id(p) for p in model.parameters()}
        for part in self.parts:
            if id(part.parameter) not in now:
                raise RuntimeError(
                    f"model: its parameter {part.name!r} was replaced since the EMA was attached (by fully_shard, or a "
                    "move to other memory), so the EMA doesn't follow it; call opendit.attach(model, optimizer) then"
                )
        self.check_complete(model)
        divided = [part.parameter for part in self.parts if part.divided]
        if divided and several():
            sums = torch.stack([p.detach().double().sum() for p in divided]).cpu()
            if any(not torch.allclose(sums, other, rtol=0, atol=0, equal_nan=True) for other in gathered(sums)):
                raise RuntimeError(
                    "model: its parameters differ among processes, so they have no common EMA; allowed: one process, "
                    "DDP, or FSDP2. Wrap the model before training"
                )

    def check_complete(self, model: nn.Module) -> None:
        """Raises `RuntimeError` where a trainable parameter came, or thawed, since: no average has it."""
        left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in self.known]
        if left:
            raise RuntimeError(
                f"model: {len(left)} trainable parameters, such as {left[0]!r}, were added or unfrozen after the EMA "
                "was attached, so no average has them; call opendit.attach(model, optimizer) after that (averages "
                "start anew), or freeze them"
            )

    def own(self) -> list[Tensor]:
        """Copies of this process's parts of the parameters, in their dtypes."""
        return [part.here().clone() for part in self.parts]

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Puts everyone's parts into the parameters: an average, or what `own` gave, bit for bit."""
        for part, value in zip(self.parts, values, strict=True):
            if part.divided:
                _gather_into(part.whole(), value)
            else:
                part.whole().copy_(value)


def reshard(model: nn.Module) -> None:
    """Lets go of what FSDP2 has gathered, so that parameters are the divided ones, and gathered anew when used."""
    for module in model.modules():
        if gathers(module):
            cast(Any, module).reshard()


def gathers(module: nn.Module) -> bool:
    """Whether FSDP2 divides parameters of this module, and gathers them for its forward."""
    return hasattr(module, "set_gradient_divide_factor") and hasattr(module, "reshard")


def _part(name: str, p: nn.Parameter) -> Part:
    piece = piece_of(p)
    if hasattr(p, "device_mesh") or not several():
        return Part(name, p, piece.shape, piece.start, piece.stop, divided=False)
    chunk = -(-piece.stop // dist.get_world_size())
    start = min(dist.get_rank() * chunk, piece.stop)
    return Part(name, p, piece.shape, start, min(start + chunk, piece.stop), divided=True)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in fp32, those of one device one after the other in one allocation."""
    devices: dict[torch.device, int] = {}
    for t in tensors:
        devices[t.device] = devices.get(t.device, 0) + t.numel()
    rest = {d: iter(_cut(torch.empty(n, device=d), [t for t in tensors if t.device == d])) for d, n in devices.items()}
    return [next(rest[t.device]).copy_(t) for t in tensors]


def _cut(memory: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    return iter(cast(Any, memory).split([t.numel() for t in like]))


def _gather_into(whole: Tensor, value: Tensor) -> None:
    """`whole` [n] from every process's chunk of it."""
    chunk = -(-whole.numel() // dist.get_world_size())
    padded = torch.zeros(chunk, dtype=whole.dtype, device=carrier(whole.device))
    padded[: value.numel()] = value
    chunks = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(chunks, padded)
    whole.copy_(torch.cat(chunks)[: whole.numel()])
