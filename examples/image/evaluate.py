"""Scores generated images: `python examples/image/evaluate.py --help`. Under torchrun the processes share the images.

    --features inception.safetensors --real FOLDER --generated FOLDER --image_size 256   FID
    --npz samples.npz                                                                    the file for ADM's evaluator

examples/evaluate/README.md says what may be measured with what.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

from examples.common import OneLineParser, check_writable, named_path, start_process, stop_process
from examples.evaluate.features import ClipImages, load_extractor
from examples.evaluate.npz import save_images
from examples.evaluate.options import add_evaluate_options, check_evaluate_options
from examples.evaluate.run import Pass, check_conditions, load_statistics, open_samples, report, save_statistics
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
        if generated:
            check_conditions(generated, args.metrics)
        extractor = load_extractor(args.features, process.device)
        if "inception_score" in args.metrics and not extractor.has_logits:
            raise ValueError(f"metrics: inception_score takes logits, which {extractor.name} has not")
        statistics = load_statistics(args.real_stats, extractor) if args.real_stats else None
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
        if args.npz and process.is_main:
            print(save_images(args.npz, generated, of_generated.unreadable))
    stop_process()


if __name__ == "__main__":
    main()
