"""Which model families there are, and which of them a model belongs to.

A family is one record made in one file of `opendit/patch/families/`; files are discovered, there is no list
to keep. Other packages add theirs with `register_family`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from opendit.patch.core import Patched
from opendit.patch.planner import Planner


@dataclass(frozen=True)
class Trait:
    """One thing that is true of every model of a family: what it says, and how it is checked."""

    says: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Spread:
    """Where a family's tokens [B, L, D] can be spread over processes.

    Attributes:
        gather: the name of the module after whose output [B, L, C] the model needs all tokens.
        attention, mlp: the names of a block's two sublayers; blocks that have no such mlp compute it themselves.
        cross: the names of sublayers, in blocks that have them, that look from the tokens at another sequence.
        tokens: how many tokens the model is built for; None where that can't be told.
    """

    gather: str
    attention: str
    mlp: str
    cross: tuple[str, ...] = ()
    tokens: Callable[[Any], int | None] = lambda model: None


@dataclass(frozen=True)
class Alternating:
    """Blocks in pairs over videos' rows [rows, L, D] with a condition per row: within frames, then within tokens.

    The first of a pair is given [R, T, D] and [R, C], the second [B·T, F, D] and [B·T, C]; between them the model moves
    tokens and frames about but computes nothing that looks across tokens of a frame.

    Attributes:
        gather: the name of the module after whose output [R, T, C] the model needs all tokens.
        tokens, frames: T, which is the same for all inputs, and the F that the model is built for.
    """

    gather: str
    tokens: Callable[[Any], int]
    frames: Callable[[Any], int]


@dataclass(frozen=True)
class Joint:
    """Blocks of two streams of tokens, image [B, L, D] and text [B, Lt, D], their first two arguments: both are spread.

    Attributes:
        gather: the name of the module after whose output [B, L, C] of the image the model needs all tokens.
        around: the mixin that stands around the model and refuses arguments for which a part will not do.
        attention, mlp: the names of the sublayers in blocks that have them; only attention looks across tokens.
        norms: the names of what norms a stream, in blocks or after them, and might be anything.
        tokens: as in `Spread`.
    """

    gather: str
    around: type[Patched]
    attention: tuple[str, ...] = ("attn", "attn2")
    mlp: tuple[str, ...] = ("ff", "ff_context")
    norms: tuple[str, ...] = ("norm1_context", "norm_out")
    tokens: Callable[[Any], int | None] = lambda model: None


@dataclass(frozen=True)
class Family:
    """A kind of model that `accelerate` knows.

    Attributes:
        name: short and unique.
        describes: one line for error messages and documentation.
        traits: all must hold for a model to be of this family; ordered from coarse to fine.
        plan: tells the planner what to edit and what to leave, with reasons. It changes nothing.
        blocks: where the transformer blocks are: the name of a ModuleList, or the names of several.
        spread: where its sequence is split and gathered, for blocks that are called one after the other: `Spread` where
            attention looks across all tokens, `Alternating`, for one list, where it looks within frames and within
            tokens in turn, `Joint` for image and text beside each other; None: it has no sequence parallelism.
        called_apart: names of modules inside blocks that the model also calls from outside them.
    """

    name: str
    describes: str
    traits: tuple[Trait, ...]
    plan: Callable[[Any, Planner], None]
    blocks: str | tuple[str, ...]
    spread: Spread | Alternating | Joint | None = None
    called_apart: tuple[str, ...] = ()

    def blocks_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Its transformer blocks by their names in `model`."""
        lists = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        return [(f"{name}.{i}", block) for name in lists for i, block in model.get_submodule(name).named_children()]


_registered: dict[str, Family] = {}


@functools.cache
def builtin() -> dict[str, Family]:
    """The families of opendit itself by name."""
    package = importlib.import_module("opendit.patch.families")
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(package.__path__):
        family: Family | None = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found


def families() -> dict[str, Family]:
    """Every known family by name."""
    return {**builtin(), **_registered}


def _nothing(model: Any, planner: Planner) -> None: ...


# By name only: it holds of every model. What it does is in opendit/patch/generic.py.
GENERIC = Family("generic", "any model: what needs no knowledge of it", (), _nothing, ())


def register_family(family: Family) -> None:
    """Makes `accelerate` know `family`. Raises `ValueError` where the name is taken."""
    if not isinstance(family, Family):
        raise TypeError(f"family: got {type(family).__name__}; allowed: an opendit.patch.registry.Family")
    if not family.traits:
        raise ValueError(f"family: {family.name!r} has no traits and would match every model; give it at least one")
    if family.name in families() or family.name == GENERIC.name:
        known = ", ".join([*families(), GENERIC.name])
        raise ValueError(f"family: the name {family.name!r} is taken; known: {known}. Choose another name")
    _registered[family.name] = family


def named(name: object, model: nn.Module) -> Family:
    """The family of that name. Raises `ValueError` where there is none, or `model` is not of it."""
    known = {**families(), GENERIC.name: GENERIC}
    if not isinstance(name, str):
        raise TypeError(f"family: got {name!r}; allowed: None, or one of {', '.join(known)}")
    if name not in known:
        raise ValueError(f"family: got {name!r}; allowed: {', '.join(known)}, or None to recognise it")
    failed = first_failure(known[name], model)
    if failed is not None:
        raise ValueError(
            f"family: got {name!r}, but of {type(model).__name__} it does not hold that {failed.says}. Leave family "
            "out to recognise the model, or take 'generic'"
        )
    return known[name]


def resolve(model: nn.Module) -> Family:
    """The one family that `model` belongs to.

    Raises `ValueError` where there is none (naming the nearest and the test that failed there) or several.
    """
    known = families()
    failed = {name: first_failure(family, model) for name, family in known.items()}
    matching = [name for name, test in failed.items() if test is None]
    if len(matching) == 1:
        return known[matching[0]]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if matching:
        raise ValueError(f"model: {kind} matches several families: {', '.join(matching)}. One of them must say more")

    def passed(name: str) -> int:
        test = failed[name]
        return known[name].traits.index(test) if test is not None else 0

    nearest = max(known, key=passed)
    test = failed[nearest]
    raise ValueError(
        f"model: {kind} is of no known family. Known: "
        + "; ".join(f"{f.name} ({f.describes})" for f in known.values())
        + f". Nearest: {nearest}, but it does not hold that {test.says if test else '?'}. "
        + (_inside(model, known) or "")
        + "Describe other models with opendit.register_family, or take what needs no description: family='generic'"
    )


def first_failure(family: Family, model: nn.Module) -> Trait | None:
    for trait in family.traits:
        try:
            holds = trait.holds(model)
        except (AttributeError, TypeError, IndexError, KeyError):  # it looked for something that is not there
            holds = False
        if not holds:
            return trait
    return None


def _inside(model: nn.Module, known: dict[str, Family]) -> str | None:
    """A hint where a part of `model` is what the caller may have meant."""
    for fqn, child in model.named_modules():
        if fqn:
            for family in known.values():
                if first_failure(family, child) is None:
                    return f"Its part {fqn!r} is of family {family.name}: pass that. "
    return None
