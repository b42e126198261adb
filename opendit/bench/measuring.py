"""Builds each variant of a job, checks it against the plain model in a higher precision, and times what is right."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import opendit
from opendit.bench.jobs import Job, evaluate
from opendit.errors import relative_errors
from opendit.measuring import tolerant

# As the benchmarks and `verify` judge: docs/performance.md.
SLACK, LOSS_FLOOR = 1.2, 5e-4
# Two right computations in fp32 part by less than this.
FP32_FLOOR = 1e-5
LOSSES = 3
# CUDA graphs replay from the fourth call on, and it is the replayed gradients that must be right.
BACKWARDS = 5

STEPS = {"train": "training step", "sample": "sampling step"}
VARIANTS = ("plain", "torch.compile", "opendit")


@dataclass
class Row:
    """A variant of a step. refused: why it has no speed. errors: relative, of "gradients" and "losses", or "output"."""

    step: str
    variant: str
    ms: float | None = None
    per_s: float | None = None
    first_s: float | None = None
    memory_gib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    refused: str | None = None


def measure(
    job: Job,
    steps: tuple[str, ...] = ("train", "sample"),
    variants: tuple[str, ...] = VARIANTS,
    *,
    precision: str,
    train_config: Any = "train",
    sample_config: Any = "sample",
    repeats: int = 20,
) -> Iterator[Row]:
    """The rows, as they are measured. `precision`: "bf16" or "fp32". Ones that can't run or are wrong say why."""
    configs = {"train": train_config, "sample": sample_config}
    for step in steps if "opendit" in variants else ():
        _check(job, configs[step])
    for step in steps:
        with _fp32_products():
            kind, config = _Training if step == "train" else _Sampling, configs[step]
            wanted = kind(job, "plain", "reference", config).found()
            _clean_up(job.device)
            yardstick: dict[str, float] = {}
            for variant in dict.fromkeys(("plain", *variants)):
                row = _row(kind, job, step, variant, precision, config, wanted, yardstick, repeats)
                _clean_up(job.device)
                if variant in variants:
                    yield row


def _row(
    kind: type[_Training] | type[_Sampling],
    job: Job,
    step: str,
    variant: str,
    precision: str,
    config: Any,
    wanted: dict[str, Any],
    yardstick: dict[str, float],
    repeats: int,
) -> Row:
    row = Row(step, variant)
    on_gpu = job.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(job.device)
        before = torch.cuda.memory_allocated(job.device)  # the template's and the batch's
    try:
        start = time.perf_counter()
        run = kind(job, variant, precision, config)
        run.step()
        _synchronize(job.device)
        row.first_s = time.perf_counter() - start
        row.errors = errors_of(run.found(), wanted)
        if variant == "plain":
            yardstick.update(row.errors)
        row.refused = too_far(row.errors, yardstick, precision)
        if row.refused is None:
            row.ms = timed(run.step, job.device, repeats)
            row.per_s = (job.samples if step == "train" else job.drawn) / row.ms * 1e3
            row.memory_gib = (torch.cuda.max_memory_allocated(job.device) - before) / 2**30 if on_gpu else None
    except torch.OutOfMemoryError:
        row.refused = "out of memory; take a smaller batch, image or model"
    except Exception as error:
        # A compiler that is missing, say, is this variant's trouble and not the others'.
        row.refused = f"did not run: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return row


class _Training:
    """A copy of the model with an optimizer. `step` trains once."""

    def __init__(self, job: Job, variant: str, precision: str, config: Any) -> None:
        self.job, self.precision = job, precision
        self.model = _copy(job.model, precision).train()
        self.optimizer = job.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.net: Any = self.model
        if variant == "opendit":
            self.net, self.optimizer = opendit.accelerate(
                self.model, config, optimizer=self.optimizer, family=job.family
            )
        elif variant == "torch.compile":
            self.net = _compiled(self.model)

    def backward(self) -> Tensor:
        torch.manual_seed(0)  # label drops
        with _autocast(self.job.device, self.precision):
            loss = self.job.loss(self.net)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        return loss

    def found(self) -> dict[str, Any]:
        """Gradients at the template's weights, and the losses of the first steps from there."""
        _set(self.model, self.job.model)
        for _ in range(BACKWARDS):
            self.backward()
        gradients = {n: p.grad.detach().cpu() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.state.clear()
        return {"gradients": gradients, "losses": torch.stack([self.step() for _ in range(LOSSES)]).tolist()}


class _Sampling:
    """A copy of the model in evaluation mode. `step` evaluates once."""

    def __init__(self, job: Job, variant: str, precision: str, config: Any) -> None:
        self.job, self.precision = job, precision
        self.model = _copy(job.model, precision).eval()
        if precision == "bf16" and job.low_weights:
            self.model, self.precision = self.model.bfloat16(), "fp32"  # no autocast, which would cast at every step
        self.net: Any = self.model
        if variant == "opendit":
            asked = opendit.BoosterConfig.of(config)
            # Own models run under autocast, whose fp32 stream is no measure for a model that is rounded throughout.
            if precision == "fp32" or not job.low_weights:
                asked = dataclasses.replace(asked, weights="inherit")
            self.net = opendit.accelerate(self.model, asked, family=job.family)
            if asked.weights != "inherit":
                self.precision = "fp32"  # what is rounded needs no autocast
        elif variant == "torch.compile":
            # With CUDA graphs, which is the fastest that it gives.
            self.net = _compiled(self.model, mode="reduce-overhead" if job.device.type == "cuda" else None)

    @torch.no_grad()
    def step(self) -> Tensor:
        if "torch._dynamo" in sys.modules:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with _autocast(self.job.device, self.precision):
            return evaluate(self.net, self.job.evaluated)

    def found(self) -> dict[str, Any]:
        for _ in range(BACKWARDS):
            output = self.step()
        return {"output": output.double().cpu()}


def errors_of(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Relative errors: of gradients the root mean square over parameters, of losses the mean over steps."""
    if "output" in wanted:
        return {"output": next(iter(relative_errors(found, wanted).values()), 0.0)}
    each = relative_errors(found["gradients"], wanted["gradients"]).values()
    losses = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(found["losses"], wanted["losses"], strict=True)]
    return {
        "gradients": (sum(e * e for e in each) / max(1, len(each))) ** 0.5,
        "losses": sum(losses) / len(losses),
    }


def too_far(errors: dict[str, float], yardstick: dict[str, float], precision: str) -> str | None:
    """Why a variant may not be timed, or None. Not a number never passes."""
    if not yardstick:
        return "nothing to hold it against: the plain model did not run"
    for what, error in errors.items():
        floor = LOSS_FLOOR if what == "losses" else FP32_FLOOR if precision == "fp32" else 0.0
        if not error <= SLACK * yardstick[what] + floor:
            return f"{what} off by {error:.2e}, the plain model's by {yardstick[what]:.2e}: no speed is reported"
    return None


def timed(step: Callable[[], Any], device: torch.device, repeats: int, together: int = 3) -> float:
    """Milliseconds of a step: the median over samples of a few steps that follow one another without a wait."""
    for _ in range(2):
        step()
    samples = []
    for _ in range(max(1, repeats // together)):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            step()
        _synchronize(device)
        samples.append((time.perf_counter() - start) / together * 1e3)
    return statistics.median(samples)


def _copy(model: nn.Module, precision: str) -> nn.Module:
    """In fp64 for the reference on a CPU, else in fp32."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return tolerant(model).double() if precision == "reference" and not on_gpu else copy.deepcopy(model)


def _set(model: nn.Module, template: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(model.state_dict().values(), template.state_dict().values(), strict=True):
            mine.copy_(theirs)


def _check(job: Job, config: Any) -> None:
    """Raises what `accelerate` would, before minutes are spent, and where it would change nothing."""
    if not opendit.explain(job.model, config, family=job.family, file=io.StringIO()).edits:
        raise ValueError("model: opendit changes nothing in it; opendit.explain(model) says why")


def _compiled(model: nn.Module, mode: str | None = None) -> Any:
    from torch._inductor import config

    config.fallback_random = True  # the same label drops as in eager code
    return torch.compile(model, mode=mode)


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@contextlib.contextmanager
def _fp32_products() -> Iterator[None]:
    """fp32 means fp32, not TF32, meanwhile; random states stay."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _clean_up(device: torch.device) -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
