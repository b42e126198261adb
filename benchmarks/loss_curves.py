"""Does a bf16 residual stream train as well? Loss curves over thousands of steps, several seeds, real images.

    python benchmarks/loss_curves.py                              # scikit-learn's handwritten digits
    python benchmarks/loss_curves.py --data FOLDER --patch 2      # images, one sub-folder per class, such as CIFAR-10's
    python benchmarks/loss_curves.py --prepare images.pt          # here; then, on a machine without them:
    python benchmarks/loss_curves.py --data images.pt
    python benchmarks/loss_curves.py --seconds 400 --state runs   # again and again, until all steps are taken
    python benchmarks/loss_curves.py --smoke                      # a few steps on the CPU: does the script work

    autocast    the unaccelerated model under bf16 autocast
    inherit     accelerated, the residual stream in fp32 as the model has it
    bf16        accelerated, the residual stream in bf16
    fp8         accelerated, as inherit, wide products of rows in 8 bits

Each (variant, seed) is a process of its own; they share the device. Equal seeds draw equal weights, batches, noise and
label drops in all variants, so what differs is arithmetic. The verdict compares the mean difference of final losses
(the last tenth of the steps) with what another seed changes. The chart is benchmarks/charts.py's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import opendit
from benchmarks.common import RESULTS, write_results
from benchmarks.resuming import Kept
from benchmarks.training import check_accelerated
from examples.diffusion import OBJECTIVES
from examples.models.dit import DiT

# Nothing but what they are named by may differ between the accelerated ones.
KEEPING: dict[str, Any] = {"activation_checkpointing": "selective", "cuda_graphs": False}
VARIANTS: dict[str, Any] = {
    "autocast": None,
    "inherit": KEEPING | {"residual": "inherit"},
    "bf16": KEEPING | {"residual": "bf16"},
    "fp8": KEEPING | {"precision": "fp8", "skip_nonfinite": False},
}
POINTS = 100  # of a curve in the record


def main() -> int:
    args = parse()
    if args.worker:
        torch.save(train(args, torch.load(args.data, weights_only=True)), args.worker)
        return 0
    if args.prepare:
        torch.save(load_images(args), args.prepare)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "images.pt"
        torch.save(load_images(args), data)
        runs = list(itertools.product(args.variants, range(args.seeds)))
        start = time.perf_counter()
        with ThreadPoolExecutor(args.jobs or len(runs)) as pool:
            rows = list(pool.map(lambda run: worker(args, data, folder, *run), runs))
        seconds = time.perf_counter() - start
    left = [row for row in rows if "final" not in row and "error" not in row]
    for row in left:
        print(
            f"{row['variant']:10s} seed {row['seed']}  {row['steps']} of {args.steps} steps; the same command goes on"
        )
    if left:
        return int(any("error" in row for row in rows))
    verdicts = judge(rows)
    setting = (
        f"DiT of {args.depth} blocks of {args.hidden}, {args.image_size} px, patch {args.patch}, batch {args.batch}, "
        f"{args.objective} on {Path(args.data).name if args.data else 'handwritten digits'}, {args.steps} steps, "
        f"{args.seeds} seeds"
    )
    print(setting, f"{seconds:.0f} s", sep="; ")
    for row in rows:
        print(f"{row['variant']:10s} seed {row['seed']}  {row.get('error') or format(row['final'], '.5f')}")
    for verdict in verdicts:
        print(
            f"{verdict['variant']} − {verdict['baseline']}: {verdict['difference']:+.2e} of the final loss, "
            f"seeds spread by {verdict['spread']:.2e}: {verdict['verdict']}"
        )
    if not args.smoke:
        facts = {
            "setting": setting,
            "verdicts": verdicts,
            "smoothed_over": max(1, args.steps // POINTS),
            "seconds": seconds,
        }
        print(f"written to {write_results('loss_curves', rows, args.out, **facts)}")
    return int(any("error" in row for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images, one sub-folder per class, or what --prepare wrote")
    parser.add_argument("--prepare", metavar="FILE", help="write the images to FILE and stop")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--objective", default="flow", choices=list(OBJECTIVES))
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time; default: all")
    parser.add_argument("--seconds", type=float, help="of training, for every run, in this call; default: no limit")
    parser.add_argument("--state", type=Path, help="folder to keep runs in, from which the next call goes on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="a few steps on the CPU, nothing written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seconds is not None and args.state is None:
        parser.error("--seconds: got it without --state; allowed: both, or what was trained would be lost")
    if args.smoke:
        args.steps, args.seeds, args.batch, args.jobs = 6, 2, 4, args.jobs or 2
        args.variants = ["inherit", "bf16"]  # what a CPU can compute
        args.image_size, args.patch, args.hidden, args.depth, args.heads = 8, 2, 32, 2, 2
    elif not torch.cuda.is_available() and not args.prepare:
        parser.error("there is no CUDA device; --smoke takes a few steps on the CPU")
    return args


def load_images(args: argparse.Namespace) -> dict[str, Tensor]:
    """{"images": [N, C, I, I] in 0 … 255, "labels": [N]}."""
    if args.data and Path(args.data).is_file():
        return torch.load(args.data, weights_only=True)
    # Here, for it needs packages that the machine with the GPU may lack.
    from examples.image.data import open_images

    dataset = open_images(args.data or "digits", args.image_size, flip=False, seed=0)
    samples = [dataset[i] for i in range(len(dataset))]
    pixels = ((torch.stack([sample["pixels"] for sample in samples]) + 1) * 127.5).round().clamp(0, 255).byte()
    return {"images": pixels, "labels": torch.tensor([sample["label"] for sample in samples])}


def worker(args: argparse.Namespace, data: Path, folder: Path, variant: str, seed: int) -> dict[str, Any]:
    """Runs one training in a process; its losses, or why there are none."""
    out = folder / f"{variant}_{seed}.pt"
    chosen = ["--data", str(data), "--worker", str(out), "--variant", variant, "--seed", str(seed)]
    for name in ("steps", "batch", "objective", "lr", "image_size", "patch", "hidden", "depth", "heads"):
        chosen += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for name in ("seconds", "state"):
        chosen += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    done = subprocess.run(
        [sys.executable, __file__, *(["--smoke"] if args.smoke else []), *chosen],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a core each
    )
    row: dict[str, Any] = {"variant": variant, "seed": seed, "batch": args.batch}
    if done.returncode:
        return row | {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
    losses = torch.load(out, weights_only=True).double()
    if len(losses) < args.steps:
        return row | {"steps": len(losses)}
    last = losses[-max(1, args.steps // 10) :].mean().item()
    width = max(1, args.steps // POINTS)
    curve = losses[: len(losses) // width * width].view(-1, width).mean(1).tolist()
    return row | {"final": last, "curve": curve, "image_size": args.image_size}


def train(args: argparse.Namespace, data: dict[str, Tensor]) -> Tensor:
    """The loss of every step that was taken. Nothing waits for the device until the end."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    torch.manual_seed(args.seed)
    images, labels = (data[name].to(device) for name in ("images", "labels"))
    images = images.float() / 127.5 - 1
    objective = OBJECTIVES[args.objective]().to(device)
    model = DiT(
        input_size=args.image_size,
        patch_size=args.patch,
        in_channels=images.shape[1],
        hidden_size=args.hidden,
        depth=args.depth,
        num_heads=args.heads,
        num_classes=int(data["labels"].max()) + 1,
        learn_sigma=objective.learn_sigma,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=device.type == "cuda" or None)
    if VARIANTS[args.variant] is not None:
        opendit.accelerate(model, VARIANTS[args.variant], optimizer=optimizer)
        check_accelerated(model)
    torch.manual_seed(args.seed)  # whatever accelerate drew
    folder = args.state and args.state / f"{args.variant}_{args.seed}"
    names = ("variant", "seed", "batch", "objective", "lr", "image_size", "patch", "hidden", "depth", "heads")
    kept = Kept(folder, {name: getattr(args, name) for name in names}, model, optimizer)
    losses = kept.go_on()
    started, limit = time.perf_counter(), args.seconds if args.seconds is not None else float("inf")
    while len(losses) < args.steps and (not losses or time.perf_counter() - started < limit):
        chosen = torch.randint(len(images), (args.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective.loss(model, images[chosen], labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = torch.stack(losses).float().cpu()
    kept.keep(found, time.perf_counter() - started)
    return found


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant against those before it: the mean difference of final losses, beside their spread over seeds."""
    finals: dict[str, dict[int, float]] = {}
    for row in rows:
        if "final" in row:
            finals.setdefault(row["variant"], {})[row["seed"]] = row["final"]
    verdicts = []
    for baseline, variant in itertools.combinations(finals, 2):
        seeds = sorted(finals[baseline].keys() & finals[variant].keys())
        if len(seeds) < 2:
            continue
        differences = [finals[variant][s] - finals[baseline][s] for s in seeds]
        difference = statistics.mean(differences)
        spread = statistics.stdev([finals[baseline][s] for s in seeds])
        within = abs(difference) <= spread  # never true of a loss that is not a number
        verdicts.append(
            {
                "variant": variant,
                "baseline": baseline,
                "difference": difference,
                "standard_error": statistics.stdev(differences) / len(seeds) ** 0.5,
                "spread": spread,
                "verdict": "less than another seed changes" if within else "more than another seed changes",
            }
        )
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
