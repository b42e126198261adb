"""Edits one model instance, and undoes it.

An edit gives a module a new class, made on the fly from a mixin and the class it already had:

    block.__class__ = (FusedBlock, DiTBlock)      # FusedBlock.forward wins; everything else is DiTBlock's

So parameters, buffers, hooks, state-dict keys and `isinstance` stay as they were, the upstream class and
every other instance of it are untouched, and giving the old class back undoes the edit exactly. Mixins keep
nothing on the instance: what was chosen for them (kernel and attention backends) lives on the made class.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

logger = logging.getLogger("opendit")

_PLAN = "_opendit_plan"

# What was not done while running, and why, per module; each logged once. Kept outside the modules, so that copies
# and pickles of a model never carry it.
_notes: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sampling:
    """What was asked for of a model that samples: its weights' dtype, graphs of its forward, pairs of processes that
    share a batch.
    """

    weights: str = "inherit"
    graphs: bool = False
    pairs: bool = False


@dataclass(frozen=True)
class Choices:
    """Which backend each kernel and the attention use. `kernels` is sorted pairs, so that choices hash."""

    kernels: tuple[tuple[str, str], ...]
    attention: str
    fusion: str = "adaln"
    residual: str = "inherit"
    keep: str = "all"
    graphs: bool = False
    fp8: bool = False
    sequence: Any = None  # an opendit.fastseq.Sequence where the tokens are spread over processes
    sampling: Sampling | None = None

    def kernel(self, name: str) -> str:
        return dict(self.kernels).get(name, "reference")


# What a mixin is compared with its module on.
REFERENCE = Choices(kernels=(), attention="reference")


class Patched:
    """Base of every mixin: an ordinary `forward` with the upstream signature, and nothing else."""

    _opendit_base: ClassVar[type[nn.Module]]
    _opendit_made: ClassVar[type[nn.Module]]
    _opendit_mixin: ClassVar[type[Patched]]
    _opendit_choices: ClassVar[Choices]
    _opendit_kernels: ClassVar[dict[str, str]]
    _opendit_attention: ClassVar[str]
    _opendit_fusion: ClassVar[str]
    _opendit_residual: ClassVar[str]
    _opendit_keep: ClassVar[str]
    _opendit_graphs: ClassVar[bool]
    _opendit_fp8: ClassVar[bool]
    _opendit_sequence: ClassVar[Any]
    _opendit_sampling: ClassVar[Sampling | None]
    _opendit_around: ClassVar[tuple[type[Patched], ...]]
    _opendit_parameters: ClassVar[tuple[str, ...]]
    # Which kernels and whether attention, by the names that configs use.
    uses: ClassVar[tuple[str, ...]] = ()
    # Whether its value depends on timestep and condition alone, and goes through `opendit.patch.steps`.
    is_site: ClassVar[bool] = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The made class has no import path; pickle and deepcopy make it again from its ingredients.
        cls = type(self)
        recipe = (cls._opendit_base, cls._opendit_mixin, cls._opendit_choices, cls._opendit_around)
        return _rebuild, recipe, cast(Any, self).__getstate__()

    def _kernel(self, name: str) -> str:
        return self._opendit_kernels.get(name, "reference")

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments in upstream's order, whatever upstream calls them; None where upstream must sort it out."""
        names = self._opendit_parameters
        rest = names[len(args) :]
        if len(args) + len(kwargs) != len(names) or any(name not in kwargs for name in rest):
            return None
        return (*args, *(kwargs[name] for name in rest)) if kwargs else args

    def _upstream(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward that this mixin replaced, remembers why, and logs it the first time."""
        self._note(f"upstream's own forward was used: {reason}", logging.WARNING)
        return type(self)._opendit_base.forward(cast(nn.Module, self), *args, **kwargs)

    def _note(self, what: str, level: int = logging.INFO) -> None:
        """Remembers, and logs the first time, that less was done than could be, and why."""
        if not torch.compiler.is_compiling():
            seen = _notes.setdefault(cast(nn.Module, self), set())
            if what not in seen:
                seen.add(what)
                logger.log(level, "%s: %s", type(self)._opendit_base.__name__, what)


_Around = tuple[type[Patched], ...]
_made: dict[tuple[type, type, Choices, _Around], type[nn.Module]] = {}


def patched_class(
    base: type[nn.Module], mixin: type[Patched], choices: Choices, around: _Around = ()
) -> type[nn.Module]:
    """The class that behaves as `base` with `mixin`'s forward, inside the forwards of `around`, the first outermost.

    Equal arguments give the same class.
    """
    key = (base, mixin, choices, around)
    if key not in _made:
        _made[key] = _make_class(base, mixin, choices, around)
    return _made[key]


def _make_class(base: type[nn.Module], mixin: type[Patched], choices: Choices, around: _Around) -> type[nn.Module]:
    # The name stays upstream's: device maps, wrap policies and printed models go by it.
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_opendit_base": base,
        "_opendit_mixin": mixin,
        "_opendit_choices": choices,
        "_opendit_kernels": dict(choices.kernels),
        "_opendit_fusion": choices.fusion,
        "_opendit_residual": choices.residual,
        "_opendit_keep": choices.keep,
        "_opendit_graphs": choices.graphs,
        "_opendit_fp8": choices.fp8,
        "_opendit_sequence": choices.sequence,
        "_opendit_sampling": choices.sampling,
        "_opendit_around": around,
        "_opendit_attention": choices.attention,
        "_opendit_parameters": tuple(inspect.signature(base.forward).parameters)[1:],
    }
    made: Any = type(base.__name__, (*around, mixin, base), namespace)
    made._opendit_made = made  # a subclass made later, by fully_shard say, is told apart by this
    return cast("type[nn.Module]", made)


def _rebuild(base: type[nn.Module], mixin: type[Patched], choices: Choices, around: _Around = ()) -> nn.Module:
    cls = patched_class(base, mixin, choices, around)
    return cls.__new__(cls)


@dataclass(frozen=True)
class Edit:
    """One module that gets `mixin`; `what` says what changes there, in a few words.

    `around` are mixins whose forward runs before and after it, calling `super().forward`.
    """

    fqn: str
    mixin: type[Patched]
    what: str
    around: tuple[type[Patched], ...] = ()


@dataclass(frozen=True)
class Kept:
    """One module, or part of one, that stays as it was, and why."""

    fqn: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Everything that is to happen to a model, decided before anything does.

    `units` and `entries` are what an engine must know of it: see `opendit.engines.Setup`.
    """

    family: str
    model: str
    edits: tuple[Edit, ...]
    kept: tuple[Kept, ...]
    choices: Choices
    compiled: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    stepping: Any = None  # an opendit.stepping.Stepping: what the optimizer's step is to do besides

    def __repr__(self) -> str:
        return f"<opendit plan for {self.model}: {len(self.edits)} modules changed, {len(self.kept)} left>"


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that was applied to `model`, or None."""
    return cast("Plan | None", model.__dict__.get(_PLAN))


def notes(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Where less was done while running than was planned: pairs of module name, and what and why."""
    for fqn, module in model.named_modules():
        for what in sorted(_notes.get(module, ())):
            yield fqn, what


def apply(model: nn.Module, plan: Plan) -> None:
    """Carries `plan` out on this instance. Where one edit fails, those before it are undone."""
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for edit in plan.edits:
            module = model.get_submodule(edit.fqn)
            if isinstance(module, Patched):
                continue  # the same module under a second name
            base = type(module)
            module.__class__ = patched_class(base, edit.mixin, plan.choices, edit.around)
            done.append((module, base))
        for fqn in plan.compiled:
            # The types of nn.Module.compile are not declared.
            cast(Any, model.get_submodule(fqn)).compile()
    except BaseException:
        for module, base in done:
            module.__class__ = base
        _uncompile(model, plan)
        raise
    model.__dict__[_PLAN] = plan  # a model's own __setattr__ may refuse names that it does not know


def _uncompile(model: nn.Module, plan: Plan | None) -> None:
    modules = dict(model.named_modules())
    for fqn in plan.compiled if plan else ():
        if fqn in modules:
            modules[fqn].__dict__.pop("_compiled_call_impl", None)


def unapply(model: nn.Module) -> None:
    """Gives every module of `model` back the class it came with.

    Raises `ValueError`, before anything is changed, where a class made later by someone else (such as
    `fully_shard`) stands on top of ours.
    """
    patched = [(fqn, module) for fqn, module in model.named_modules() if isinstance(module, Patched)]
    for fqn, module in patched:
        if type(module).__dict__.get("_opendit_mixin") is None:
            made = " < ".join(f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__[:2])
            raise ValueError(
                f"model: {fqn or 'the model itself'} was given another class after accelerate ({made}); undo "
                "that first, or call restore before sharding or wrapping"
            )
        if "forward" in module.__dict__ and not _its_own(module):
            raise ValueError(
                f"model: the forward of {fqn or 'the model itself'} was replaced after accelerate (hooks of Accelerate "
                "do that); take them off first, for they would still call what restore removes"
            )
    _uncompile(model, plan_of(model))
    for _, module in patched:
        _notes.pop(cast(nn.Module, module), None)
        module.__dict__.pop("forward", None)
        module.__class__ = cast(Any, type(module))._opendit_base
    model.__dict__.pop(_PLAN, None)


def _its_own(module: Any) -> bool:
    """Whether the forward on this instance is that of its class, as Accelerate's `unwrap_model` leaves it there."""
    forward, kind = module.__dict__["forward"], cast(Any, type(module))
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is kind.forward


def untouched(*norms: nn.Module) -> bool:
    """Whether these are still torch's own LayerNorms, with nothing on them that a fused pass would leave out."""
    return all(type(norm) is nn.LayerNorm and not hooked(norm) for norm in norms)


def hooked(module: nn.Module) -> bool:
    """Whether someone put a hook or another forward on a module that a fused forward does not call, or hooks on all."""
    return bool(
        "forward" in module.__dict__
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast would cast `x` to for a Linear; None where it is off or leaves `x` alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
