"""Whole models over several processes, for benchmarks/sequence_parallel.py: training steps, sampling forwards, a curve.

    one     one GPU, one sample                              both GPUs do the same then
    sp=s    one sample over s processes
    dp=s    a sample each

    train   forward, loss, backward, DDP, fused AdamW under bf16 autocast: the recipe "train", with graphs that hold
            collectives too, up to LONG tokens; beyond, a step is seconds, and launches do not bound it
    sample  one forward of the recipe "sample": bf16 weights

A model that has no room on one GPU is trained once more with activation_checkpointing="full", on one and on all. What
of the peak is activations is the peak less parameters, gradients and moments: work space and weights that were cast are
in it.
"""

from __future__ import annotations

import copy
import gc
import io
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import opendit
from benchmarks.common import agreed, summary, synchronize, time_events
from examples.diffusion.gaussian import GaussianDiffusion
from examples.models.dit import DiT
from opendit.errors import relative_errors
from tests.tiny_models import UserLatte

Row = dict[str, Any]

HEADS, HEAD_DIM = 16, 72
LONG = 16384  # tokens
SLACK = 1.2  # the error ratio rule
WHAT = ("train", "sample")


@dataclass(frozen=True)
class Job:
    """A model at one size: DiT-XL/2 of L tokens, or Latte-XL/2 of F frames of L tokens."""

    name: str
    tokens: int
    frames: int = 0
    width: int = HEADS * HEAD_DIM
    heads: int = HEADS
    depth: int = 28
    regather: bool = False  # whether it is trained with regather_input=True as well

    def build(self, device: torch.device, depth: int | None = None) -> nn.Module:
        """On the device, whose processes draw the same weights."""
        side, depth = 2 * round(self.tokens**0.5), depth or self.depth
        torch.manual_seed(0)
        with device:
            if self.frames:
                sizes = {"dim": self.width, "heads": self.heads, "frames": self.frames, "frequencies": 256}
                model: nn.Module = UserLatte(size=side, depth=depth, classes=1000, **sizes)
            else:
                model = DiT(input_size=side, hidden_size=self.width, depth=depth, num_heads=self.heads)
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():  # behind zero gates every gradient is zero
                    p.normal_(0, 0.02)
        return model

    def batch(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator, side = torch.Generator().manual_seed(seed), 2 * round(self.tokens**0.5)
        shape = (1, *([self.frames] if self.frames else []), 4, side, side)
        x = torch.randn(shape, generator=generator)
        return x.to(device), torch.tensor([500], device=device), torch.tensor([1], device=device)

    def training(self, **more: Any) -> dict[str, Any]:
        """What `accelerate` is given. Models are gone before the group is, so graphs may hold collectives."""
        graphs = False if self.long else "collectives"
        return {"activation_checkpointing": "selective", "cuda_graphs": graphs} | more

    @property
    def long(self) -> bool:
        return self.tokens * max(self.frames, 1) > LONG


# What is wanted most comes first.
JOBS = (
    Job("DiT-XL/2", 16384, regather=True),
    *(Job("DiT-XL/2", n) for n in (65536, 4096)),
    *(Job("Latte-XL/2", n, frames=16) for n in (256, 1024)),
)
CURVE = Job("DiT-S/2", 1024, width=384, heads=6, depth=12)
SMOKE = (
    Job("DiT", 16, width=32, heads=4, depth=2, regather=True),
    Job("Latte", 4, frames=3, width=32, heads=4, depth=2),
)


@dataclass(frozen=True)
class Variant:
    """sp processes share a sample; `samples` are those of all processes; like: the variant that it is a multiple of."""

    name: str
    sp: int = 1
    samples: int = 1
    config: Any = field(default_factory=dict)
    like: str = "one"

    @property
    def together(self) -> bool:
        return self.sp > 1 or self.samples > 1


def variants(job: Job, what: str, size: int) -> list[Variant]:
    config = job.training() if what == "train" else "sample"
    spread = [Variant(f"sp={size}", size, 1, config)]
    if what == "train" and job.regather:
        again = job.training(regather_input=True, sequence_parallel="fastseq")
        spread.append(Variant(f"sp={size}, input gathered again", size, 1, again))
    return [Variant("one", config=config), *spread, Variant(f"dp={size}", 1, size, config)]


def where_one_has_no_room(job: Job, size: int) -> list[Variant]:
    config = job.training(activation_checkpointing="full", cuda_graphs=False)
    one = "one, checkpointed in full"
    return [Variant(one, config=config, like=one), Variant(f"sp={size}, checkpointed in full", size, 1, config, one)]


def model_rows(jobs: Iterable[Job], whats: Iterable[str], device: torch.device) -> Iterator[Row]:
    """Training of all jobs, then sampling of all."""
    jobs = list(jobs)
    for what in whats:
        for job in jobs:
            yield from job_rows(job, what, device)


def job_rows(job: Job, what: str, device: torch.device) -> Iterator[Row]:
    facts = {"part": "model", "model": job.name, "tokens": job.tokens, "frames": job.frames, "depth": job.depth}
    size = dist.get_world_size()
    wanted = variants(job, what, size)
    has_room = True
    rates: dict[str, float] = {}
    ratios: dict[str, float] = {}
    while wanted:
        variant = wanted.pop(0)
        row: Row = {**facts, "variant": variant.name}
        if variant.samples > 1 and not has_room:
            yield row | {what: {"failed": "not tried: one has no room"}}
            continue
        try:
            if variant.sp > 1 and variant.name not in ratios:
                ratios |= error_ratios(job, what, [variant, *(v for v in wanted if v.sp > 1)], device)
            if variant.sp > 1:
                row["error_ratio"] = ratio = ratios[variant.name]
                if not ratio <= SLACK:
                    yield row | {"refused": f"{ratio:.2f} times as far from fp32's as one device's in bf16"}
                    continue
            found = run(job, what, variant, device)
        except torch.OutOfMemoryError:
            # Shapes are the same on all, and so is what they run out of.
            row[what] = {"failed": "out of memory"}
            if variant.name == "one" and what == "train":
                has_room = False
                wanted += where_one_has_no_room(job, size)
        except Exception as error:  # where only some processes fail, the collectives' time-out ends the run
            row[what] = {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
        else:
            rates[variant.name] = found["samples_per_s"]
            alone = rates.get(variant.like)
            row[what] = found | {"times_one": found["samples_per_s"] / alone if alone else None}
        clean_up()
        yield row


def clean_up() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(job: Job, what: str, variant: Variant, device: torch.device) -> Row:
    """Milliseconds of a step, samples per second, GiB at the peak: of the slowest, the fullest process."""
    model = job.build(device)
    model.train(what == "train")
    opendit.accelerate(model, variant.config, sp_size=variant.sp)
    batch = job.batch(opendit.data_parallel_rank(model) if variant.together else 0, device)
    cuda = device.type == "cuda"
    optimizer = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if what == "sample":

        def step() -> None:
            with torch.inference_mode():
                model(*batch)

    else:
        opendit.seed(0, model)
        # Without the view, gradients would be there twice.
        buckets = {"gradient_as_bucket_view": True}
        trained = nn.parallel.DistributedDataParallel(model, **buckets) if variant.together else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=cuda)

        def step() -> None:
            loss_of(trained, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    synchronize()
    dist.barrier()
    # Graphs are captured in the third step; a step that has none is seconds.
    warmup, repeats = (1, 2) if job.long else (4, 6)
    samples = time_events(step, repeats, warmup) if cuda else time_events(step, 1, 0)
    ms = {key: agreed(value) for key, value in summary(samples).items()}
    row: Row = {"ms": ms, "samples_per_s": variant.samples / ms["median"] * 1e3, "method": method_of(model)}
    states = states_gib(model, optimizer)
    peak = agreed(torch.cuda.max_memory_allocated() / 2**30) if cuda else 0.0
    return row | {"gib": peak, "states_gib": states, "activations_gib": max(peak - states, 0.0)}


def method_of(model: nn.Module) -> str | None:
    sequence = opendit.explain(model, file=io.StringIO()).choices.sequence
    return sequence.method if sequence else None


def states_gib(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> float:
    """Of parameters and buffers, and in training of gradients and the optimizer's states."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [p for p in model.parameters() if p.requires_grad]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**30


def loss_of(model: nn.Module, batch: tuple[Tensor, ...], autocast: bool = True) -> Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=autocast):
        return (model(*batch).float() ** 2).mean()


def error_ratios(job: Job, what: str, spread: list[Variant], device: torch.device) -> dict[str, float]:
    """Of two blocks at this size: distance from fp32's, of each spread variant over one device's in bf16."""
    plain = job.build(device, depth=2).eval()  # no label drops
    compute = gradients if what == "train" else output
    batch, size = job.batch(0, device), dist.get_world_size()
    truth = compute(copy.deepcopy(plain), batch, lower=False)
    alone = copy.deepcopy(plain) if what == "train" else opendit.accelerate(copy.deepcopy(plain), "sample")
    theirs = _distance(compute(alone, batch), truth)
    found = {}
    for variant in spread:
        model = opendit.accelerate(copy.deepcopy(plain), variant.config, sp_size=size)
        found[variant.name] = agreed(_distance(compute(model, batch, sp=size), truth) / theirs)
    return found


def gradients(model: nn.Module, batch: tuple[Tensor, ...], lower: bool = True, sp: int = 1) -> dict[str, Tensor]:
    loss_of(model, batch, autocast=lower).backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    for gradient in found.values() if sp > 1 else ():
        dist.all_reduce(gradient)
        gradient /= sp
    return found


def output(model: nn.Module, batch: tuple[Tensor, ...], lower: bool = True, sp: int = 1) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {"output": model(*batch).double()}


def _distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return statistics.fmean(e * e for e in relative_errors(found, truth).values()) ** 0.5


def curve_rows(job: Job, steps: int, device: torch.device) -> Iterator[Row]:
    """Losses of one device and of all together, step by step; and twice on one device, for attention's own scatter."""
    size, curves = dist.get_world_size(), []
    for variant, sp in (("one", 1), ("one again", 1), (f"sp={size}", size)):
        model = job.build(device).train()
        opendit.accelerate(model, job.training(), sp_size=sp)
        trained = nn.parallel.DistributedDataParallel(model) if sp > 1 else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        diffusion = GaussianDiffusion().to(device)
        x, _, _ = job.batch(0, device)
        losses = torch.zeros(steps, device=device)
        for i in range(steps):
            torch.manual_seed(i)  # equal everywhere: all hold the same sample
            t, y = (torch.randint(n, (1,), device=device) for n in (diffusion.steps, 1000))
            with torch.autocast(device.type, torch.bfloat16):
                loss = diffusion.loss(trained, x, y, t=t, noise=torch.randn_like(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[i] = loss.detach()
        curves.append(losses.double().cpu())
        window = max(steps // 10, 1)
        smooth = [c.unfold(0, window, 1).mean(1) for c in (curves[0], curves[-1])]
        apart = agreed(((smooth[1] - smooth[0]).abs() / smooth[0]).max().item())
        row = {"part": "curve", "model": job.name, "tokens": job.tokens, "variant": variant, "losses": losses.tolist()}
        yield row | {"smoothed_over": window, "apart": apart}
