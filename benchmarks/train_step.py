"""A whole training step of DiT: as published, eager, `torch.compile`, opendit, opendit with compiled blocks.

    python benchmarks/train_step.py                               # DiT-XL/2, 256 px, batch 256 and 64
    python benchmarks/train_step.py --model DiT-B/2 --batch 256
    python benchmarks/train_step.py --smoke                       # a tiny model on the CPU: does the script work

One step is: noise the latents, forward, the learned-sigma hybrid loss, backward, AdamW, EMA of every parameter.
Every variant starts from the same weights (gates moved off zero) and sees the same latents, noise, timesteps
and labels, so its losses are compared step by step. Variants run one after another in one process, and a
variant whose first losses stray from the baseline's is reported, not timed.

    as published      fp32 weights and arithmetic with TF32 matmuls, AdamW without fusion, EMA parameter by parameter
    eager             bf16 autocast, fused AdamW, foreach EMA
    torch.compile     the same, the whole model compiled
    opendit           the same as eager, accelerated
    opendit blocks    accelerated with compile=True: each block compiled on its own
    opendit compiled  torch.compile of the accelerated model
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import opendit
from benchmarks.common import time_events, write_results
from examples.diffusion.gaussian import GaussianDiffusion
from examples.models.dit import DIT_MODELS, DiT
from opendit.patch import core

PUBLISHED = "as published"


def accelerated(model: nn.Module, cfg: dict[str, Any]) -> nn.Module:
    """The accelerated model; raises if a block was left as it was, for then something else would be measured."""
    plan = core.plan_of(opendit.accelerate(model, cfg))
    missing = {f"blocks.{i}" for i in range(len(model.blocks))} - {edit.fqn for edit in plan.edits}
    if missing:
        raise RuntimeError(f"not accelerated: {sorted(missing)}; {[k for k in plan.kept if k.fqn in missing][:1]}")
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    PUBLISHED: lambda model: model,
    "eager": lambda model: model,
    "torch.compile": torch.compile,
    "opendit": lambda model: accelerated(model, {}),
    "opendit blocks": lambda model: accelerated(model, {"compile": True}),
    "opendit compiled": lambda model: torch.compile(accelerated(model, {})),
}
# bf16 losses scatter by rounding; a wrong kernel is off by far more.
TOLERANCE = 0.02


def main() -> int:
    args = parse()
    device = torch.device("cpu" if args.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke runs a tiny model on the CPU")
    # Compiled code must draw the same label drops as eager code, or losses could not be compared.
    torch._inductor.config.fallback_random = True
    results, failed = [], False
    for batch in args.batch:
        rows = []
        for name in args.variants:
            row = measure(name, args, batch, device)
            rows.append(row)
            print(line(row), flush=True)
        baseline = next((r["losses"] for r in rows if "losses" in r), None)
        for row in rows:
            if baseline and "losses" in row:
                row["max_relative_loss_difference"] = max(
                    abs(a - b) / abs(b) for a, b in zip(row["losses"], baseline, strict=True)
                )
                if not row["max_relative_loss_difference"] <= TOLERANCE:
                    failed = True
                    row.pop("ms", None)
                    row["error"] = (
                        f"its losses stray by {row['max_relative_loss_difference']:.1%}: no speed is reported"
                    )
        results += rows
        print_table(rows)
    if not args.smoke:
        print(f"written to {write_results('train_step', results)}")
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=list(DIT_MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--image-size", type=int, default=256, help="pixels; the latents are an eighth of it")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--loss-steps", type=int, default=10, help="steps whose losses are kept and compared")
    parser.add_argument("--timed-steps", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, nothing written")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.image_size, args.loss_steps, args.timed_steps = [2], 32, 2, 2
        args.variants = [v for v in args.variants if v in ("eager", "opendit")]
    return args


def make_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    size = args.image_size // 8
    with device:
        if args.smoke:
            model = DiT(input_size=size, hidden_size=32, depth=2, num_heads=2, num_classes=10)
        else:
            model = DiT(**DIT_MODELS[args.model], input_size=size)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.02)
    return model.train()


def measure(name: str, args: argparse.Namespace, batch: int, device: torch.device) -> dict[str, Any]:
    """One variant at one batch size: its first losses, then the median time of a step."""
    row: dict[str, Any] = {"variant": name, "model": args.model, "image_size": args.image_size, "batch": batch}
    torch._dynamo.reset()
    try:
        row |= run(name, args, batch, device)
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def run(name: str, args: argparse.Namespace, batch: int, device: torch.device) -> dict[str, Any]:
    published = name == PUBLISHED
    torch.backends.cuda.matmul.allow_tf32 = published
    torch.backends.cudnn.allow_tf32 = True
    model = make_model(args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in parameters]
    diffusion = GaussianDiffusion().to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = VARIANTS[name](model)
    fused = None if published or device.type == "cpu" else True
    foreach = False if published else None
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused, foreach=foreach)
    generator = torch.Generator(device)

    def step(i: int) -> torch.Tensor:
        generator.manual_seed(i)
        torch.manual_seed(i)
        shape = (batch, 4, args.image_size // 8, args.image_size // 8)
        x = torch.randn(shape, device=device, generator=generator)
        noise = torch.randn(shape, device=device, generator=generator)
        t = torch.randint(diffusion.steps, (batch,), device=device, generator=generator)
        y = torch.randint(10, (batch,), device=device, generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=not published):
            loss = diffusion.loss(model, x, y, t=t, noise=noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if published:
            for e, p in zip(ema, parameters, strict=True):
                e.mul_(0.9999).add_(p.detach(), alpha=1e-4)
        else:
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1e-4)
        return loss.detach()

    losses = [step(0).item()]
    first_step_s = time.perf_counter() - start
    losses += [step(i).item() for i in range(1, args.loss_steps)]
    more = itertools.count(args.loss_steps)
    samples = time_events(lambda: step(next(more)), repeats=args.timed_steps, warmup=0)
    ms = statistics.median(samples)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan
    return {
        "losses": losses,
        "first_step_s": first_step_s,
        "ms": ms,
        "samples_ms": samples,
        "images_per_s": 1000 * batch / ms,
        "peak_gib": memory,
    }


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['variant']:17s} B={row['batch']:<4d} {row['error']}"
    return (
        f"{row['variant']:17s} B={row['batch']:<4d} {row['ms']:8.1f} ms {row['images_per_s']:8.1f} img/s "
        f"{row['peak_gib']:6.1f} GiB  first step {row['first_step_s']:5.1f} s"
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    compiled = next((r["ms"] for r in rows if r["variant"] == "torch.compile" and "ms" in r), None)
    print(f"\n{rows[0]['model']}, {rows[0]['image_size']} px, batch {rows[0]['batch']}")
    for row in rows:
        ratio = f"  {compiled / row['ms']:.2f}x torch.compile" if compiled and "ms" in row else ""
        stray = row.get("max_relative_loss_difference")
        print(line(row) + ratio + (f"  losses within {stray:.1e}" if stray is not None else ""))
    print()


if __name__ == "__main__":
    sys.exit(main())
