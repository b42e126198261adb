"""The largest batch of DiT-XL/2 at 256 px that trains, in steps of 8, and how fast it trains there.

    python benchmarks/largest_batch.py                      # torch.compile, opendit keeping less, opendit keeping least
    python benchmarks/largest_batch.py --stand-in eager     # eager autocast for torch.compile, which compiles each try
    python benchmarks/largest_batch.py --limit-gib 80       # as on a GPU with that much memory
    python benchmarks/largest_batch.py --smoke              # a tiny model on the CPU: does the script work

A try is a real step: forward, backward, AdamW with its state, EMA. What the first sizes took says where the limit
should be; from there it is closed in on, and bisection finds it. torch.compile compiles every try: a coarse --step
saves minutes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import RESULTS, synchronize, time_steps, write_results
from benchmarks.training import AUTOCAST, VARIANTS, Training, Variant, clean_up, make_model
from examples.models.dit import DIT_MODELS

STEP = 8
MOST = 1 << 14
# Of the memory, what can be allocated: the rest is the CUDA context's and lost between blocks.
USABLE = 0.97


def main() -> int:
    args = parse()
    device = torch.device("cpu" if args.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke runs a tiny model on the CPU")
    limit = float("inf")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        limit = min(args.limit_gib or total, total)
        torch.cuda.set_per_process_memory_fraction(limit / total)
    rows, path = [], None
    for name, variant in variants(args.stand_in).items():
        if args.variants and name not in args.variants:
            continue
        row: dict[str, Any] = {"variant": name, "model": args.model, "image_size": args.image_size}
        row["limit_gib"] = limit
        try:
            row |= find(variant, args, device, limit)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        rows.append(row)
        clean_up()
        print(line(row), flush=True)
        if not args.smoke:
            slug = args.model.lower().replace("/", "-")
            path = write_results(f"largest_batch_{slug}_{args.image_size}px", rows, args.out, path)
    print(f"written to {path}" if path else "smoke: nothing written")
    return int(any("error" in row for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=list(DIT_MODELS))
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--limit-gib", type=float, help="memory that may be used; default: all")
    parser.add_argument("--stand-in", choices=["compile", "eager"], default="compile", help="what opendit is against")
    parser.add_argument("--step", type=int, default=STEP, help=f"what sizes are multiples of; default {STEP}")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of the rows; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU up to batch 24, nothing written")
    args = parser.parse_args()
    unknown = set(args.variants or ()) - set(variants(args.stand_in))
    if unknown:
        parser.error(f"--variants: got {', '.join(unknown)}; there are {', '.join(variants(args.stand_in))}")
    args.most = MOST
    if args.smoke:
        torch.set_num_threads(1)
        args.model, args.image_size, args.stand_in, args.most = "smoke", 32, "eager", 3 * STEP
    return args


def variants(stand_in: str) -> dict[str, Variant]:
    keeping = {"residual": "bf16", "cuda_graphs": False}
    found = {"eager": AUTOCAST} if stand_in == "eager" else {"torch.compile": VARIANTS["torch.compile"]}
    return found | {
        f"opendit {keep}": Variant(booster=keeping | {"activation_checkpointing": keep})
        for keep in ("selective", "full")
    }


def find(variant: Variant, args: argparse.Namespace, device: torch.device, limit: float) -> dict[str, Any]:
    training = Training(make_model(args.model, args.image_size, device), variant, STEP)
    training.step(0)  # AdamW's state is there from now on
    steps = itertools.count(1)
    tries: list[dict[str, Any]] = []

    def fits(batch: int) -> float | None:
        peak, reason = attempt(training, batch, next(steps), args.most)
        tries.append({"batch": batch, "peak_gib": peak, "why_not": reason})
        return peak

    batch = largest(fits, USABLE * limit, args.step)
    while batch:
        clean_up()
        training.resize(batch)
        try:
            samples = time_steps(lambda: training.step(next(steps)), 1, 1 if args.smoke else 3)
        except torch.OutOfMemoryError:  # one step fitted, several left gaps
            batch -= args.step
            continue
        row = {"batch": batch, "tries": tries, "ms": samples[0], "images_per_s": 1000 * batch / samples[0]}
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return row
    return {"tries": tries, "error": f"not even a batch of {args.step} trains: {tries[-1]['why_not']}"}


def attempt(training: Training, batch: int, i: int, most: int) -> tuple[float | None, str | None]:
    """(peak GiB of a step, None), or (None, why there was none)."""
    if batch > most:
        return None, f"no more than {most} is tried"
    clean_up()  # also what torch.compile knows, or the second size would be compiled for any size
    reason = None
    try:
        training.resize(batch)
        training.step(i)
        synchronize()
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # a kernel may have limits of its own
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    if reason is None:
        return (torch.cuda.max_memory_allocated() / 2**30 if training.device.type == "cuda" else 0.0), None
    for p in training.parameters:
        p.grad = torch.zeros_like(p)  # as the step before the next try would have left them
    clean_up()
    return None, reason


def largest(fits: Callable[[int], float | None], limit: float, step: int = STEP) -> int:
    """The largest multiple of `step` that fits; 0 if none does.

    Args:
        fits: the memory that a size takes, or None where it does not fit.
        limit: how much memory there is, for a guess from the sizes that fitted; inf: no guess.
    """
    taken: dict[int, float] = {}
    low, high, size, stride = 0, None, 2 * step, 0
    while high is None or high - low > step:
        memory = fits(size)
        if memory is None:
            high = size
        else:
            low, taken[size] = size, memory
        guess = guessed(taken, limit, step)
        if guess and not stride:
            stride = max(step, guess // 64 // step * step)
        if high is None:
            size = max(guess, low + stride) if guess else 4 * low
        elif stride and high - low > 4 * stride:  # the limit is just below a guess that was too high
            size = high - stride
        else:
            size = low + max(step, (high - low) // 2 // step * step)
        if guess:
            stride *= 2
    return low


def guessed(taken: dict[int, float], limit: float, step: int) -> int:
    """Where memory, taken to grow in a straight line through the last two sizes, reaches the limit; 0: no idea."""
    if len(taken) < 2 or limit == float("inf"):
        return 0
    (a, at_a), (b, at_b) = sorted(taken.items())[-2:]
    if at_b <= at_a:
        return 0
    return int((limit - at_b) / (at_b - at_a) * (b - a) + b) // step * step


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['variant']:20s} {row['error']}"
    memory = f"{row['peak_gib']:.1f} ({row['reserved_gib']:.1f}) GiB, " if "peak_gib" in row else ""
    reason = next((t["why_not"] for t in reversed(row["tries"]) if t["why_not"]), "")
    return (
        f"{row['variant']:20s} batch {row['batch']}, {row['images_per_s']:.1f} img/s, {memory}"
        f"{len(row['tries'])} tries, stopped by: {reason}"
    )


if __name__ == "__main__":
    sys.exit(main())
