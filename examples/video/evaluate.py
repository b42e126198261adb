"""Scores generated clips: `python examples/video/evaluate.py --help`. Otherwise as examples/image/evaluate.py.

Fréchet distances between clips are called FVD only where the extractor says that it is FVD's network.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

from examples.common import OneLineParser, check_writable, positive_int, start_process, stop_process
from examples.evaluate.features import ClipImages, load_extractor
from examples.evaluate.options import add_evaluate_options, check_evaluate_options
from examples.evaluate.run import Pass, check_conditions, load_statistics, open_samples, report, save_statistics
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
        if generated:
            check_conditions(generated, args.metrics)
        extractor = load_extractor(args.features, process.device)
        if "inception_score" in args.metrics and not extractor.has_logits:
            raise ValueError(f"metrics: inception_score takes logits, which {extractor.name} has not")
        statistics = load_statistics(args.real_stats, extractor, frames) if args.real_stats else None
        clip = ClipImages(args.clip, process.device) if args.clip else None
        classifier = load_extractor(args.classifier, process.device) if args.classifier else None

        run = {"batch_size": args.batch_size, "workers": args.num_workers}
        of_real = of_generated = None
        if real:
            of_real = Pass(real, extractor, args.metrics, process).run(name="real", **run)
        if args.save_stats and process.is_main:
            save_statistics(args.save_stats, of_real)
        if generated:
            conditions = {"clip": clip, "classifier": classifier}
            of_generated = Pass(generated, extractor, args.metrics, process, **conditions).run(name="generated", **run)
        if of_generated and process.is_main:
            scores = report(of_generated, of_real, statistics)
            args.out.write_text(json.dumps(scores, indent=2) + "\n")
            print(json.dumps(scores, indent=2))
    stop_process()


if __name__ == "__main__":
    main()
