"""Pieces that families plan with: look at a module, probe it, and either edit it or say why not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from opendit.patch.core import Edit, Kept, Patched, hooked
from opendit.patch.probe import Inputs, disagreement, signature

AnswerT = TypeVar("AnswerT")


class Planner:
    """Collects edits and reasons. Modules that are built alike are probed once."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []
        self.kept: list[Kept] = []
        self._taken_over: set[int] = set()
        self._verdicts: dict[Any, str | None] = {}
        self._answers: dict[Any, object] = {}

    def keep(self, fqn: str, why: str) -> None:
        self.kept.append(Kept(fqn, why))

    def offer(
        self,
        fqn: str,
        module: nn.Module,
        mixin: type[Patched],
        what: str,
        inputs: Inputs | Sequence[Inputs],
        *,
        bypassed: tuple[nn.Module, ...] = (),
        stand_ins: Mapping[str, nn.Module] | None = None,
        hint: str = "",
        **options: Any,
    ) -> bool:
        """Plans `mixin` for `module` if it computes the same; otherwise notes the reason.

        `bypassed` are the children whose own forward the mixin does not call; `hint` is added to the probe's reason.
        """
        key = (mixin, signature(module))
        if key not in self._verdicts:
            self._verdicts[key] = disagreement(module, mixin, inputs, stand_ins=stand_ins, **options)
        reason = self._verdicts[key]
        if reason is not None and hint:
            reason = f"{reason}; {hint}"
        if reason is None and any(hooked(child) for child in bypassed):
            reason = "hooks or another forward are registered on a part that the fused forward does not call"
        if reason is not None:
            self.keep(fqn, reason)
            return False
        self.edits.append(Edit(fqn, mixin, what))
        self._taken_over.update(id(module) for module in bypassed)
        return True

    def edit(self, fqn: str, mixin: type[Patched], what: str) -> None:
        """Plans `mixin` for a module that was looked at already."""
        self.edits.append(Edit(fqn, mixin, what))

    def once(self, question: Callable[..., AnswerT], module: nn.Module, *args: Any) -> AnswerT:
        """The answer to a question about a module, asked once for all modules built alike."""
        key = (question, signature(module), *args)
        if key not in self._answers:
            self._answers[key] = question(module, *args)
        return cast(AnswerT, self._answers[key])

    def took_over(self, module: nn.Module) -> bool:
        """Whether an edit planned so far does this module's work."""
        return id(module) in self._taken_over


def parameters_of_forward(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of the class's own forward, without self."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def has(module: nn.Module, *paths: str) -> bool:
    """Whether every dotted path leads somewhere that is not None."""
    for path in paths:
        at: Any = module
        for name in path.split("."):
            at = getattr(at, name, None)
            if at is None:
                return False
    return True


def plain_layernorm(module: object, width: int | None = None) -> bool:
    """Whether `module` is torch's LayerNorm itself, over the last dimension only (of `width`)."""
    return (
        type(module) is nn.LayerNorm
        and len(module.normalized_shape) == 1
        and (width is None or module.normalized_shape[0] == width)
    )
