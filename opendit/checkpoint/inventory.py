"""All that a training run is made of, item by item: what `save` writes and `load` insists on.

model       parameters and persistent buffers
optimizer   moments, counters and options, by parameter name
ema         a module of averaged weights, or what `accelerate` attached
scheduler, scaler, sampler    their state_dict()
…           whatever else is attached to the model, such as the rule for skipped steps
rng         every process's random states
step, extra, config
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opendit import parallel
from opendit.attached import attached
from opendit.checkpoint import randomness, together
from opendit.checkpoint.errors import CheckpointError
from opendit.checkpoint.modules import module_pieces, optimizer_state
from opendit.checkpoint.plain import encode
from opendit.patch.core import plan_of
from opendit.pieces import Piece, piece_of
from opendit.training import training_of
from opendit.wrapping import unwrap

WITH_STATE_DICT = ("sampler", "scheduler", "scaler")  # the sampler may refuse, so it comes first


@dataclass
class Run:
    """A training run's parts, as given to `save` or `load`."""

    model: nn.Module
    optimizer: Optimizer | None = None
    ema: nn.Module | None = None
    scheduler: Any = None
    scaler: Any = None
    sampler: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model: got {type(self.model).__name__}; allowed: a torch.nn.Module")
        known = training_of(self.model)
        engine = known.engine if known is not None else None
        paged = engine is not None and (engine.source, engine.plugin) == ("colossalai", "gemini")
        if paged or type(self.model).__name__ == "GeminiDDP":
            raise ValueError(
                "model: it is on ColossalAI's 'gemini', whose fp32 masters are in chunks of its own; allowed: those of "
                "other engines. Take its state_dict() and its optimizer's, or train with engine='torch'"
            )
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"optimizer: got {type(self.optimizer).__name__}; allowed: a torch.optim.Optimizer, or None"
            )
        if self.ema is not None and not isinstance(self.ema, nn.Module):
            raise TypeError(
                f"ema: got {type(self.ema).__name__}; allowed: a torch.nn.Module of averaged weights, or None"
            )
        for name in WITH_STATE_DICT:
            value = getattr(self, name)
            if value is not None and not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise TypeError(
                    f"{name}: got {type(value).__name__}; allowed: what has state_dict and load_state_dict, or None"
                )
        if self.ema is not None and "ema" in attached(unwrap(self.model)):
            raise ValueError("ema: got a module, but accelerate gave this model an EMA of its own; leave ema out")

    def items(self) -> list[str]:
        """The names of what is there, but for the model and the random states."""
        given = [name for name in ("optimizer", "ema", *WITH_STATE_DICT) if getattr(self, name) is not None]
        return [*given, *attached(unwrap(self.model))]

    def layout(self) -> dict[str, int]:
        """Processes, and how many of them share a sequence: random states belong to one such layout."""
        return {"processes": together.size(), "data parallel": parallel.data_parallel_size(self.model)}


@dataclass
class State:
    """What is written: `pieces` of tensors, `shared` plain values that all processes agree on, and this one's `own`.

    `buffers` names those of the pieces that need not be equal in all processes.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


def collect(run: Run, step: int, extra: Any, config: Any) -> State:
    state = State()
    for name, module in (("model", run.model), ("ema", run.ema)):
        if module is not None:
            state.pieces.update(module_pieces(module, name))
            state.buffers.update(f"{name}/{key}" for key, _ in unwrap(module).named_buffers(remove_duplicate=False))
    if run.ema is not None:
        state.shared["ema"] = {}
    if run.optimizer is not None:
        state.shared["optimizer"], found = optimizer_state(run.optimizer, run.model)
        state.pieces.update(found)
    for name in WITH_STATE_DICT:
        if getattr(run, name) is not None:
            _put(state, state.shared, name, getattr(run, name).state_dict())
    target = unwrap(run.model)
    for name, thing in attached(target).items():
        _put(state, state.shared, name, dict(thing.state(target)))
        state.pieces.update((f"{name}/{key}", piece) for key, piece in thing.pieces(target).items())
    state.shared["layout"] = run.layout()
    for name, value in (("step", step), ("extra", extra), ("config", config), ("made by", _made_by(run.model))):
        _put(state, state.shared, name, value)
    _put(state, state.own, f"rng/{together.rank()}", randomness.states())
    return state


def _put(state: State, values: dict[str, Any], name: str, value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    values[name] = encode(value, name, tensors)
    state.pieces.update((key, piece_of(tensor)) for key, tensor in tensors.items())


def _made_by(model: nn.Module) -> dict[str, Any]:
    import opendit

    target = unwrap(model)
    plan = plan_of(target)
    made = {"opendit": opendit.__version__, "torch": str(torch.__version__), "model": type(target).__name__}
    return made if plan is None else {**made, "family": plan.family}


def check_finite(values: Mapping[str, torch.Tensor]) -> None:
    """Raises `CheckpointError` naming the parameters, averages and moments of which something is not finite.

    Leave out buffers: a mask of −inf is one.
    """
    flags: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for key, value in values.items():
        if key.split("/")[0] in ("model", "optimizer", "ema") and (value.is_floating_point() or value.is_complex()):
            value = value.float() if value.element_size() == 1 else value  # torch can't look at all kinds of 8 bits
            flags.setdefault(value.device, []).append((key, value.isfinite().all()))
    bad = []
    for rows in flags.values():
        fine = torch.stack([flag for _, flag in rows]).tolist()  # one wait for each device
        bad += [key for (key, _), ok in zip(rows, fine, strict=True) if not ok]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{', '.join(bad[:3])}{more}: holds numbers that are not finite; nothing was saved, earlier ones stay. "
            "Go back to the last one, with a lower learning rate or gradient clipping"
        )
