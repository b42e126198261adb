"""The command line of train.py, and what it asks for: the data, and the model's constructor arguments."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from examples.common import OneLineParser, named_path, positive_float, positive_int, whole_number
from examples.diffusion import OBJECTIVES
from examples.image.data import Digits, ImageFolder
from examples.models.dit import DIT_MODELS


def add_booster_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("opendit")
    group.add_argument("--kernels", default="auto", help="auto, triton or reference")
    group.add_argument("--attention", default="auto", help="auto, or the name of a backend")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="opendit's torch.compile of each block (default: on GPUs)",
    )
    group.add_argument("--no-accelerate", action="store_true", help="run the model as it is, and not compiled")
    group.add_argument("--explain", action="store_true", help="print what opendit changed in the model, and why")


def add_device_options(parser: OneLineParser) -> None:
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on GPUs")
    parser.add_argument("--seed", type=partial(whole_number, limit=2**63 - 1), default=0)


def parse_train_options(parser: OneLineParser) -> argparse.Namespace:
    add = parser.add_argument
    add("--data", default="digits", metavar="FOLDER", help="'digits', or a folder with a sub-folder per class")
    add("--image-size", type=partial(positive_int, limit=4096), help="side in pixels (default: digits 8, folders 64)")
    add("--no-flip", action="store_true", help="folders: no random left-right flips")
    add("--workers", type=partial(whole_number, limit=1024), default=0, help="folders: processes that load images")

    add("--model", default="DiT-Digits/2", choices=sorted(DIT_MODELS), metavar="DiT-SIZE/PATCH")
    add("--depth", type=partial(positive_int, limit=1000), help="other than the model's own")
    add("--hidden-size", type=partial(positive_int, limit=16384), help="other than the model's own")
    add("--num-heads", type=positive_int, help="other than the model's own")
    add("--num-classes", type=partial(positive_int, limit=1_000_000), help="more than the data has")

    add("--objective", default="flow", choices=sorted(OBJECTIVES))
    add("--steps", type=positive_int, default=1000)
    add("--batch-size", type=positive_int, default=64, help="per process")
    add("--lr", type=positive_float, default=2e-3)
    add("--warmup", type=positive_int, default=50, help="steps until the learning rate is reached")
    add("--ema-decay", type=positive_float, default=0.995)
    add_device_options(parser)
    add_booster_options(parser)
    add("--compare-steps", type=whole_number, default=10, help="steps whose losses are compared; 0: no speed table")

    add("--cfg-scale", type=positive_float, default=2.0)
    add("--sample-steps", type=positive_int, help="default: flow 10, gaussian 50")
    add("--outputs", type=named_path, default=Path("outputs"))
    add("--name", help="sub-folder of --outputs (default: DATA-OBJECTIVE)")
    args = parser.parse_args()

    if args.ema_decay >= 1:
        parser.error("argument --ema-decay: must be below 1")
    if not args.data:
        parser.error("argument --data: the path is empty")
    if args.name is not None and (args.name in ("", "..") or args.name != Path(args.name).name):
        parser.error(f"argument --name: {args.name!r} is not the name of a sub-folder")
    if args.objective == "gaussian" and (args.sample_steps or 0) > 1000:
        parser.error("argument --sample-steps: the gaussian objective has 1000 steps")
    digits = args.data == "digits"
    args.image_size = args.image_size or (8 if digits else 64)
    args.sample_steps = args.sample_steps or {"flow": 10, "gaussian": 50}[args.objective]
    if args.name is None:
        args.name = f"{'digits' if digits else os.path.basename(os.path.abspath(args.data))}-{args.objective}"
    return args


def build_dataset(args: argparse.Namespace) -> Digits | ImageFolder:
    if args.data == "digits":
        return Digits(args.image_size)
    return ImageFolder(Path(args.data), args.image_size, flip=not args.no_flip)


def model_arguments(args: argparse.Namespace, dataset: Digits | ImageFolder) -> dict[str, Any]:
    num_classes = args.num_classes or len(dataset.classes)
    if num_classes < len(dataset.classes):
        raise ValueError(f"--num-classes {num_classes}: the data has {len(dataset.classes)} classes")
    changed = {"depth": args.depth, "hidden_size": args.hidden_size, "num_heads": args.num_heads}
    return {
        **DIT_MODELS[args.model],
        **{name: value for name, value in changed.items() if value},
        "input_size": args.image_size,
        "in_channels": dataset.channels,
        "num_classes": num_classes,
        "learn_sigma": OBJECTIVES[args.objective].learn_sigma,
    }
