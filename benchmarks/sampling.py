"""A denoising step of DiT with classifier-free guidance: eager, `torch.compile`, with CUDA graphs, opendit.

    python benchmarks/sampling.py                                 # DiT-XL/2: 256 px × 8, 256 px × 64, 512 px × 1
    python benchmarks/sampling.py --jobs 512x1 --variants opendit "torch.compile CUDA graphs"
    python benchmarks/sampling.py --checkpoint FOLDER --psnr 30   # the step cache, on a trained model
    python benchmarks/sampling.py --smoke                         # a tiny model on the CPU: does the script work

    eager                      a bf16 model, no autocast
    torch.compile              of that model, whole
    torch.compile CUDA graphs  the same with mode="reduce-overhead"
    opendit step by step       opendit.accelerate(model, "sample"), modulations computed in every step
    opendit                    inside opendit.sampling: modulations of all steps computed before the first
    opendit half the steps     the same with a step cache that leaves the middle blocks out in every second step: its
                               speed; what that costs in quality depends on the model, and these weights are random

A step: the batch twice, with labels and with the null label, through the model, and the mixture of the two. Its time is
that of a whole run of the sampler's steps, what is done once per run included, over their number. Before a speed is
printed, the output must be as near to the fp32 model's as that of a plain bf16 model is (with a cache: in the steps
that it computes). Rows are written one by one.

With --checkpoint (a folder of examples/image/train.py) the cheapest step cache for a PSNR is calibrated on 8 samples,
and then judged on 64 others: their PSNR to uncached ones, and the time of both.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import opendit
from benchmarks.common import RESULTS, host_ms, synchronize, time_steps, write_results
from benchmarks.training import check_accelerated, clean_up, make_model
from examples.models.dit import DIT_MODELS
from opendit.patch import core

CFG_SCALE = 4.0
# An accelerated output may be so many times as far from fp32's as plain bf16's.
SLACK = 1.2
PARITY_STEPS = 4  # of a run, the second time it is run: by then graphs replay


@dataclass(frozen=True)
class Variant:
    """How the model is run. booster: what `opendit.accelerate` is given."""

    booster: Any = None
    mode: str | None = None  # of torch.compile
    table: bool = False
    every: int = 1  # how often the middle blocks are computed

    @property
    def is_baseline(self) -> bool:
        return self.mode is not None


VARIANTS = {
    "eager": Variant(),
    "torch.compile": Variant(mode="default"),
    "torch.compile CUDA graphs": Variant(mode="reduce-overhead"),
    "opendit step by step": Variant(booster="sample"),
    "opendit": Variant(booster="sample", table=True),
    "opendit half the steps": Variant(booster="sample", table=True, every=2),
}
CACHED = "opendit half the steps"
# Compiling takes a minute each, so each job has those that can be the fastest for it.
JOBS = {
    "256x8": ("eager", "torch.compile", "torch.compile CUDA graphs", "opendit step by step", "opendit", CACHED),
    "512x1": ("eager", "torch.compile CUDA graphs", "opendit step by step", "opendit", CACHED),
    "256x64": ("torch.compile", "opendit step by step", "opendit", CACHED),
}


class Sampler:
    """A model with the inputs of its steps. `step()` is the next one."""

    def __init__(self, args: argparse.Namespace, variant: Variant, size: int, images: int, device: torch.device):
        self.variant = variant
        model = make_model(args.model, size, device).eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn((images, *model.sample_shape), device=device, generator=generator)
        labels = torch.randint(model.num_classes, (images,), device=device, generator=generator)
        self.y = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        self.times = torch.linspace(999, 0, args.steps).round().tolist()
        self.t = [torch.full((2 * images,), t, device=device) for t in self.times]
        self.next, self.model, self.channels = 0, model, model.in_channels
        self.dtype = torch.float32

    def prepare(self) -> Sampler:
        """The model as the variant has it."""
        if self.variant.booster is not None:
            opendit.accelerate(self.model, self.variant.booster)
            check_accelerated(self.model)
        else:
            self.model.bfloat16()
            self.dtype = torch.bfloat16
        self.forward: Callable[..., Tensor] = self.model
        if self.variant.mode is not None:
            self.forward = torch.compile(self.model, mode=self.variant.mode, dynamic=False)
        return self

    def running(self) -> contextlib.AbstractContextManager[Any]:
        if not self.variant.table:
            return contextlib.nullcontext()
        computed = [s % self.variant.every == 0 for s in range(len(self.times))]
        count = len(self.model.blocks)
        cache = opendit.StepCache(tuple(self.times), tuple(computed), 1, max(1, count - 2), count)
        return opendit.sampling(self.model, self.times, None if all(computed) else cache)

    def output(self, forward: Callable[..., Tensor]) -> Tensor:
        """The model's output for the next step, both branches."""
        t = self.t[self.next % len(self.t)]
        self.next += 1
        return forward(torch.cat([self.x, self.x]).to(self.dtype), t, self.y)

    def step(self) -> Tensor:
        prediction = self.output(self.forward).float()[:, : self.channels]
        cond, null = prediction.chunk(2)
        return null + CFG_SCALE * (cond - null)


def main() -> int:
    args = parse()
    device = torch.device("cpu" if args.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke runs a tiny model on the CPU")
    if args.checkpoint is not None:
        return cached(args, device)
    failed = False
    for job in args.jobs:
        size, images = map(int, job.split("x"))
        rows: list[dict[str, Any]] = []
        path = None
        reference, yardstick = references(args, size, images, device)
        for name in args.variants or JOBS.get(job, tuple(VARIANTS)):
            row: dict[str, Any] = {"variant": name, "model": args.model, "image_size": size, "batch": images}
            rows.append(row | measure(name, args, size, images, device, reference, yardstick))
            failed |= "error" in rows[-1]
            compare(rows)
            print(line(rows[-1]), flush=True)
            if not args.smoke:
                theme = f"sampling_{args.model.lower().replace('/', '-')}_{size}px_b{images}"
                facts = {"steps": args.steps, "cfg_scale": CFG_SCALE, "bf16_error": yardstick}
                path = write_results(theme, rows, args.out, path, **facts)
        print_table(rows)
        if path is not None:
            print(f"written to {path}")
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=list(DIT_MODELS))
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), metavar="SIZExIMAGES")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=50, help="of a run of the sampler")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a variant is timed, and one run at least")
    parser.add_argument("--checkpoint", type=Path, help="a trained model, to measure the step cache on")
    parser.add_argument("--psnr", type=float, default=30.0, help="the cache's budget, in dB")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="with --checkpoint")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, nothing written")
    args = parser.parse_args()
    if args.smoke:
        torch.set_num_threads(1)
        args.model, args.jobs, args.steps, args.seconds = "smoke", ["32x2"], 6, 0.0
        args.variants = args.variants or [v for v in VARIANTS if VARIANTS[v].mode is None]
    return args


def references(args: argparse.Namespace, size: int, images: int, device: torch.device) -> tuple[list[Tensor], float]:
    """(outputs of the fp32 model without TF32 in the first steps, how far a plain bf16 model's are)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sampler = Sampler(args, Variant(), size, images, device)
    with torch.inference_mode():
        exact = [sampler.output(sampler.model) for _ in range(PARITY_STEPS)]
    sampler.prepare().next = 0
    with torch.inference_mode():
        error = distance([sampler.output(sampler.model) for _ in range(PARITY_STEPS)], exact)
    del sampler
    clean_up()
    return exact, error


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """‖found − wanted‖/‖wanted‖, the worst of the steps; not a number is infinitely far."""
    errors = [((f.float() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]
    return max(e if e == e else float("inf") for e in errors)


def measure(
    name: str,
    args: argparse.Namespace,
    size: int,
    images: int,
    device: torch.device,
    reference: list[Tensor],
    yardstick: float,
) -> dict[str, Any]:
    try:
        return run(Sampler(args, VARIANTS[name], size, images, device).prepare(), args, reference, yardstick)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
    finally:
        clean_up()


@torch.inference_mode()
def run(sampler: Sampler, args: argparse.Namespace, reference: list[Tensor], yardstick: float) -> dict[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with sampler.running():
        for _ in range(args.steps):
            sampler.step()
        found = [sampler.output(sampler.forward).clone() for _ in range(PARITY_STEPS)]
        every = sampler.variant.every
        error = distance(found[::every], reference[::every])
        if not error <= SLACK * yardstick:
            return {
                "output_error": error,
                "error": f"its output is {error:.2e} off, plain bf16's {yardstick:.2e}: no speed is reported",
            }
        for _ in range(args.steps - PARITY_STEPS):  # to the end of the run
            sampler.step()
        synchronize()
        one = time_steps(sampler.step, 1, args.steps - 1)[0]
        runs = max(1, round(args.seconds * 1e3 / (one * args.steps)))
        samples = [whole_run(sampler, args.steps) for _ in range(runs)]
        sampler.step()  # the first of a run does what is done once
        host = host_ms(sampler.step, 1)
    ms = statistics.median(samples)
    notes = sorted({what for _, what in core.notes(sampler.model)})
    row = {"ms": ms, "samples_ms": samples, "images_per_s_step": 1e3 * len(sampler.x) / ms, "output_error": error}
    row |= {"host_ms": host[0], "notes": notes}
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def whole_run(sampler: Sampler, steps: int) -> float:
    """Milliseconds of a step, over a run's steps one after the other."""
    samples = itertools.repeat(sampler.step, steps)
    if not torch.cuda.is_available():
        return statistics.mean(time_steps(lambda: next(samples, sampler.step)(), 1, steps - 1))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for step in samples:
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


@torch.inference_mode()
def cached(args: argparse.Namespace, device: torch.device) -> int:
    """The step cache on a trained model: speed and PSNR of samples that it was not calibrated on."""
    from examples.diffusion import SAMPLERS, sample, timesteps_of
    from examples.models.checkpoint import load_checkpoint

    model, config = load_checkpoint(args.checkpoint)
    model = opendit.accelerate(model.to(device), "sample")
    objective = config["objective"]
    sampler = SAMPLERS[objective][0] if objective != "flow" else "euler"
    times, pixels = timesteps_of(sampler, args.steps), bool(config["pixels"])
    counted, first, judged = (2, 4, 4) if args.smoke else (8, 1000, 64)

    def drawn(count: int, first: int) -> Tensor:
        y = torch.arange(first, first + count, device=device) % model.num_classes
        options: dict[str, Any] = {"sampler": sampler, "objective": objective, "steps": args.steps, "first": first}
        return sample(model, {"y": y}, cfg_scale=args.cfg_scale, clip=pixels, **options)

    with opendit.sampling(model, times):
        data_range = 2.0 if pixels else float((x := drawn(counted, 0)).max() - x.min())
    cache = opendit.calibrate(model, lambda: drawn(counted, 0), times, psnr=args.psnr, data_range=data_range)
    print(cache.report(), flush=True)
    rows: list[dict[str, Any]] = []
    samples: list[Tensor] = []
    for name, schedule in (("uncached", None), ("cached", cache)):
        with opendit.sampling(model, times, schedule):
            samples.append(drawn(judged, first))  # graphs are captured
            runs = [time_steps(lambda: drawn(judged, first), 1, 1)[0] for _ in range(1 if args.smoke else 3)]
        rows.append({"variant": name, "ms": statistics.median(runs) / args.steps, "runs_ms": runs})
    errors = (samples[1] - samples[0]).double().square().flatten(1).mean(1)
    psnrs = [float(10 * torch.log10(data_range**2 / e)) for e in (errors.mean(), errors.max())]
    rows[1] |= {"psnr": psnrs[0], "worst_psnr": psnrs[1], "times_uncached": rows[0]["ms"] / rows[1]["ms"]}
    rows[1] |= {"blocks_computed": cache.blocks_computed, "blocks_reused": cache.blocks_reused}
    print(
        f"{judged} other samples: {rows[1]['times_uncached']:.2f} times as fast ({rows[0]['ms']:.2f} and "
        f"{rows[1]['ms']:.2f} ms/step), PSNR {psnrs[0]:.1f} dB, of the worst one {psnrs[1]:.1f}"
    )
    if not args.smoke:
        facts = {"checkpoint": args.checkpoint.name, "model_config": config["model"], "sampler": sampler}
        facts |= {"steps": args.steps, "cfg_scale": args.cfg_scale, "of": "pixels" if pixels else "latents"}
        facts |= {"cache": json.loads(cache.to_json()), "data_range": data_range, "batch": judged}
        print(f"written to {write_results(f'step_cache_{args.checkpoint.name}', rows, args.out, **facts)}")
    return 0


def compare(rows: list[dict[str, Any]]) -> None:
    """Every row's speed relative to the best that torch.compile gives."""
    best = min((r["ms"] for r in rows if "ms" in r and VARIANTS[r["variant"]].is_baseline), default=None)
    for row in rows:
        if best and "ms" in row:
            row["ratio_to_compile"] = best / row["ms"]


def line(row: dict[str, Any]) -> str:
    head = f"{row['variant']:26s} {row['image_size']} px × {row['batch']:<3d}"
    if "error" in row:
        return f"{head} {row['error']}"
    memory = f" {row['peak_gib']:5.1f} GiB" if "peak_gib" in row else ""
    ratio = f"  {row['ratio_to_compile']:.2f}x" if "ratio_to_compile" in row else ""
    notes = f"  NOTE {row['notes'][0]}" if row["notes"] else ""
    return (
        f"{head} {row['ms']:8.2f} ms/step{memory}  host {row['host_ms']:6.2f} ms  off {row['output_error']:.1e}{ratio}"
        f"{notes}"
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\n{first['model']}, {first['image_size']} px × {first['batch']}; ratios to the best torch.compile")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    sys.exit(main())
