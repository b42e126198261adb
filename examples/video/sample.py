"""Draws clips from a checkpoint: `python examples/video/sample.py --checkpoint outputs/clips-flow --classes 0 1`.

Also reads the published files of Vchitect/Latte as they are; those work on latents, which `--vae NAME` decodes. Under
torchrun every process draws a share.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in image/train.py

import opendit
from examples.common import (
    OneLineParser,
    check_writable,
    named_path,
    positive_int,
    start_process,
    stop_if_any,
    stop_process,
)
from examples.drawing import Drawing
from examples.models.checkpoint import load_checkpoint
from examples.options import add_sample_options, adder, check_sample_options, parse, sample_config
from examples.video.report import FORMATS, save_clips, save_frames


def clip_path(text: str) -> Path:
    path = named_path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(sorted(FORMATS))}")
    return path


def main() -> None:
    parser = OneLineParser(prog="sample.py", description=__doc__.partition("\n\n")[0])
    add_sample_options(parser, "video")
    add = adder(parser)
    add(
        "--out",
        type=clip_path,
        help="a .gif, or an .mp4 where PyAV is (default: samples.gif)",
    )
    add("--fps", type=positive_int, default=8)
    args = parse(parser)
    check_sample_options(parser, args)
    args.out = args.out or Path("samples.gif")

    with parser.explain_mistakes():
        process = start_process(args.device)
        model, config = load_checkpoint(args.checkpoint, kind="video")
        model = model.to(process.device)
        booster = sample_config(args, process.device.type == "cuda")
        if not args.no_accelerate:
            model = opendit.accelerate(  # all that opendit asks for
                model, booster, sp_size=args.sequence_parallel_size
            )
        drawing = Drawing(args, model, config, process)
        check_writable(args.out_dir / "captions.jsonl" if args.out_dir else args.out)

    if args.explain and process.is_main:
        opendit.explain(model, booster if args.no_accelerate else None, file=sys.stdout)
    start = time.perf_counter()
    if args.out_dir:
        problem = ""
        try:
            drawing.files(
                args.out_dir, lambda path, clip: save_frames(path, clip, args.fps), ".gif", config.get("classes", [])
            )
        except FloatingPointError as error:
            problem = str(error)
        stop_if_any(problem)
        stop_process()
        if process.is_main:
            print(f"wrote {drawing.total} clips to {args.out_dir}")
        return
    clips, _ = (x.cpu() for x in drawing.draw())
    seconds = time.perf_counter() - start
    stop_process()
    if not process.is_main:
        return
    if not clips.isfinite().all():
        sys.exit("the clips are not finite and were not saved; try a lower --cfg_scale")
    if not drawing.on_pixels and drawing.encoder.vae_name is None:
        print("these are latents, shown by their first three channels; --vae NAME decodes them")
        clips = clips / clips.abs().amax(dim=(1, 2, 3, 4), keepdim=True)
    with parser.explain_mistakes():
        save_clips(args.out, clips, columns=max(args.per_class, min(5, len(clips))), fps=args.fps)
    how = f"{drawing.sampler} {drawing.steps} steps"
    print(
        f"wrote {args.out}: {len(clips)} clips of {clips.shape[1]} frames, {how}, {seconds:.1f} s on {process.device}"
    )


if __name__ == "__main__":
    main()
