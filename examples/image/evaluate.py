"""Scores generated images: `python examples/image/evaluate.py --help`. Under torchrun the processes share the images.

    --features inception.safetensors --real FOLDER --generated FOLDER --image_size 256   FID
    --npz samples.npz                                                                    the file for ADM's evaluator

examples/evaluate/README.md says what may be measured with what.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

from examples.common import OneLineParser, check_writable, named_path, start_process, stop_process
from examples.evaluate.options import add_evaluate_options, check_evaluate_options
from examples.evaluate.run import open_samples
from examples.evaluate.scoring import score
from examples.options import adder, parse


def main() -> None:
    parser = OneLineParser(prog="evaluate.py", description=__doc__.partition("\n\n")[0])
    add_evaluate_options(parser)
    adder(parser)("--npz", type=named_path, help="write the generated images for ADM's evaluator")
    args = parse(parser)
    check_evaluate_options(parser, args)

    with parser.explain_mistakes():
        process = start_process(args.device)
        generated = open_samples(args.generated, args.image_size) if args.generated else None
        real = open_samples(args.real, args.image_size) if args.real else None
        for path in filter(None, (args.out, args.npz, args.save_stats)):
            check_writable(path)
        score(args, process, generated, real)
    stop_process()


if __name__ == "__main__":
    main()
