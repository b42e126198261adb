"""Loss alignment: facebookresearch/DiT's own model and diffusion, plain, and with opendit's lines added.

    python benchmarks/accuracy/alignment.py --upstream DiT --data cifar_0.safetensors cifar_1.safetensors --seconds 90
    python benchmarks/accuracy/alignment.py --upstream DiT --data … --max-steps 5000 --seconds 400 --state runs
    python benchmarks/accuracy/alignment.py --upstream DiT --smoke          # a tiny model, a few steps on the CPU

The loop is that of upstream's train.py: uniform timesteps, training_losses, AdamW at 1e-4 without decay, EMA parameter
by parameter; images take the place of latents. Runs are named PRECISION:VARIANT:

    fp32, tf32, bf16    fp32 products; TF32's, as train.py allows; bf16 autocast
    plain, again        upstream's code, twice: what the GPU's own changing order of additions makes of equal runs
    opendit             import opendit; opendit.accelerate(model, "train", optimizer=opt)
    fp8                 the same with precision="fp8", on GPUs that have it

Each run is a process of its own; they share the device, so their speeds say nothing. Equal seeds give equal weights,
batches, timesteps, noise and label drops. Runs of one precision are compared over the steps that all of them reached:
differences of losses, smoothed over `--window` steps, relative to the plain run's.

With `--state`, what `--seconds` end is kept there, and the same command goes on with it, as if nothing had been: 5000
steps may take several calls.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

import opendit
from benchmarks.accuracy import cifar, files, upstream
from benchmarks.accuracy.training import curve, hold_back, smoothed
from benchmarks.common import RESULTS, write_results
from benchmarks.resuming import Kept
from opendit.patch import core

PRECISIONS, VARIANTS = ("fp32", "tf32", "bf16"), ("plain", "again", "opendit", "fp8")
BOOSTERS: dict[str, Any] = {
    "opendit": "train",
    # No variant looks at its gradients.
    "fp8": {"activation_checkpointing": "selective", "cuda_graphs": True, "precision": "fp8", "skip_nonfinite": False},
}
RUNS = ("fp32:plain", "fp32:opendit", "bf16:plain", "bf16:again", "bf16:opendit")


def main() -> int:
    args = parse()
    if args.worker:
        torch.save(train(args), args.worker)
        return 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs or len(args.runs)) as pool:
        rows = list(pool.map(lambda run: worker(args, Path(name), run), args.runs))
    losses = {row["run"]: row.pop("losses") for row in rows if "losses" in row}
    compared = list(compare(losses, args.window))
    facts = {
        "setting": f"{args.model} of facebookresearch/DiT on CIFAR-10's pixels ({args.size} px), batch {args.batch}, "
        f"AdamW at {args.lr:g}, seed {args.seed}",
        "upstream": upstream.commit(args.upstream),
        "layers": upstream.layers(),
        "command": files.command(),
        "seed": args.seed,
        "budget_s": args.seconds,
        "window": args.window,
        "comparisons": compared,
    }
    path = write_results("accuracy_alignment", rows, args.out, **facts)
    for row in rows:
        print(
            f"{row['run']:14s} {row.get('error') or str(row['steps']) + ' steps, loss ' + format(row['final'], '.5f')}"
        )
    for found in compared:
        print(
            f"{found['run']} against {found['baseline']}, {found['steps']} steps: smoothed losses differ by at most "
            f"{found['max_smoothed']:.2e}, {found['mean_smoothed']:.2e} in the mean"
        )
    print(f"written to {path}")
    return int(any("error" in row for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="a clone of facebookresearch/DiT")
    parser.add_argument("--data", type=Path, nargs="+", help="what prepare.py cifar wrote")
    parser.add_argument("--seconds", type=float, default=90, help="of training, for every run, in this call")
    parser.add_argument("--max-steps", type=int, help="end sooner, after so many steps in all")
    parser.add_argument("--state", type=Path, help="folder to keep runs in, from which the next call goes on")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="PRECISION:VARIANT")
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=50, help="steps that losses are smoothed over")
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.model, args.size, args.batch, args.max_steps, args.window, args.jobs = "DiT-S/8", 16, 2, 3, 2, 1
    elif not args.data:
        parser.error("--data: is needed, the files that benchmarks/accuracy/prepare.py cifar writes")
    for run in args.runs:
        precision, _, variant = run.partition(":")
        if precision not in PRECISIONS or variant not in VARIANTS:
            allowed = f"{', '.join(PRECISIONS)}, a colon, and {', '.join(VARIANTS)}"
            parser.error(f"--runs: got {run!r}; allowed: one of {allowed}")
    try:
        upstream.check(args.upstream)
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def worker(args: argparse.Namespace, folder: Path, run: str) -> dict[str, Any]:
    """One run in a process of its own: its losses, or why there are none."""
    out = folder / f"{run.replace(':', '_')}.pt"
    chosen = ["--upstream", str(args.upstream), "--runs", run, "--worker", str(out)]
    chosen += ["--data", *map(str, args.data)] if args.data else []
    chosen += ["--max-steps", str(args.max_steps)] if args.max_steps else []
    chosen += ["--state", str(args.state)] if args.state else []
    for name in ("seconds", "model", "size", "batch", "lr", "seed"):
        chosen += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(
        [sys.executable, __file__, *(["--smoke"] if args.smoke else []), *chosen],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    row: dict[str, Any] = {"run": run, "batch": args.batch}
    if done.returncode:
        return row | {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
    found = torch.load(out, weights_only=True)
    losses = found["losses"]
    last = losses[-max(1, len(losses) // 10) :].double().mean().item()
    return row | {
        "steps": len(losses), "seconds": found["seconds"], "final": last, "curve": curve(losses),
        "notes": found["notes"], "losses": losses,
    }  # fmt: skip


def train(args: argparse.Namespace) -> dict[str, Any]:
    precision, _, variant = args.runs[0].partition(":")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    data = cifar.invented(args.seed) if args.smoke else cifar.load(args.data)
    images = data["train"].to(device).float() / 127.5 - 1
    images = torch.nn.functional.interpolate(images, size=(args.size, args.size), mode="area")
    labels = data["train.labels"].to(device)

    dit_models, create_diffusion = upstream.load(args.upstream)
    torch.manual_seed(args.seed)
    model = dit_models[args.model](input_size=args.size, in_channels=3, num_classes=10).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    diffusion = create_diffusion(timestep_respacing="")
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    if variant in BOOSTERS:
        opendit.accelerate(model, BOOSTERS[variant], optimizer=opt)  # all that opendit asks for
        if not any(edit.fqn.startswith("blocks.") for edit in core.plan_of(model).edits):
            raise RuntimeError("no block of upstream's model was accelerated")
    model.train()
    torch.manual_seed(args.seed + 1)  # from here on both draw the same

    folder = args.state and args.state / args.runs[0].replace(":", "_")
    names = ("model", "size", "batch", "lr", "seed")
    kept = Kept(folder, {"run": args.runs[0], **{n: getattr(args, n) for n in names}}, model, opt, ema)
    losses = kept.go_on()
    batches = itertools.islice(epochs(len(images), args.batch, args.seed), len(losses), None)
    queued: list[Any] = []
    started = time.perf_counter()
    while not losses or (time.perf_counter() - started < args.seconds and len(losses) != args.max_steps):
        chosen = next(batches)
        x, y = images[chosen.to(device)], labels[chosen.to(device)]
        t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion.training_losses(model, x, t, {"y": y})["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)
        losses.append(loss.detach().float())
        hold_back(device, queued)
    found = torch.stack(losses).cpu()
    seconds = kept.keep(found, time.perf_counter() - started)
    notes = sorted({what for _, what in core.notes(model)}) if variant in BOOSTERS else []
    return {"losses": found, "seconds": seconds, "notes": notes}


def epochs(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Numbers [batch] of the samples of every step; what does not fill a batch at the end of an epoch is left out."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order).split(batch)[: count // batch]


def compare(losses: dict[str, Tensor], window: int) -> list[dict[str, Any]]:
    """Each run against the plain one of its precision, over the steps that all of that precision reached."""
    found = []
    for precision in PRECISIONS:
        runs = {run: values.double() for run, values in losses.items() if run.startswith(precision)}
        baseline = runs.pop(f"{precision}:plain", None)
        if baseline is None or not runs:
            continue
        steps = min(len(values) for values in (baseline, *runs.values()))
        plain = smoothed(baseline[:steps], window)
        for run, values in runs.items():
            off = (smoothed(values[:steps], window) - plain).abs() / plain
            each = (values[:steps] - baseline[:steps]).abs() / baseline[:steps]
            found.append(
                {
                    "run": run, "baseline": f"{precision}:plain", "steps": steps, "first_step": each[0].item(),
                    "max_step": each.max().item(), "max_smoothed": off.max().item(), "mean_smoothed": off.mean().item(),
                    "difference": curve(off),
                }
            )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
