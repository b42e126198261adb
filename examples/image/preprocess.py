"""Turns images into VAE latents, and captions into text embeddings: `python examples/image/preprocess.py --help`.

Training then needs neither the VAE nor the text encoder. Under torchrun the processes share the work. Run again after a
kill, it makes what is missing. examples/data/README.md says what goes in and what comes out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

from examples.common import OneLineParser, start_process, stop_process
from examples.data import Latents, open_data
from examples.data.options import add_preprocess_options, check_captions, check_image_size
from examples.data.prepare import DTYPES, Preparation, summary
from examples.encoders import load_text_encoder, load_vae
from examples.options import parse


def main() -> None:
    parser = OneLineParser(prog="preprocess.py", description=__doc__.partition("\n\n")[0])
    add_preprocess_options(parser)
    args = parse(parser)
    if args.text_length and not args.text_encoder:
        parser.error("argument --text_length: without --text_encoder there is no text to cut")

    with parser.explain_mistakes():
        process = start_process(args.device)
        data = open_data(args.data_path, image_size=args.image_size, flip=args.flip, seed=args.global_seed)
        if isinstance(data, Latents):
            raise ValueError(f"data_path: {args.data_path} holds latents already; allowed: images")
        check_captions(args.text_encoder, data.captions, args.data_path)
        settings = {
            "image_size": args.image_size,
            "num_frames": 1,
            "frame_interval": 1,
            "flip": args.flip,
            "variants": 2 if args.flip else 1,  # as they are and mirrored
            "seed": args.global_seed,
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
        if vae.is_video:
            raise ValueError(f"vae: {vae.name} is for video; images take an image VAE")
        text = None
        if args.text_encoder:
            text = load_text_encoder(args.text_encoder, process.device, precision, args.text_length)
        index = preparation.run(vae, text, batch_size=args.batch_size, workers=args.num_workers)
        if process.is_main:
            print(summary(index, args.out))
    stop_process()


if __name__ == "__main__":
    main()
