"""What evaluate.py takes, for images and for clips, and which settings contradict each other."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from examples.common import OneLineParser, named_path, positive_int, whole_number
from examples.evaluate.run import METRICS
from examples.options import adder


def metric_list(text: str) -> set[str]:
    metrics = set(text.split(","))
    if unknown := sorted(metrics - set(METRICS)):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no metric; there are {', '.join(METRICS)}")
    return metrics


def add_evaluate_options(parser: OneLineParser) -> None:
    add = adder(parser)
    add(
        "--generated",
        type=named_path,
        help="what was sampled: anything that training data may be, or an .npz of images",
    )
    add("--real", type=named_path, help="what it is compared with")
    add("--real_stats", type=named_path, help="mu and sigma of the real ones from an .npz, in place of --real")
    add("--save_stats", type=named_path, help="write those of --real")
    add("--image_size", type=partial(positive_int, limit=8192), required=True, help="side of the centre crop in pixels")
    add("--features", required=True, help="pixels, clip:FOLDER, inception.safetensors or package.module:function")
    add("--metrics", type=metric_list, default={"frechet"}, help=f"of {','.join(METRICS)} (default: frechet)")
    add("--clip", help="folder of the CLIP model for --metrics clip")
    add("--classifier", help="package.module:function whose logits --metrics accuracy compares with the asked class")
    add("--out", type=named_path, default=Path("scores.json"), help="the figures (default: scores.json)")
    add("--batch_size", type=partial(positive_int, limit=65536), default=32, help="per process")
    add(
        "--num_workers",
        "--workers",
        type=partial(whole_number, limit=1024),
        default=0,
        help="processes that decode, per process",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])


def check_evaluate_options(parser: OneLineParser, args: argparse.Namespace) -> None:
    metrics = args.metrics
    if not args.generated and not (args.real and args.save_stats):
        parser.error("argument --generated: it is needed, except with --real and --save_stats alone")
    if not args.generated:
        metrics.clear()
        metrics.add("frechet")
    if args.real and args.real_stats:
        parser.error("argument --real_stats: --real is given too; allowed: one of them")
    if args.save_stats and not args.real:
        parser.error("argument --save_stats: it takes --real")
    if "frechet" in metrics and not (args.real or args.real_stats):
        parser.error("argument --metrics: frechet takes --real or --real_stats")
    if "precision_recall" in metrics and not args.real:
        parser.error("argument --metrics: precision_recall takes --real, for it needs every feature of the real ones")
    for metric, option in (("clip", "clip"), ("accuracy", "classifier")):
        if (metric in metrics) != bool(getattr(args, option)):
            parser.error(f"argument --{option}: it goes with --metrics {metric}, and that with it")
