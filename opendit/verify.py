"""`verify`: on the user's own model and batch, the accelerated model against the plain one, and a certificate.

    reference   the plain model, one device, the whole batch: each data-parallel share in turn, gradients averaged
    candidate   accelerate(copy of it, …, sp_size=…) on this process's share, gradients averaged over the world

Both run in fp64, where only mistakes are larger than rounding; casts to fp32 in the models' own forwards do nothing
there, except with `compile`. With `autocast`, also as trained, by the error ratio
rule: over all gradients together, and over the output, the candidate may be at most 1.2 times as far from the plain
model in fp32 as the plain model under that autocast is.

    √(mean of e_i²) ≤ 1.2 · √(mean of a_i²)    e_i, a_i: relative error of gradient i, candidate's and plain model's

Two right computations of one batch in bf16 round differently: single gradients' ratios e_i/a_i of honest runs reach 1.3
(of 30 to 50), so that 1.2 would refuse them, while the ratio of the means stays between 0.8 and 1.1. A single gradient
may be off by twice the plain model's own, which still finds one that is wrong among many.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
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
            lines.append(f"{row.what:<22}{row.compared:>8}{row.error:>14.2e}{row.allowed:>10.2g}   {row.worst}{mark}")
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("certified" if self else "NOT certified")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    batch: Sequence[Any] | Mapping[str, Any],
    booster_cfg: BoosterConfig[Any] | Mapping[str, Any] | str | None = None,
    *,
    sp_size: int = 1,
    family: str | None = None,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ema: Callable[[nn.Module, nn.Module], object] | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    certificate: str | Path | None = None,
    quiet: bool = False,
) -> Report:
    """Compares `accelerate(model, booster_cfg, sp_size=sp_size, family=family)` with `model`: outputs, loss, every
    gradient, one step.

    `model` is not changed: copies are compared. With several processes every one makes this call, with the same model
    and the same (global) batch; a group's share is cut from it. Parameters that are all zero, as adaLN-Zero starts
    with, get small random values in the copies, for behind them everything is zero and a comparison says nothing.

    Args:
        model: a model of a known family (any, see `family`), not accelerated.
        batch: the model's arguments, positional or by name. Tensors' first dimension is the batch's; it must be
            divisible by the number of data-parallel groups.
        family: as `accelerate` takes it: None recognises the model, `"generic"` takes any.
        loss: `loss(model, *batch)` (or `**batch`) gives a scalar; it may draw noise and timesteps. Without it, the
            mean of the output's square.
        optimizer: a factory, called on the parameters; without it SGD. One step is taken and compared.
        ema: `ema(ema_model, model)` updates an exponential moving average in place after the step.
        autocast: also compare under autocast to this dtype, by the error ratio rule; by default the config's precision,
            where that is bf16 or fp16. What a config says of steps (`ema`, `skip_nonfinite`) is no part of this.
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
    if cfg.sampling:
        raise ValueError(
            "booster_cfg: got sampling=True (the recipe 'sample'); allowed here: what trains, for gradients and a step "
            "are compared. Leave booster_cfg out, which compares the same blocks"
        )
    if cfg.precision == "fp8":
        raise ValueError(
            "booster_cfg: got precision='fp8'; allowed here: the others. Products in 8 bits have nothing unaccelerated "
            "to be compared with; verify the model with precision='bf16', and compare losses of a run"
        )
    if optimizer is not None and (isinstance(optimizer, Optimizer) or not callable(optimizer)):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}; allowed: a factory of the parameters, or None")
    if not isinstance(batch, (Sequence, Mapping)) or isinstance(batch, str) or not batch:
        raise TypeError(
            f"batch: got {type(batch).__name__}; allowed: a tuple, list or mapping of the model's arguments"
        )
    if autocast is None:
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision)
    edits = dataclasses.replace(cfg, precision="inherit", ema=None, skip_nonfinite=None)
    task = Task(batch, loss, optimizer, ema, seed, keep_doubles=not cfg.compile)  # which can't be traced through
    if sp_size > 1:
        from opendit.fastseq import mesh

        mesh.ensure_world(next(model.parameters()).device)  # before copies are made equal on all processes

    plain = measuring.reference_copy(model, seed)
    candidate = measuring.fresh_copy(plain, torch.float64)
    api.accelerate(candidate, edits, sp_size=sp_size, family=family)
    share, shares = parallel.data_parallel_rank(candidate), parallel.data_parallel_size(candidate)
    task.check(shares)

    expected = measuring.alone(measuring.tolerant(plain), task, shares)
    found = measuring.together(candidate, task, share, shares)
    rows, problems = _compare(found, expected), [*expected.problems, *found.problems]
    if autocast is not None:
        low = measuring.fresh_copy(plain, torch.float32)
        api.accelerate(low, edits, sp_size=sp_size, family=family)
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
            Path(certificate).write_text(json.dumps(report.certificate, indent=2, allow_nan=False) + "\n")
        if not quiet:
            print(report)
    return report


# fp64 on both sides, in another order of additions.
_EXACT = {"output": 1e-8, "loss": 1e-10, "gradients": 1e-8, "parameters": 1e-8, "ema": 1e-8}
_RATIO = 1.2
_RATIO_OF_ONE = 2.0
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
    from opendit.patch.registry import families

    truth = measuring.alone(measuring.fresh_copy(plain, torch.float32), task, shares)
    as_trained = measuring.fresh_copy(plain, torch.float32)
    plan = _plan(candidate)
    if dtype == torch.bfloat16 and plan.choices.residual == "bf16":
        # An arithmetic of its own that the user chose: it is held against a plain model that has it too.
        measuring.lower_residual(families()[plan.family].blocks_of(as_trained)[0][1])
    theirs = measuring.alone(as_trained, task, shares, dtype)
    ours = measuring.together(candidate, task, share, shares, dtype)
    rows, problems = [], list(ours.problems)
    low_name = str(dtype).removeprefix("torch.")
    for what in ("output", "gradients"):
        low = relative_errors(theirs.tensors(what), truth.tensors(what))
        high = relative_errors(ours.tensors(what), truth.tensors(what))
        # Gradients that are zero but for rounding are all error: they would drown the others.
        telling = [name for name, error in low.items() if error <= _SCATTERED]
        if low and len(telling) <= len(low) / 2:
            problems.append(
                f"under autocast most of the plain model's own {what} is off by {_SCATTERED:.0%}: no measure"
            )
        middle = sorted(low.values())[len(low) // 2] if low else 0.0
        # A tensor is held against the plain model's own or its median, whichever is more.
        ratios = {name: error / max(low.get(name, 0.0), middle, 1e-12) for name, error in high.items()}
        name = max(ratios, key=ratios.__getitem__) if ratios else "-"
        pooled = _total(high, telling) / max(_total(low, telling), 1e-12)
        rows.append(Row(f"{what}, {low_name}", pooled, _RATIO, name, len(telling)))
        if what == "gradients":
            rows.append(Row(f"any of them, {low_name}", ratios.get(name, 0.0), _RATIO_OF_ONE, name, len(ratios)))
    return rows, problems


def _total(errors: dict[str, float], names: list[str]) -> float:
    """Root mean square; infinite where one of the names is missing."""
    return float(sum(errors.get(name, float("inf")) ** 2 for name in names) / max(len(names), 1)) ** 0.5


def _plan(model: nn.Module) -> Any:
    from opendit.patch.core import plan_of

    plan = plan_of(model)
    assert plan is not None
    return plan


def _certificate(
    report: Report, model: nn.Module, candidate: nn.Module, cfg: BoosterConfig[Any], sp: int, dp: int, task: Task
) -> dict[str, Any]:
    import opendit

    plan = _plan(candidate)
    sequence = plan.choices.sequence
    shapes = json.dumps([[name, list(p.shape)] for name, p in model.named_parameters()])
    return {
        "certified": bool(report),
        "rows": [{**vars(row), "error": _in_json(row.error), "ok": row.ok} for row in report.rows],
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


def _in_json(error: float) -> float | str:
    return error if math.isfinite(error) else str(error)  # JSON has no infinity


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
