"""Draws images from a checkpoint: `python examples/image/sample.py --checkpoint outputs/digits-flow --classes 4 2`.

Also reads the published `.pt` files of facebookresearch/DiT as they are. Those work on latents, which need an image
decoder that is not part of this example: the latents are saved beside a picture of their first three channels.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py

import torch
from safetensors.torch import save_file

import opendit
from examples.common import (
    OneLineParser,
    autocast,
    check_writable,
    named_path,
    pick_device,
    positive_float,
    positive_int,
    whole_number,
)
from examples.diffusion import SAMPLERS, sample
from examples.image.data import EXTENSIONS
from examples.image.options import add_booster_options, add_device_options
from examples.image.report import save_grid
from examples.models.checkpoint import load_checkpoint


def picture_path(text: str) -> Path:
    path = named_path(text)
    if path.suffix.lower() not in EXTENSIONS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(sorted(EXTENSIONS))}")
    return path


def main() -> None:
    parser = OneLineParser(prog="sample.py", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a folder written by train.py, a .safetensors or a .pt file")
    add("--classes", type=whole_number, nargs="+", help="class numbers, one row each (default: the first ten)")
    add("--per-class", type=partial(positive_int, limit=10_000), default=10)
    add("--cfg-scale", type=positive_float, help="default: 2 for pixels, 4 for latents; 1: no guidance")
    add("--sampler", choices=sorted(sum(SAMPLERS.values(), ())), help="default: flow heun, gaussian ddim")
    add("--steps", type=positive_int, help="default: flow 10, gaussian 50")
    add("--out", type=picture_path, default=Path("samples.png"), help="a .png, .jpg, … (default: samples.png)")
    add_device_options(parser)
    add_booster_options(parser)
    args = parser.parse_args()

    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        if os.environ["RANK"] != "0":
            return
        print(f"one process draws all images; the other {world - 1} that torchrun started have nothing to do")

    with parser.explain_mistakes():
        device = pick_device(args.device)
        on_gpu = device.type == "cuda"
        model, config = load_checkpoint(args.checkpoint)
        objective, pixels = config["objective"], config["pixels"]
        sampler = args.sampler or SAMPLERS[objective][0]
        if sampler not in SAMPLERS[objective]:
            raise ValueError(f"--sampler {sampler}: a {objective} checkpoint takes {' or '.join(SAMPLERS[objective])}")
        steps = args.steps or {"flow": 10, "gaussian": 50}[objective]
        if objective == "gaussian" and steps > 1000:
            raise ValueError(f"--steps {steps}: the gaussian objective has 1000 steps")
        classes = args.classes or list(range(min(10, model.num_classes)))
        if max(classes) >= model.num_classes:
            raise ValueError(f"--classes {max(classes)}: the checkpoint knows 0 … {model.num_classes - 1}")
        compile = on_gpu if args.compile is None else args.compile
        booster = opendit.BoosterConfig(kernels=args.kernels, attention=args.attention, compile=compile)
        model = model.to(device)
        if not args.no_accelerate:
            model = opendit.accelerate(model, booster)  # all that opendit asks for
        latents_path = args.out.with_suffix(".safetensors")
        for path in [args.out] if pixels else [args.out, latents_path]:
            check_writable(path)

    if args.explain:
        opendit.explain(model, booster if args.no_accelerate else None, file=sys.stdout)
    labels = torch.tensor(classes, device=device).repeat_interleave(args.per_class)
    start = time.perf_counter()
    with autocast(device, ("bf16" if on_gpu else "fp32") if args.precision == "auto" else args.precision):
        images = sample(
            model,
            labels,
            sampler=sampler,
            steps=steps,
            cfg_scale=args.cfg_scale or (2.0 if pixels else 4.0),
            seed=args.seed,
            clip=pixels,
            guided_channels=None if pixels else 3,  # as the published samples were made
        ).cpu()
    seconds = time.perf_counter() - start
    if not images.isfinite().all():
        sys.exit("the images are not finite and were not saved; try a lower --cfg-scale")

    if not pixels:
        save_file({"latents": images, "classes": labels.cpu()}, latents_path)
        images = images / images.abs().amax(dim=(1, 2, 3), keepdim=True)
        print(f"these are latents: {latents_path} holds them for an image decoder")
    with parser.explain_mistakes():  # a format may have a largest size
        save_grid(args.out, images, columns=args.per_class)
    print(f"wrote {args.out}: {len(labels)} images, {sampler} {steps} steps, {seconds:.1f} s on {device}")


if __name__ == "__main__":
    main()
