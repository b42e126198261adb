"""The averages that `optimizer.step()` keeps, in use: put into the model for a while, or gathered.

Swapping moves each process's part only: into a DTensor's own shard, or gathered tensor by tensor into parameters that
processes hold whole. What the parameters were is kept as such parts meanwhile, and comes back bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opendit.everyone import carrier, gathered, is_first, several
from opendit.pieces import Piece, piece_of
from opendit.sharded_ema import ShardedEma, reshard
from opendit.stepping import Stepper, stepper_of
from opendit.wrapping import unwrap


@contextlib.contextmanager
def ema_weights(model: nn.Module, decay: float | str | None = None) -> Iterator[None]:
    """Inside the `with` block the model's parameters are an EMA's; after it they are what they were, bit for bit.

    Every process enters and leaves it. Frozen parameters and buffers stay. `optimizer.step()` inside is an error.

    Args:
        model: the model given to `accelerate`, wrapped or sharded.
        decay: which average: a decay, or `"std0.05"`; default: the first of the config.

    Raises:
        ValueError: the model has no EMA, or not that one. RuntimeError: its parameters were replaced since, or differ
            among processes; an EMA is in already.
    """
    stepper, ema, target = _of(model)
    label = _label(ema, decay)
    if stepper.swapped:
        raise RuntimeError("model: an EMA is in its parameters already; leave that block first")
    stepper.settle()
    ema.check(target)
    own = ema.own()
    stepper.swapped = True
    try:
        ema.write(ema.values[label])
        yield
    finally:
        reshard(target)
        ema.write(own)
        stepper.swapped = False


def ema_state_dict(model: nn.Module, decay: float | str | None = None) -> dict[str, Tensor]:
    """The whole model with an EMA's parameters: a state dict on the CPU on process 0, an empty one elsewhere.

    Keys are those of the unwrapped model's `state_dict()`. Averaged parameters are fp32; frozen ones and buffers are
    the model's own. Every process calls it; arguments and errors as `ema_weights`.
    """
    stepper, ema, target = _of(model)
    label = _label(ema, decay)
    stepper.settle()
    ema.check(target)
    averages = pieces(model)[label]
    by_id = {id(part.parameter): part.name for part in ema.parts}
    names = {name: by_id.get(id(p)) for name, p in target.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for key, value in target.state_dict().items():
        averaged = names.get(key)
        if averaged is not None:
            whole = _on_first(averages[averaged])
        elif hasattr(value, "device_mesh"):
            whole = _on_first(piece_of(value))
        else:
            whole = value.detach().cpu().clone() if isinstance(value, Tensor) else value
        if is_first():
            found[key] = cast(Tensor, whole)
    return found


def pieces(model: nn.Module) -> dict[str, dict[str, Piece]]:
    """This process's part of every average, by label and parameter; writing into a `Piece.values` loads it."""
    stepper, ema, _ = _of(model)
    stepper.settle()
    return {
        label: {
            part.name: Piece(part.shape, part.start, part.stop, value)
            for part, value in zip(ema.parts, values, strict=True)
        }
        for label, values in ema.values.items()
    }


def description(model: nn.Module) -> dict[str, Any]:
    """What there is besides `pieces`, as JSON has it: labels, how many steps they are over, steps with snapshots."""
    stepper, ema, _ = _of(model)
    stepper.settle()
    return {"averages": list(ema.profiles), "steps": ema.steps, "snapshots": list(ema.snapshots)}


def load_description(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Goes on from what `description` returned. Raises `ValueError` where the averages are not the same ones."""
    stepper, ema, _ = _of(model)
    stepper.settle()
    if list(found["averages"]) != list(ema.profiles):
        raise ValueError(
            f"ema: got averages {', '.join(found['averages'])}; allowed: the model's, {', '.join(ema.profiles)}. "
            "Accelerate with the same ema"
        )
    ema.steps = int(found["steps"])
    ema.snapshots = [int(step) for step in found["snapshots"]]


def _of(model: nn.Module) -> tuple[Stepper, ShardedEma, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed: an accelerated torch.nn.Module")
    target = unwrap(model)
    stepper = stepper_of(target)
    if stepper is None or stepper.ema is None:
        raise ValueError(
            "model: it has no EMA; allowed: a model accelerated with ema, such as ema=0.9999, and an optimizer. A copy "
            "of a model has none"
        )
    return stepper, stepper.ema, target


def _label(ema: ShardedEma, decay: float | str | None) -> str:
    labels = list(ema.profiles)
    wanted = labels[0] if decay is None else decay if isinstance(decay, str) else repr(float(decay))
    if wanted not in labels:
        raise ValueError(f"decay: got {decay!r}; allowed: {', '.join(labels)}, as the config says")
    return wanted


def _on_first(piece: Piece) -> Tensor | None:
    """The whole tensor on process 0, on the CPU, from everyone's pieces; None elsewhere."""
    ranges = gathered((piece.start, piece.stop))
    width = max(stop - start for start, stop in ranges)
    padded = torch.zeros(width, dtype=piece.values.dtype, device=carrier(piece.values.device))
    padded[: piece.stop - piece.start] = piece.values
    parts = [padded]
    if several():
        parts = [torch.empty_like(padded) for _ in ranges] if is_first() else []
        dist.gather(padded, parts if is_first() else None, dst=0)
    if not is_first():
        return None
    whole = torch.empty(piece.shape, dtype=piece.values.dtype)
    for (start, stop), part in zip(ranges, parts, strict=True):
        whole.view(-1)[start:stop] = part[: stop - start].cpu()
    return whole
