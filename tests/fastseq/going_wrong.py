"""Cases for `test_mutants`: each plants one mistake and says what the proofs make of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import opendit
from opendit.fastseq import collectives, fastseq, ops, project, ring, ulysses
from opendit.fastseq.ops import Line
from opendit.patch import joint
from opendit.patch.core import notes
from opendit.patch.families import diffusers_wan
from opendit.patch.families.lightningdit import RotaryAttention
from tests.comparing import build, twin
from tests.fastseq import parity
from tests.fastseq.whole_models import spread
from tests.tiny_models import TINY

_BY_NAME = {t.name: t for t in TINY}
_TINY = _BY_NAME["dit"]


@contextlib.contextmanager
def planted(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cases(world: int) -> dict[str, Any]:
    mutants = {name: functools.partial(_mutant, world, *found) for name, found in MUTANTS.items()}
    honest = {f"honest/{m}": functools.partial(_mutant, world, m, contextlib.nullcontext) for m in METHODS}
    positions = {f"positions of the first tokens, {m}": functools.partial(_at_zero, world, m) for m in POSITIONS}
    return {**honest, **mutants, **positions, **{n: functools.partial(f, world) for n, f in INPUTS.items()}}


METHODS = ("fastseq", "fastseq-overlapped", "ulysses", "ring")
# What turns q and k by their tokens' positions: a part's begin elsewhere, except where all tokens were gathered.
POSITIONS = ("ulysses", "ring")


def _mutant(world: int, method: str, mistake: Callable[[], Any], name: str = "dit") -> float:
    """The worst relative error of a gradient with the mistake in place; two processes share a sequence."""
    tiny = _BY_NAME[name]
    plain = build(tiny, torch.float64)
    with mistake():
        model = spread(twin(plain), method, 2)
        found = parity.together(model, tiny, 1)
        return parity.errors(found, parity.alone(plain, tiny, world // 2, 1))[1]


def _at_zero(world: int, method: str) -> float:
    original = RotaryAttention._normalise_and_turn
    wrong = lambda self, turns, q, k, first: original(self, turns, q, k, 0)  # noqa: E731
    return _mutant(world, method, lambda: planted(RotaryAttention, "_normalise_and_turn", wrong), "lightningdit")


def _rescaled(function: type, factor: float) -> Callable[[], Any]:
    original = function.backward  # type: ignore[attr-defined]

    def wrong(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        first, *others = original(ctx, grad)
        return (first * factor, *others)

    return lambda: planted(function, "backward", staticmethod(wrong))


def _other_group() -> Any:
    """Every collective in the data-parallel group, which has as many ranks."""
    return planted(Line, "group", property(lambda line: collectives.ops.groups(line.sp, line.ring).dp))


def _cut_in_another_order() -> Any:
    original = project.Rows.cut
    return planted(project.Rows, "cut", lambda self, parameters: _rolled(original(self, parameters)))


def _exchanged_in_another_order() -> Any:
    original = ulysses.to_heads
    return planted(ulysses, "to_heads", lambda parts, line, length: original(_rolled(parts), line, length))


def _rolled(parts: Any) -> Any:
    return type(parts)((parts[1], parts[0], *parts[2:])) if len(parts) == 3 else parts


def _heads_shifted() -> Any:
    original = fastseq.Rows
    return planted(fastseq, "Rows", lambda heads, first, here: original(heads, 0, here))


def _averaged_without_weights() -> Any:
    def wrong(out: Any, lse: Any, part: Any, part_lse: Any) -> Any:
        return (part.to(out.dtype), part_lse) if lse is None else ((out + part) / 2, torch.logaddexp(lse, part_lse))

    return planted(ring, "_merge", wrong)


def _not_sent_home() -> Any:
    return planted(ops, "shift", lambda x, line: x)


def _sum_not_passed_on() -> Any:
    def wrong(dq: Any, X: Any, weights: Any, dweights: Any, line: Any, local: Any, need: Any) -> Any:
        with planted(ops, "start_shift", lambda x, line, out=None: (torch.zeros_like(x), [])):
            return original(dq, X, weights, dweights, line, local, need)

    original = project._backward_overlapped
    return planted(project, "_backward_overlapped", wrong)


def _own_share_only() -> Any:
    def wrong(ctx: Any, dwhole: torch.Tensor) -> tuple[Any, ...]:
        return dwhole.split(ctx.heads, 2)[ctx.line.rank], None, None

    return planted(collectives._GatherHeads, "backward", staticmethod(wrong))


def _texts_heads_turned() -> Any:
    original = joint.gather_heads
    return planted(joint, "gather_heads", lambda x, heads, line: original(x, heads, line).roll(1, 2))


def _someone_elses_positions(module: Any) -> Callable[[], Any]:
    original = module.of_part
    return lambda: planted(module, "of_part", lambda table, dim, *where: original(table.roll(1, dim), dim, *where))


MUTANTS: dict[str, tuple[Any, ...]] = {
    "gather's scale dropped": ("fastseq", _rescaled(collectives._Gather, 1 / 2)),
    "split's scale dropped": ("ulysses", _rescaled(collectives._Split, 2.0)),
    "another group": ("fastseq", _other_group),
    "another group, ulysses": ("ulysses", _other_group),
    "q and k mixed up, fastseq": ("fastseq", _cut_in_another_order),
    "q and k mixed up, ulysses": ("ulysses", _exchanged_in_another_order),
    "someone else's heads": ("fastseq", _heads_shifted),
    "merged without weights": ("ring", _averaged_without_weights),
    "dk and dv not sent home": ("ring", _not_sent_home),
    "dx not passed on": ("fastseq-overlapped", _sum_not_passed_on),
    "text's gradients not summed": ("ulysses", _own_share_only, "cogvideox-rotary"),
    "text's heads in another order": ("fastseq", _texts_heads_turned, "hunyuan-video"),
    "positions of other tokens, alone": ("ulysses", _someone_elses_positions(diffusers_wan), "wan"),
    "positions of other tokens, beside a text": ("ulysses", _someone_elses_positions(joint), "cogvideox-rotary"),
}


def _losses(model: nn.Module, seed: int | None, draw: int) -> list[str]:
    """Trains one forward on noise of its own; what was noted, or raised."""
    if seed is not None:
        opendit.seed(seed, model)
    else:
        torch.manual_seed(draw)
    x, t, y = torch.randn(2, 4, 6, 6), torch.randint(0, 1000, (2,)), torch.randint(0, 5, (2,))
    try:
        model.train()(x, t, y)
    except ValueError as error:
        return [str(error)]
    return [note for _, note in notes(model)]


def _model() -> nn.Module:
    return opendit.accelerate(_TINY.build(), sp_size=2)


def _rank() -> int:
    return torch.distributed.get_rank()


def _other_state(world: int) -> list[str]:
    """Equal inputs, but the generators that label drops come from have diverged."""
    model = _model()
    opendit.seed(3, model)
    x, t, y = torch.randn(2, 4, 6, 6), torch.randint(0, 1000, (2,)), torch.randint(0, 5, (2,))
    torch.rand(1 + _rank() % 2)
    model.y_embedder.dropout = 0.0
    try:
        model.train()(x, t, y)
    except ValueError as error:
        return [str(error)]
    return []


def _other_shape(world: int) -> list[str]:
    model = _model().eval()
    batch = 1 + _rank() % 2
    try:
        model(torch.zeros(batch, 4, 6, 6), torch.zeros(batch).long(), torch.zeros(batch).long())
    except ValueError as error:
        return [str(error)]
    return []


def _seeds(world: int) -> tuple[int, int, int, float, int]:
    model = _model()
    used = opendit.seed(5, model)
    return opendit.data_parallel_rank(model), opendit.data_parallel_size(model), used, torch.rand(1).item(), _rank()


INPUTS: dict[str, Callable[[int], Any]] = {
    "seeded": lambda world: _losses(_model(), 0, 0),
    "noise differs in a group": lambda world: _losses(_model(), None, _rank()),
    "noise equal across groups": lambda world: _losses(_model(), None, 0),
    "random state differs in a group": _other_state,
    "shape differs in a group": _other_shape,
    "seeds": _seeds,
}
