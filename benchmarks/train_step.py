"""A whole training step of DiT: as published, eager, `torch.compile`, opendit; and opendit ingredient by ingredient.

    python benchmarks/train_step.py                               # DiT-XL/2, 256 px, batch 256 and 64
    python benchmarks/train_step.py --ablate                      # and the ladder
    python benchmarks/train_step.py --model DiT-B/2 --batch 256 --variants torch.compile opendit
    python benchmarks/train_step.py --smoke                       # a tiny model on the CPU: does the script work

    as published                fp32 weights and arithmetic with TF32 matmuls, AdamW and EMA parameter by parameter
    eager                       bf16 autocast, fused AdamW, foreach EMA
    torch.compile               the same, the whole model compiled
    torch.compile bf16 weights  a compiled bf16 model, fp32 master weights kept by the script; no autocast
    opendit                     opendit.accelerate(model, "train", optimizer=optimizer), bf16 autocast
    opendit compiled            torch.compile of that model
    opendit fp8                 that model with precision="fp8", where it is asked for by name; with a bf16 residual too

Variants run one after another in one process, from the same weights, on the same data (benchmarks/training.py). Before
a speed is printed, the first losses must be the first variant's, and what opendit changed must train as fp32 does, as
far as bf16 can (benchmarks/parity.py). A variant that fails or runs out of memory leaves the others alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import RESULTS, caches_are_empty, empty_caches, host_ms, synchronize, time_steps, write_results
from benchmarks.parity import Reference
from benchmarks.training import LADDER, OPT_IN, VARIANTS, Training, Variant, clean_up, make_model
from examples.models.dit import DIT_MODELS

ALL = VARIANTS | LADDER | OPT_IN
PARITY_TOKENS = 4096  # from here on blocks use the layouts of large batches
# Losses of bf16 variants scatter by rounding; a wrong kernel is off by far more.
TOLERANCE = 0.02


def main() -> int:
    args = parse()
    device = torch.device("cpu" if args.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke runs a tiny model on the CPU")
    if args.cold:
        empty_caches()
    cold = caches_are_empty()

    names = args.variants + [name for name in LADDER if args.ablate and name not in args.variants]
    reference = None
    if args.parity and any(ALL[name].booster is not None for name in names):
        reference = Reference(partial(build, args, device, parity_batch(args)), args.parity)
    failed = False
    verdicts: dict[str, Any] = {}
    for batch in args.batch:
        rows: list[dict[str, Any]] = []
        files: dict[str, Path] = {}
        for name in names:
            row = measure(name, args, device, batch, rows)
            rows.append(row)
            check_losses(row, rows)
            if reference and ALL[name].booster is not None and "ms" in row:
                check_parity(row, reference, verdicts)
            failed |= "error" in row and row["error"] != "out of memory"
            compare(rows)
            print(line(row), flush=True)
            if not args.smoke:  # after every row, for the next one may take the process down
                write(rows, files, args, batch, cold)
        cold = False
        print_table(rows)
        print(*(f"written to {path}" for path in files.values()), sep="\n")
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=list(DIT_MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--image-size", type=int, default=256, help="pixels; the latents are an eighth of it")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(ALL), metavar="NAME")
    parser.add_argument("--ablate", action="store_true", help="the ladder too: " + ", ".join(LADDER))
    parser.add_argument("--loss-steps", type=int, default=10, help="steps whose losses are kept and compared")
    parser.add_argument("--timed-steps", type=int, default=15)
    parser.add_argument("--steps-per-sample", type=int, default=3, help="back to back, as training runs")
    parser.add_argument("--parity", type=int, default=20, metavar="N", help="steps compared with fp32; 0: do not")
    parser.add_argument("--cold", action="store_true", help="start with empty compilation caches, for the first step")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, nothing written")
    args = parser.parse_args()
    if args.smoke:
        torch.set_num_threads(1)  # waking a second one costs more than a tiny tensor's work
        args.model, args.batch, args.image_size = "smoke", [2], 32
        args.loss_steps, args.timed_steps, args.steps_per_sample, args.parity = 2, 2, 1, min(args.parity, 2)
        args.variants = [v for v in args.variants if not ALL[v].compiled]
    return args


def parity_batch(args: argparse.Namespace) -> int:
    patch = 2 if args.smoke else DIT_MODELS[args.model]["patch_size"]
    tokens = (args.image_size // 8 // patch) ** 2
    return min(-(-PARITY_TOKENS // tokens), *args.batch)


def build(args: argparse.Namespace, device: torch.device, batch: int, variant: Variant) -> Training:
    return Training(make_model(args.model, args.image_size, device), variant, batch)


def measure(
    name: str, args: argparse.Namespace, device: torch.device, batch: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """One variant at one batch size: its first losses, then the median time of a step."""
    row: dict[str, Any] = {"variant": name, "model": args.model, "image_size": args.image_size, "batch": batch}
    for other in rows:
        if ALL[name].same(ALL[other["variant"]]):  # the ladder's last rung is the recipe
            return {**other, "variant": name, "same_as": other["variant"]}
    row["booster"] = ALL[name].booster
    clean_up()
    try:
        row |= run(ALL[name], args, device, batch, partial(make_model, args.model, args.image_size, device))
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:
        row["error"] = in_words(error)
    clean_up()
    return row


def run(
    variant: Variant, args: argparse.Namespace, device: torch.device, batch: int, make: Callable[[], Any]
) -> dict[str, Any]:
    model = make()
    synchronize()
    start = time.perf_counter()
    training = Training(model, variant, batch)
    losses = [training.step(0).item()]
    first_step_s = time.perf_counter() - start
    losses += [training.step(i).item() for i in range(1, args.loss_steps)]
    steps = itertools.count(args.loss_steps)
    count = max(1, args.timed_steps // args.steps_per_sample)
    samples = time_steps(lambda: training.step(next(steps)), count, args.steps_per_sample)
    host = host_ms(lambda: training.step(next(steps)))
    ms = statistics.median(samples)
    row: dict[str, Any] = {
        "losses": losses,
        "first_step_s": first_step_s,
        "ms": ms,
        "samples_ms": samples,
        "images_per_s": 1000 * batch / ms,
        "host_ms": min(host),
        "host_samples_ms": host,
        "notes": training.notes(),
    }
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


def check_losses(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Takes the speed from a row whose losses stray from the first row's."""
    baseline = next((r["losses"] for r in rows if "losses" in r), None)
    if baseline and "losses" in row:
        stray = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], baseline, strict=True))
        row["max_relative_loss_difference"] = stray
        if not stray <= TOLERANCE:
            refuse(row, f"its losses stray by {stray:.1%}")


def check_parity(row: dict[str, Any], reference: Reference, verdicts: dict[str, Any]) -> None:
    """Takes the speed from a row that does not train as fp32 does; every configuration is run once."""
    name = row.get("same_as", row["variant"])
    if name not in verdicts:
        try:
            verdicts[name] = reference.judge(ALL[name])
        except Exception as error:
            verdicts[name] = {}, f"parity could not be checked: {in_words(error)}"
    row["parity"], reason = verdicts[name]
    if reason:
        refuse(row, reason)


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def refuse(row: dict[str, Any], reason: str) -> None:
    for key in ("ms", "samples_ms", "images_per_s", "ratio_to_compile", "host_ms", "host_samples_ms"):
        row.pop(key, None)
    row["error"] = f"{reason}: no speed is reported"


def compare(rows: list[dict[str, Any]]) -> None:
    """Every row's speed relative to the best that torch.compile alone gives."""
    best = min((r["ms"] for r in rows if "ms" in r and ALL[r["variant"]].is_baseline), default=None)
    for row in rows:
        if best and "ms" in row:
            row["ratio_to_compile"] = best / row["ms"]


def write(rows: list[dict[str, Any]], files: dict[str, Path], args: argparse.Namespace, batch: int, cold: bool) -> None:
    """The ladder has a file of its own, with what it is compared to."""
    ladder = [r for r in rows if r["variant"] in LADDER]
    whole = [r for r in rows if r["variant"] not in LADDER]
    for theme, chosen in (("train_step", whole), ("ablation", [*whole, *ladder] if ladder else [])):
        if chosen:
            slug = args.model.lower().replace("/", "-")
            name = f"{theme}_{slug}_{args.image_size}px_b{batch}"
            facts = {"steps_per_sample": args.steps_per_sample, "cold": cold}
            files[theme] = write_results(name, chosen, args.out, files.get(theme), **facts)


def line(row: dict[str, Any]) -> str:
    head = f"{row['variant']:27s} B={row['batch']:<4d}"
    if "error" in row:
        return f"{head} {row['error']}"
    memory = f"{row['peak_gib']:6.1f} ({row['reserved_gib']:.1f}) GiB " if "peak_gib" in row else ""
    notes = f"  NOTE {row['notes'][0]}" if row["notes"] else ""
    return (
        f"{head} {row['ms']:8.1f} ms {row['images_per_s']:8.1f} img/s {memory} host {row['host_ms']:6.1f} ms"
        f"  first step {row['first_step_s']:5.1f} s{notes}"
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\n{first['model']}, {first['image_size']} px, batch {first['batch']}; ratios to the best torch.compile")
    for row in rows:
        ratio = f"  {row['ratio_to_compile']:.2f}x" if "ratio_to_compile" in row else ""
        parity = row.get("parity")
        errors = f"  gradients {parity['ours']['gradients']:.1e}" if parity else ""
        theirs = f" (autocast {parity['autocast']['gradients']:.1e})" if parity else ""
        print(line(row) + ratio + errors + theirs)


if __name__ == "__main__":
    sys.exit(main())
