"""Trains a diffusion transformer on images: `python examples/image/train.py`, the same with `torchrun`.

Without arguments: the 8×8 handwritten digits that come with scikit-learn, minutes on two CPU cores. With a folder of
images, one sub-folder per class: `--data_path FOLDER --model DiT-B/4 --image_size 64`. examples/README.md describes
what it prints and what it leaves in outputs/<name>/.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`
# Before torch loads: idle OpenMP threads sleep instead of spinning, or a second busy program costs far more than half.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import opendit
from examples.common import OneLineParser, autocast, gather_lists, in_ddp, start_process
from examples.diffusion import objective_of
from examples.encoding import Encoder, model_config, take_networks
from examples.image.data import open_images
from examples.image.report import print_summary, sample_and_judge, save_grid, save_loss_curve
from examples.image.speed import compare
from examples.loading import collate, split
from examples.models.registry import MODELS, architecture_of, build
from examples.options import parse_train_options, precision_of, train_config
from examples.run import Run, write_metrics


def main() -> None:
    parser = OneLineParser(prog="train.py", description=__doc__.partition("\n\n")[0])
    args = parse_train_options(parser, "image")

    with parser.explain_mistakes():
        process = start_process(args.device)
        device, on_gpu = process.device, process.device.type == "cuda"
        everything = open_images(args.data_path, args.image_size, flip=not args.no_flip, seed=args.global_seed)
        take_networks(args, everything)
        data, held_out = split(everything, args.val_fraction, args.global_seed)
        objective = objective_of(args).to(device)
        encoder = Encoder(
            args.vae, args.text_encoder, architecture_of(args.model), everything.classes, device, args.text_length
        )
        config = model_config(args, everything, encoder, objective.learn_sigma, MODELS["image"][args.model])
        torch.manual_seed(args.global_seed)
        model = build(config).to(device)
        optimizer = AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        booster = train_config(args, on_gpu, distributed=process.world > 1)
        if args.no_accelerate:
            net = in_ddp(model, process)
        else:
            net, optimizer = opendit.accelerate(  # all that opendit asks for
                model, booster, optimizer=optimizer, sp_size=args.sequence_parallel_size
            )
        run = Run(args, process, config, model, net, optimizer, objective, encoder, data, held_out)
        del net  # one owner, which drops it before the process group ends: see stop_process

    if args.explain and process.is_main:
        opendit.explain(model, booster if args.no_accelerate else None, file=sys.stdout)

    for step in run.steps():
        total = torch.zeros((), device=device)
        for batch, context in run.micro_batches():
            with context:
                loss = run.loss(batch, step) / args.accum
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        run.schedule.step()
        if not run.after(step, total, norm, draw):
            break

    metrics = run.finish() | {"unreadable_files": gather_lists(list(everything.skipped))}
    settings = {"objective": args.objective, "pixels": args.vae is None, "classes": everything.classes}
    networks = {"vae": args.vae, "text_encoder": args.text_encoder, "text_length": args.text_length}
    run.export({**settings, **networks})
    problem = ""
    try:
        metrics |= sample_and_judge(run, run.folder / "samples.png")
    except FloatingPointError as error:
        problem = str(error)
    run.stop_if_any(problem)
    if process.is_main:
        save_loss_curve(run.folder / "loss.png", run.losses.tolist(), first=run.first)

    if args.compare_steps:
        metrics["speed"] = speed_table(args, run, config, booster)
    if process.is_main:
        write_metrics(run.folder, metrics)
        print_summary(metrics, run.folder)
    run.stop()


def draw(run: Run, path: Path) -> None:
    """What the averaged weights draw for `run.shown`."""
    images = run.draw(run.shown)
    if run.process.is_main:
        path.parent.mkdir(exist_ok=True)
        save_grid(path.with_suffix(".png"), images, columns=5)


def speed_table(args, run: Run, config: dict, booster: opendit.BoosterConfig) -> list[dict]:
    """The same steps by the plain model, by torch.compile and by opendit, from the trained weights.

    At its zero start a DiT's blocks do not reach the loss, and no fault would show.
    """
    device, trained = run.device, run.model.state_dict()
    precision = precision_of(args, device.type == "cuda")
    objective = run.objective

    def train_step(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        with autocast(device, precision):
            loss = objective.loss(model, *batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def plain() -> tuple[nn.Module, Optimizer]:
        model = build(config).to(device)
        model.load_state_dict(trained)
        return model, AdamW(model.parameters(), lr=args.lr / 10, fused=True)

    def compiled() -> tuple[nn.Module, Optimizer]:
        model, optimizer = plain()
        return torch.compile(model), optimizer

    def accelerated() -> tuple[nn.Module, Optimizer]:
        model, optimizer = plain()
        # `compare` places all three models alike, keeps no averages and brings its own autocast.
        alone = dataclasses.replace(booster, plugin=None, ema=None, precision="inherit")
        return opendit.accelerate(model, alone, optimizer=optimizer)

    if run.process.is_main:
        print("measuring unaccelerated, torch.compile and opendit in turns …", flush=True)
    batches = []
    for i in range(4):
        batch = collate([run.data[(i * args.batch_size + j) % len(run.data)] for j in range(args.batch_size)])
        batches.append((run.encoder.x0(batch, lambda shape: 0.0), run.encoder.condition(batch)))
    return compare(
        {"unaccelerated": plain, "torch.compile": compiled, "opendit": accelerated},
        train_step,
        batches,
        loss_steps=args.compare_steps,
        process=run.process,
        images_per_step=args.batch_size * run.process.world,
    )


if __name__ == "__main__":
    main()
