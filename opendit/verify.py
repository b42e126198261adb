"""`verify`: on the user's own model and batch, the accelerated model against the plain one, and a certificate.

    reference   the plain model, one device, the whole batch: each data-parallel share in turn, gradients averaged
    candidate   accelerate(copy of it, …, sp_size=…) on this process's share, gradients averaged over the world

Both run in fp64, where only mistakes are larger than rounding. With `autocast`, also as trained, by the error ratio
rule: the candidate may be at most twice as far from the plain model in fp32 as the plain model under that autocast is.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit import api, everyone, measuring, parallel
from opendit.config import BoosterConfig
from opendit.errors import relative_errors, where_it_moves
from opendit.measuring import Run, Task


@dataclass(frozen=True)
class Row:
    """One comparison: the worst error among `compared` tensors, what was allowed, and whose it was."""

    what: str
    error: float
    allowed: float
    worst: str
    compared: int

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Report:
    """What `verify` found. True where everything compared is right, and something was compared.

    Attributes:
        rows: the comparisons.
        problems: what was found wrong besides, in words.
        certificate: all of it with versions, plan and hashes, as written to the file.
    """

    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    certificate: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.problems and all(row.ok for row in self.rows) and any(row.compared for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'compared':<22}{'tensors':>8}{'worst error':>14}{'allowed':>10}   worst offender"]
        for row in self.rows:
            mark = "" if row.ok else "   WRONG"
            lines.append(f"{row.what:<22}{row.compared:>8}{row.error:>14.2e}{row.allowed:>10.0e}   {row.worst}{mark}")
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("certified" if self else "NOT certified")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    batch: Sequence[Any] | Mapping[str, Any],
    booster_cfg: BoosterConfig[Any] | Mapping[str, Any] | str | None = None,
    *,
    sp_size: int = 1,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ema: Callable[[nn.Module, nn.Module], object] | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    certificate: str | Path | None = None,
    quiet: bool = False,
) -> Report:
    """Compares `accelerate(model, booster_cfg, sp_size=sp_size)` with `model`: outputs, loss, every gradient, one step.

    `model` is not changed: copies are compared. With several processes every one makes this call, with the same model
    and the same (global) batch; a group's share is cut from it. Parameters that are all zero, as adaLN-Zero starts
    with, get small random values in the copies, for behind them everything is zero and a comparison says nothing.

    Args:
        model: a model of a known family, not accelerated.
        batch: the model's arguments, positional or by name. Tensors' first dimension is the batch's; it must be
            divisible by the number of data-parallel groups.
        loss: `loss(model, *batch)` (or `**batch`) gives a scalar; it may draw noise and timesteps. Without it, the
            mean of the output's square.
        optimizer: a factory, called on the parameters; without it SGD. One step is taken and compared.
        ema: `ema(ema_model, model)` updates an exponential moving average in place after the step.
        autocast: also compare under autocast to this dtype, by the error ratio rule.
        seed: of noise, timesteps, label drops, and of what zero parameters become.
        certificate: where rank 0 writes the certificate, as JSON.
        quiet: print nothing.

    Returns:
        the report, alike on every process; `bool(report)` is the verdict.

    Raises:
        ValueError, TypeError: arguments that can't be used, and all that `accelerate` raises.
    """
    cfg = BoosterConfig.of(booster_cfg)
    if cfg.optimizer is not None:
        raise ValueError("booster_cfg: it has an optimizer; allowed here: the argument `optimizer`, a factory")
    if cfg.plugin is not None:
        raise ValueError(
            f"booster_cfg: got plugin={cfg.plugin!r}; allowed here: None. verify averages gradients itself; leave "
            "plugin out"
        )
    if optimizer is not None and (isinstance(optimizer, Optimizer) or not callable(optimizer)):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}; allowed: a factory of the parameters, or None")
    if not isinstance(batch, (Sequence, Mapping)) or isinstance(batch, str) or not batch:
        raise TypeError(
            f"batch: got {type(batch).__name__}; allowed: a tuple, list or mapping of the model's arguments"
        )
    task = Task(batch, loss, optimizer, ema, seed)
    if sp_size > 1:
        from opendit.fastseq import mesh

        mesh.ensure_world(next(model.parameters()).device)  # before copies are made equal on all processes

    plain = measuring.reference_copy(model, seed)
    candidate = measuring.fresh_copy(plain, torch.float64)
    api.accelerate(candidate, cfg, sp_size=sp_size)
    share, shares = parallel.data_parallel_rank(candidate), parallel.data_parallel_size(candidate)
    task.check(shares)

    expected = measuring.alone(measuring.tolerant(plain), task, shares)
    found = measuring.together(candidate, task, share, shares)
    rows, problems = _compare(found, expected), [*expected.problems, *found.problems]
    if autocast is not None:
        low = measuring.fresh_copy(plain, torch.float32)
        api.accelerate(low, cfg, sp_size=sp_size)
        more, said = _by_ratio(plain, low, task, share, shares, autocast)
        rows, problems = rows + more, problems + said
    compared = sum(row.compared for row in rows if row.what == "gradients")
    if not compared:
        problems.append("no gradient was compared: nothing would be certified")
    problems = everyone.agreed(problems)
    worst = everyone.agreed_rows([(row.what, row.error, row.allowed, row.worst, row.compared) for row in rows])
    report = Report(tuple(Row(*row) for row in worst), tuple(problems))
    report.certificate.update(_certificate(report, model, candidate, cfg, sp_size, shares, task))
    if everyone.is_first():
        if certificate is not None:
            Path(certificate).write_text(json.dumps(report.certificate, indent=2) + "\n")
        if not quiet:
            print(report)
    return report


# fp64 on both sides, in another order of additions.
_EXACT = {"output": 1e-8, "loss": 1e-10, "gradients": 1e-8, "parameters": 1e-8, "ema": 1e-8}
_RATIO = 2.0
_SCATTERED = 0.3  # beyond this a relative error of low precision is no rounding


def _compare(found: Run, expected: Run) -> list[Row]:
    rows = []
    for what, allowed in _EXACT.items():
        theirs, ours = expected.tensors(what), found.tensors(what)
        if not theirs:
            continue
        if what in ("parameters", "ema"):
            ours, theirs = (where_it_moves(t, expected.gradients) for t in (ours, theirs))
        errors = relative_errors(ours, theirs)
        name = max(errors, key=errors.__getitem__) if errors else "-"
        rows.append(Row(what, errors.get(name, 0.0), allowed, name, len(errors)))
    return rows


def _by_ratio(
    plain: nn.Module, candidate: nn.Module, task: Task, share: int, shares: int, dtype: torch.dtype
) -> tuple[list[Row], list[str]]:
    """Error of the candidate over that of the plain model, both with fp32 weights under autocast; and problems.

    Both against the plain model in fp32: in fp64 the loss would draw other noise.
    """
    truth = measuring.alone(measuring.fresh_copy(plain, torch.float32), task, shares)
    theirs = measuring.alone(measuring.fresh_copy(plain, torch.float32), task, shares, dtype)
    ours = measuring.together(candidate, task, share, shares, dtype)
    rows, problems = [], list(ours.problems)
    for what in ("output", "gradients"):
        low = relative_errors(theirs.tensors(what), truth.tensors(what))
        high = relative_errors(ours.tensors(what), truth.tensors(what))
        # Single tensors scatter; a tensor is held against the plain model's own or its median, whichever is more.
        middle = sorted(low.values())[len(low) // 2] if low else 0.0
        if middle > _SCATTERED:
            problems.append(f"under autocast the plain model's own {what} is off by {middle:.0%}: it says nothing")
        ratios = {name: error / max(low.get(name, 0.0), middle, 1e-12) for name, error in high.items()}
        name = max(ratios, key=ratios.__getitem__) if ratios else "-"
        low_name = str(dtype).removeprefix("torch.")
        rows.append(Row(f"{what}, {low_name}", ratios.get(name, 0.0), _RATIO, name, len(ratios)))
    return rows, problems


def _certificate(
    report: Report, model: nn.Module, candidate: nn.Module, cfg: BoosterConfig[Any], sp: int, dp: int, task: Task
) -> dict[str, Any]:
    import opendit
    from opendit.patch.core import plan_of

    plan = plan_of(candidate)
    assert plan is not None
    sequence = plan.choices.sequence
    shapes = json.dumps([[name, list(p.shape)] for name, p in model.named_parameters()])
    return {
        "certified": bool(report),
        "rows": [{**vars(row), "ok": row.ok} for row in report.rows],
        "problems": list(report.problems),
        "versions": {"opendit": opendit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(next(model.parameters()).device),
        "plan": {
            "family": plan.family,
            "model": plan.model,
            "config": repr(cfg),
            "sp_size": sp,
            "dp_size": dp,
            "method": sequence.method if sequence is not None else None,
            "edits": [[edit.fqn, edit.mixin.__name__] for edit in plan.edits],
            "kept": [[kept.fqn, kept.why] for kept in plan.kept],
        },
        "hashes": {"parameter names and shapes": _hash(shapes), "batch": task.hash()},
        "seed": task.seed,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
