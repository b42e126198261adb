"""An optimizer whose steps are divided among processes, seen as if it held the model's parameters.

    engine's view    groups hold this process's shares: flat ranges of parameters, padded;  state is by share
    here             groups hold the model's parameters;  state is by parameter, of divided tensors (opendit.divided)

on the same memory and the same options, so that learning rate schedules, clipping and checkpoints need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit.divided import Divided


@dataclass(frozen=True)
class Share:
    """What this process steps of one parameter: elements [start, start + length).

    Attributes:
        owner: what the engine's optimizer has in their place; None where this process has none of them.
        start, length: the range.
        size: its elements in state tensors, with padding.
        whole: every process steps all of it.
    """

    owner: Tensor | None
    start: int
    length: int
    size: int
    whole: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """This range of a whole tensor, or what a divided one has here: [length]."""
        if isinstance(tensor, Divided):
            return tensor.to_local()
        return tensor.detach().reshape(-1)[self.start : self.start + self.length]


class Gradients(Protocol):
    """The engine's side: whose gradients are where, and how a step is taken."""

    groups: list[list[nn.Parameter]]
    shares: dict[nn.Parameter, Share]
    boosted: Any
    """The engine's own optimizer, with `state_dict` and `load_state_dict` of whole states."""

    def step(self) -> None: ...

    def zero(self, set_to_none: bool) -> None: ...


class DividedOptimizer(Optimizer):
    """`inner`, the user's own, steps this process's shares; this is around it.

    Its groups are inner's but for their parameters, so schedules may be built on either; `state` is by parameter.
    """

    @classmethod
    def around(cls, inner: Optimizer, gradients: Gradients) -> DividedOptimizer:
        """Under the name of `inner`'s class, by which checkpoints know what kind of optimizer a state is for.

        Steps that `inner` has taken are carried on, each process with its share of the state.
        """
        before = {p: inner.state.pop(p) for p in gradients.shares if p in inner.state}
        made = type(type(inner).__name__, (cls,), {"__module__": __name__})(inner, gradients)
        for parameter, state in before.items():
            made.state[parameter] = state
        return cast(DividedOptimizer, made)

    def __init__(self, inner: Optimizer, gradients: Gradients):
        self._divided = False
        options = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
        pairs = zip(options, gradients.groups, strict=True)
        super().__init__([{**given, "params": list(params)} for given, params in pairs], inner.defaults)
        self._divided = True
        self.inner, self.gradients = inner, gradients
        views = zip(inner.param_groups, gradients.groups, strict=True)
        self.param_groups = [_Group(group, params) for group, params in views]  # type: ignore[misc]
        self.state = _State(inner, gradients.shares)  # type: ignore[assignment]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gradients.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.gradients.zero(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._divided:
            raise ValueError(
                "optimizer: groups can't be added once the engine has divided the parameters; add them before "
                "accelerate"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> Any:
        raise TypeError(
            f"optimizer: {type(self).__name__} steps what an engine divided, and can't be copied or pickled; allowed: "
            "its state_dict(), opendit.save. Build another one for a copy of the model"
        )

    def state_dict(self) -> dict[str, Any]:
        """As `inner` would give it in one process, gathered; every process makes this call."""
        return cast("dict[str, Any]", self.gradients.boosted.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a whole state, as `state_dict` gives it; each process keeps its share."""
        self.gradients.boosted.load_state_dict(state_dict)


class _Group(MutableMapping[str, Any]):
    """One group of the user's optimizer, with the model's parameters in place of this process's shares."""

    def __init__(self, inner: dict[str, Any], params: list[nn.Parameter]):
        self._inner, self._params = inner, params

    def __getitem__(self, key: str) -> Any:
        return self._params if key == "params" else self._inner[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "params":
            raise ValueError("optimizer: parameters of a group can't be changed once the engine has divided them")
        self._inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self._inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return repr(dict(self))


class _State(MutableMapping[nn.Parameter, "dict[str, Any]"]):
    """The user's optimizer's state by the model's parameters; what was not stepped yet has an empty one."""

    def __init__(self, inner: Optimizer, shares: Mapping[nn.Parameter, Share]):
        self._inner, self._shares = inner, shares

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Any]:
        share = self._shares.get(parameter)
        if share is None or share.owner is None:
            return {}
        held = self._inner.state.get(share.owner, {})
        return {key: _outward(value, parameter, share) for key, value in held.items()}

    def __setitem__(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        share = self._shares[parameter]
        if share.owner is not None:
            self._inner.state[share.owner] = {key: _inward(value, share) for key, value in state.items()}

    def __delitem__(self, parameter: nn.Parameter) -> None:
        if (owner := self._shares[parameter].owner) is not None:
            self._inner.state.pop(owner, None)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._shares if parameter in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, parameter: object) -> bool:
        share = self._shares.get(cast(nn.Parameter, parameter))
        return share is not None and share.owner is not None and share.owner in self._inner.state


def _outward(value: Any, parameter: nn.Parameter, share: Share) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return (
        value.view(parameter.shape) if share.whole else Divided(value.view(-1)[: share.length], share.start, parameter)
    )


def _inward(value: Any, share: Share) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    assert share.owner is not None
    mine = torch.zeros(share.size, dtype=value.dtype, device=share.owner.device)
    mine[: share.length] = share.of(value)
    return mine
