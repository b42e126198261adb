"""Trains a video diffusion transformer: `python examples/video/train.py --data_path CLIPS`, the same with `torchrun`.

CLIPS: a folder of clips, one sub-folder per class, or a CSV of path,text. `--model Latte-B/2 --text_encoder NAME`
conditions on captions. examples/README.md describes what it prints and what it leaves in outputs/<name>/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in image/train.py

import torch
from torch import nn
from torch.optim import AdamW

import opendit
from examples.common import OneLineParser, gather_lists, in_ddp, start_process
from examples.diffusion import objective_of
from examples.encoding import Encoder, model_config, take_networks
from examples.image.report import print_summary, save_loss_curve
from examples.loading import split
from examples.models.registry import MODELS, architecture_of, build
from examples.options import parse_train_options, train_config
from examples.run import Run, write_metrics
from examples.video.report import save_clips


def main() -> None:
    parser = OneLineParser(prog="train.py", description=__doc__.partition("\n\n")[0])
    args = parse_train_options(parser, "video")

    with parser.explain_mistakes():
        from examples.data import open_data

        process = start_process(args.device)
        device, on_gpu = process.device, process.device.type == "cuda"
        everything = open_data(
            args.data_path,
            image_size=args.image_size,
            num_frames=args.num_frames,
            frame_interval=args.frame_interval,
            flip=not args.no_flip,
            seed=args.global_seed,
        )
        take_networks(args, everything)
        data, held_out = split(everything, args.val_fraction, args.global_seed)
        objective = objective_of(args).to(device)
        encoder = Encoder(
            args.vae, args.text_encoder, architecture_of(args.model), everything.classes, device, args.text_length
        )
        config = model_config(args, everything, encoder, objective.learn_sigma, MODELS["video"][args.model])
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
        draw(run, run.folder / "samples.gif")
    except FloatingPointError as error:
        problem = str(error)
    run.stop_if_any(problem)
    if process.is_main:
        save_loss_curve(run.folder / "loss.png", run.losses.tolist(), first=run.first)
        write_metrics(run.folder, metrics)
        print_summary(metrics, run.folder)
    run.stop()


def draw(run: Run, path: Path) -> None:
    """What the averaged weights draw for `run.shown`."""
    clips = run.draw(run.shown, batch_size=4)
    if not clips.isfinite().all():
        raise FloatingPointError("the generated clips are not finite; try a lower --lr or --cfg_scale")
    if run.process.is_main:
        path.parent.mkdir(exist_ok=True)
        save_clips(path.with_suffix(".gif"), clips, columns=5)


if __name__ == "__main__":
    main()
