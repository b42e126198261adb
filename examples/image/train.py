"""Trains a class-conditional DiT on images: `python examples/image/train.py`, the same with `torchrun`.

Without arguments: the 8×8 handwritten digits that come with scikit-learn, minutes on two CPU cores. With a folder of
images, one sub-folder per class: `--data FOLDER --model DiT-B/4 --image-size 64`. examples/README.md describes what it
prints and what it leaves in outputs/<name>/.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`
# Before torch loads: idle OpenMP threads sleep instead of spinning, or a second busy program costs far more than half.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import opendit
from examples.common import (
    Ema,
    OneLineParser,
    autocast,
    gather_lists,
    in_ddp,
    mean_over_processes,
    start_process,
    stop_if_any,
    stop_process,
)
from examples.diffusion import OBJECTIVES
from examples.image.data import batches
from examples.image.options import build_dataset, model_arguments, parse_train_options
from examples.image.report import print_summary, sample_and_judge, save_loss_curve
from examples.image.speed import compare
from examples.models.checkpoint import save_checkpoint
from examples.models.dit import DiT


def main() -> None:
    parser = OneLineParser(prog="train.py", description=__doc__.partition("\n\n")[0])
    args = parse_train_options(parser)

    with parser.explain_mistakes():
        process = start_process(args.device)
        device, on_gpu = process.device, process.device.type == "cuda"
        if args.precision == "auto":
            args.precision = "bf16" if on_gpu else "fp32"
        if args.compile is None:
            args.compile = on_gpu
        dataset = build_dataset(args)
        data = batches(dataset, args.batch_size, process=process, seed=args.seed, workers=args.workers)
        torch.manual_seed(args.seed)
        config = model_arguments(args, dataset)
        model = DiT(**config).to(device)
        optimizer = AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        booster = opendit.BoosterConfig(kernels=args.kernels, attention=args.attention, compile=args.compile)
        if not args.no_accelerate:
            model, optimizer = opendit.accelerate(model, booster, optimizer=optimizer)  # all that opendit asks for
        folder = args.outputs / args.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text("{}\n")  # a folder that can't be written to is better known now

    if args.explain and process.is_main:
        opendit.explain(model, booster if args.no_accelerate else None, file=sys.stdout)
    objective = OBJECTIVES[args.objective]().to(device)
    ema = Ema(model, args.ema_decay)
    trained = in_ddp(model, process)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / args.warmup))

    def train_step(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast(device, args.precision):
            loss = objective.loss(model, *batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch.manual_seed(args.seed + 1 + process.rank)  # every process draws its own noise
    losses = torch.zeros(args.steps, device=device)
    global_batch = args.batch_size * process.world
    start = time.perf_counter()
    bar = tqdm(range(args.steps), desc="train", unit="step", mininterval=0.5, disable=not process.is_main)
    for i in bar:
        losses[i] = train_step(trained, optimizer, next(data))
        schedule.step()
        ema.update()
        if (i + 1) % 20 == 0:  # not at every step: reading the loss waits for the device
            loss = mean_over_processes(losses[i - 19 : i + 1].mean())
            speed = (i + 1) * global_batch / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} img/s", refresh=False)
            if not math.isfinite(loss):
                break
    bar.close()
    history = losses.tolist()
    seconds = time.perf_counter() - start
    del trained

    averaged = DiT(**config).to(device).eval()
    averaged.load_state_dict(ema.state_dict())
    with torch.no_grad(), autocast(device, args.precision):
        averaged_loss = objective.loss(averaged, *next(data)).item()  # the last update has no loss of its own yet
    broken = next((i + 1 for i, loss in enumerate(history) if not math.isfinite(loss)), None)
    problem = ""
    if broken:
        problem = f"the loss is {history[broken - 1]} at step {broken}"
    elif not math.isfinite(averaged_loss) or not all(weight.isfinite().all() for weight in ema.shadow):
        problem = "the averaged weights are useless: they or their loss are not finite"
    stop_if_any(problem and f"training diverged: {problem}; nothing was saved, try a lower --lr")

    metrics = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {"torch": torch.__version__, "opendit": opendit.__version__},
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "processes": process.world,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "images_per_s": args.steps * global_batch / seconds,
        "loss_first_20": sum(history[:20]) / len(history[:20]),
        "loss_last_20": sum(history[-20:]) / len(history[-20:]),
        "unreadable_files": gather_lists(dataset.unreadable_files()),
    }
    if process.is_main:
        settings = {"objective": args.objective, "pixels": True, "classes": dataset.classes}
        save_checkpoint(folder, ema.state_dict(), {"model": config, **settings})
        save_loss_curve(folder / "loss.png", history)
        try:
            metrics |= sample_and_judge(args, averaged, folder / "samples.png", device)
        except FloatingPointError as error:
            problem = str(error)
    stop_if_any(problem)
    del averaged  # the speed table measures memory

    if args.compare_steps:
        # From the trained weights: at its zero start a DiT's blocks do not reach the loss, and no fault would show.
        trained_state = model.state_dict()

        def plain() -> tuple[nn.Module, Optimizer]:
            model = DiT(**config).to(device)
            model.load_state_dict(trained_state)
            return model, AdamW(model.parameters(), lr=args.lr / 10, fused=True)

        def compiled() -> tuple[nn.Module, Optimizer]:
            model, optimizer = plain()
            return torch.compile(model), optimizer

        def accelerated() -> tuple[nn.Module, Optimizer]:
            model, optimizer = plain()
            return opendit.accelerate(model, booster, optimizer=optimizer)

        if process.is_main:
            print("measuring unaccelerated, torch.compile and opendit in turns …", flush=True)
        metrics["speed"] = compare(
            {"unaccelerated": plain, "torch.compile": compiled, "opendit": accelerated},
            train_step,
            [next(data) for _ in range(4)],
            loss_steps=args.compare_steps,
            process=process,
            images_per_step=global_batch,
        )
    if process.is_main:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print_summary(metrics, folder)
    stop_process()


if __name__ == "__main__":
    main()
