"""Turns clips into VAE latents, and captions into text embeddings: `python examples/video/preprocess.py --help`.

An image VAE takes the clips frame by frame, a video VAE as a whole. `--variants` windows are cut from each video, those
that training on the videos themselves would see in its first epochs. Otherwise as examples/image/preprocess.py.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

from examples.common import OneLineParser, positive_int, start_process, stop_process
from examples.data import Latents, open_data
from examples.data.options import add_preprocess_options, check_captions, check_image_size, check_num_frames
from examples.data.prepare import DTYPES, Preparation, summary
from examples.encoders import load_text_encoder, load_vae
from examples.options import adder, parse


def main() -> None:
    parser = OneLineParser(prog="preprocess.py", description=__doc__.partition("\n\n")[0])
    add_preprocess_options(parser)
    add = adder(parser)
    add("--num_frames", type=partial(positive_int, limit=4096), default=16, help="frames of a clip")
    add("--frame_interval", type=partial(positive_int, limit=1000), default=3, help="take every n-th frame")
    add("--variants", type=partial(positive_int, limit=1000), help="clips per video (default: 1, with --flip 2)")
    add("--decoder", choices=["pyav", "torchcodec"], default="pyav")
    args = parse(parser)
    args.variants = args.variants or (2 if args.flip else 1)
    if args.text_length and not args.text_encoder:
        parser.error("argument --text_length: without --text_encoder there is no text to cut")
    if args.num_frames < 2:
        parser.error("argument --num_frames: a clip has at least 2 frames; for images there is image/preprocess.py")
    if args.flip and args.variants % 2:
        parser.error(
            f"argument --variants: {args.variants} with --flip, where every other variant is mirrored: not odd"
        )

    with parser.explain_mistakes():
        process = start_process(args.device)
        shape = {
            "image_size": args.image_size,
            "num_frames": args.num_frames,
            "frame_interval": args.frame_interval,
            "flip": args.flip,
            "seed": args.global_seed,
        }
        data = open_data(args.data_path, decoder=args.decoder, **shape)
        if isinstance(data, Latents):
            raise ValueError(f"data_path: {args.data_path} holds latents already; allowed: videos")
        check_captions(args.text_encoder, data.captions, args.data_path)
        settings = {
            **shape,
            "variants": args.variants,
            "decoder": args.decoder,
            "vae": args.vae,
            "text_encoder": args.text_encoder,
            "text_length": args.text_length,
            "mixed_precision": args.mixed_precision,
            "dtype": args.dtype,
            "text_dtype": args.text_dtype,
        }
        preparation = Preparation(args.out, data, settings, shard_size=args.shard_size, process=process)
        precision = DTYPES[args.mixed_precision]
        vae = load_vae(args.vae, process.device, precision)
        check_image_size(args.image_size, vae.factor, vae.name)
        check_num_frames(args.num_frames, vae)
        text = None
        if args.text_encoder:
            text = load_text_encoder(args.text_encoder, process.device, precision, args.text_length)
        index = preparation.run(vae, text, batch_size=args.batch_size, workers=args.num_workers)
        if process.is_main:
            print(summary(index, args.out))
    stop_process()


if __name__ == "__main__":
    main()
