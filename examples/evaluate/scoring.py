"""The passes and the figures, for image/evaluate.py and video/evaluate.py alike."""

from __future__ import annotations

import argparse
import json

from examples.common import Process
from examples.data import Samples
from examples.evaluate.features import ClipImages, load_extractor
from examples.evaluate.npz import NpzImages, save_images
from examples.evaluate.run import Pass, check_conditions, load_statistics, report, save_statistics


def score(
    args: argparse.Namespace,
    process: Process,
    generated: Samples | NpzImages | None,
    real: Samples | NpzImages | None,
    num_frames: int = 1,
) -> None:
    """Writes and prints what `args` ask for; every process calls it. Raises ValueError before it computes anything."""
    if generated:
        check_conditions(generated, args.metrics)
    extractor = load_extractor(args.features, process.device)
    if "inception_score" in args.metrics and not extractor.has_logits:
        raise ValueError(f"metrics: inception_score takes logits, which {extractor.name} has not")
    statistics = load_statistics(args.real_stats, extractor, num_frames) if args.real_stats else None
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
    if getattr(args, "npz", None) and process.is_main:
        print(save_images(args.npz, generated, of_generated.unreadable))
