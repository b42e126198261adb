"""What two ranks of `test_divided` run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opendit import nonfinite
from opendit.divided import Divided
from opendit.pieces import piece_of

SHAPES = ((3, 5), (1,), (4,), (2, 3, 2))  # odd; one that the second process has nothing of


def cases(world: int) -> dict[str, Any]:
    return {"norms": norms, "in place": in_place, "refused": refused, "whole": whole, "nan": not_a_number}


def both() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with divided gradients, and with the same ones whole."""
    gradients = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    divided = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    plain = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    family: list[Divided] = []
    for p, q, g in zip(divided, plain, gradients, strict=True):
        size = -(-g.numel() // dist.get_world_size())
        start = min(dist.get_rank() * size, g.numel())
        family.append(Divided(g.flatten()[start : start + size].clone(), start, p, family))
        p.grad, q.grad = family[-1], g
    return divided, plain


def _same(divided: list[nn.Parameter], plain: list[nn.Parameter]) -> bool:
    return all(torch.equal(p.grad.full_tensor(), q.grad) for p, q in zip(divided, plain, strict=True))


def norms() -> float:
    """Of every order, of each and of all, twice in a row, and after a change."""
    worst = 0.0
    for order in (1.0, 2.0, 3.0, math.inf):
        divided, plain = both()
        for change in (
            None,
            lambda g: g.mul_(0.5),
            lambda g: g.to_local().mul_(3) if hasattr(g, "to_local") else g.mul_(3),
        ):
            for p, q in zip(divided, plain, strict=True):
                if change is not None:
                    change(p.grad)
                    change(q.grad)
            for _ in range(2):
                pairs = [(p.grad.norm(order), q.grad.norm(order)) for p, q in zip(divided, plain, strict=True)]
                pairs.append(tuple(nn.utils.get_total_norm([p.grad for p in ps], order) for ps in (divided, plain)))
                each = torch._foreach_norm([p.grad for p in divided], order)
                pairs += [(a, q.grad.norm(order)) for a, q in zip(each, plain, strict=True)]
                worst = max(worst, *(abs(float(a / b) - 1) for a, b in pairs))
    return worst


def not_a_number() -> list[str]:
    """A NaN or inf in one process's range, each in turn: steps are skipped by all, norms show it."""
    wrong = []
    for bad, value in itertools.product(range(dist.get_world_size()), (math.nan, math.inf)):
        divided, _ = both()
        optimizer = torch.optim.SGD(divided, lr=1.0)
        if nonfinite.look(optimizer, {}, None)[0]:
            wrong.append("found what is not there")
        if dist.get_rank() == bad:
            divided[0].grad.to_local()[1] = value
        found, seen = nonfinite.look(optimizer, {}, None)
        here = any(not math.isfinite(norm) for norm in seen.norms.tolist())
        if not found or here != (dist.get_rank() == bad):
            wrong.append(f"{value} on {bad}: found {found}, here {here}")
        wrong += [
            f"{value} on {bad}: a norm of order {order} is {norm}"
            for order in (2.0, math.inf)
            for norm in (
                float(divided[0].grad.norm(order)),
                float(nn.utils.get_total_norm([p.grad for p in divided], order)),
            )
            if math.isfinite(norm) or math.isnan(value) != math.isnan(norm)
        ]
    return wrong


def in_place() -> list[str]:
    changes: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "clip": lambda ps: nn.utils.clip_grad_norm_(ps, 2.0**-20, norm_type=math.inf),
        "clip values": lambda ps: nn.utils.clip_grad_value_(ps, 0.1),
        "clip values, not foreach": lambda ps: nn.utils.clip_grad_value_(ps, 0.1, foreach=False),
        "scale": lambda ps: [p.grad.mul_(torch.tensor(0.25)) for p in ps],
        "divide": lambda ps: [p.grad.div_(4) for p in ps],
        "scale all": lambda ps: torch._foreach_mul_([p.grad for p in ps], 0.5),
        "nan": lambda ps: [torch.nan_to_num_(p.grad) for p in ps],
        "zero": lambda ps: nn.ParameterList(ps).zero_grad(set_to_none=False),
    }
    wrong = []
    for name, change in changes.items():
        divided, plain = both()
        change(divided)
        change(plain)
        if not _same(divided, plain):
            wrong.append(name)
    return wrong


def refused() -> list[str]:
    gradient = both()[0][0].grad
    calls = (lambda g: g + 1, lambda g: g.sum(), lambda g: g.norm(2, dim=0), lambda g: g.norm(0), lambda g: g.clone())
    return [_message(call, gradient) for call in calls]


def _message(call: Callable[[Any], Any], gradient: Any) -> str:
    try:
        call(gradient)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def whole() -> dict[str, Any]:
    gradient = both()[0][0].grad
    piece = piece_of(gradient)
    return {
        "range": (piece.start, piece.stop),
        "shape": piece.shape,
        "shares memory": piece.values.data_ptr() == gradient.to_local().data_ptr(),
        "repr": repr(gradient),
        "detached": type(gradient.detach()).__name__,
    }
