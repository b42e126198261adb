"""Draws images from a checkpoint: `python examples/image/sample.py --checkpoint outputs/digits-flow --classes 4 2`.

Without --checkpoint it draws from one that comes with the project (examples/checkpoints/), in seconds, on a CPU too.
Also reads the published files of facebookresearch/DiT and PixArt-alpha as they are. Those work on latents: with `--vae`
they are decoded, without it the latents are saved beside a picture of their first three channels. Under torchrun every
process draws a share.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py

from safetensors.torch import save_file

import opendit
from examples.common import OneLineParser, check_writable, named_path, start_process, stop_if_any, stop_process
from examples.drawing import Drawing
from examples.image.report import save_grid, save_image
from examples.models.checkpoint import load_checkpoint
from examples.options import add_sample_options, adder, check_sample_options, parse, sample_config, shipped_checkpoint

FORMATS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def picture_path(text: str) -> Path:
    path = named_path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(sorted(FORMATS))}")
    return path


def main() -> None:
    parser = OneLineParser(prog="sample.py", description=__doc__.partition("\n\n")[0])
    add_sample_options(parser, "image")
    adder(parser)("--out", type=picture_path, help="a .png, .jpg, … (default: samples.png)")
    args = parse(parser)
    check_sample_options(parser, args)
    args.out = args.out or Path("samples.png")

    with parser.explain_mistakes():
        process = start_process(args.device)
        if args.checkpoint is None:
            args.checkpoint = shipped_checkpoint()
            if process.is_main:
                print(f"no --checkpoint: drawing from {args.checkpoint}, which its README.md describes")
        model, config = load_checkpoint(args.checkpoint, kind="image")
        model = model.to(process.device)
        booster = sample_config(args, process.device.type == "cuda")
        if not args.no_accelerate:
            model = opendit.accelerate(  # all that opendit asks for
                model, booster, sp_size=args.sequence_parallel_size
            )
        drawing = Drawing(args, model, config, process)
        shows_latents = not drawing.on_pixels and drawing.encoder.vae_name is None
        latents_path = args.out.with_suffix(".safetensors")
        if args.out_dir and shows_latents:
            raise ValueError("--out_dir: the checkpoint makes latents; name a --vae that decodes them")
        written = [args.out_dir / "captions.jsonl"] if args.out_dir else [args.out, latents_path][: 1 + shows_latents]
        for path in written:
            check_writable(path)

    if args.explain and process.is_main:
        opendit.explain(model, booster if args.no_accelerate else None, file=sys.stdout)
    start = time.perf_counter()
    if args.out_dir:
        problem = ""
        try:
            drawing.files(args.out_dir, save_image, ".png", config.get("classes", []))
        except FloatingPointError as error:
            problem = str(error)
        stop_if_any(problem)
        stop_process()
        if process.is_main:
            print(f"wrote {drawing.total} images to {args.out_dir}")
        return
    images, latents = (x.cpu() for x in drawing.draw())
    seconds = time.perf_counter() - start
    stop_process()
    if not process.is_main:
        return
    if not images.isfinite().all():
        sys.exit("the images are not finite and were not saved; try a lower --cfg_scale")
    if shows_latents:
        save_file({"latents": latents.contiguous(), **{k: v.cpu() for k, v in drawing.cond.items()}}, latents_path)
        images = images / images.abs().amax(dim=(1, 2, 3), keepdim=True)
        print(f"these are latents: {latents_path} holds them for an image decoder; --vae NAME decodes them here")
    with parser.explain_mistakes():  # a format may have a largest size
        save_grid(args.out, images, columns=args.per_class)
    how = f"{drawing.sampler} {drawing.steps} steps"
    print(f"wrote {args.out}: {len(images)} images, {how}, {seconds:.1f} s on {process.device}")


if __name__ == "__main__":
    main()
