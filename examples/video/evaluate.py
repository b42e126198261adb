"""Scores generated clips: `python examples/video/evaluate.py --help`. Otherwise as examples/image/evaluate.py.

Fréchet distances between clips are called FVD only where the extractor says that it is FVD's network.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

from examples.common import OneLineParser, check_writable, positive_int, start_process, stop_process
from examples.evaluate.options import add_evaluate_options, check_evaluate_options
from examples.evaluate.run import open_samples
from examples.evaluate.scoring import score
from examples.options import adder, parse


def main() -> None:
    parser = OneLineParser(prog="evaluate.py", description=__doc__.partition("\n\n")[0])
    add_evaluate_options(parser)
    add = adder(parser)
    add("--num_frames", type=partial(positive_int, limit=4096), default=16, help="frames of a clip")
    add(
        "--frame_interval", type=partial(positive_int, limit=1000), default=1, help="take every n-th, of generated ones"
    )
    add("--real_frame_interval", type=partial(positive_int, limit=1000), help="of the real ones (default: the same)")
    args = parse(parser)
    check_evaluate_options(parser, args)
    if args.num_frames < 2:
        parser.error("argument --num_frames: a clip has at least 2 frames; for images there is image/evaluate.py")

    with parser.explain_mistakes():
        process = start_process(args.device)
        size, frames = args.image_size, args.num_frames
        interval = args.real_frame_interval or args.frame_interval
        generated = open_samples(args.generated, size, frames, args.frame_interval) if args.generated else None
        real = open_samples(args.real, size, frames, interval) if args.real else None
        for path in filter(None, (args.out, args.save_stats)):
            check_writable(path)
        score(args, process, generated, real, frames)
    stop_process()


if __name__ == "__main__":
    main()
