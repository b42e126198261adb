"""The part of the command line that image/ and video/ share: what preprocess.py takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from examples.common import OneLineParser, named_path, positive_int, whole_number
from examples.data.prepare import DTYPES
from examples.encoders import Vae
from examples.options import adder


def add_preprocess_options(parser: OneLineParser) -> None:
    add = adder(parser)
    add("--data_path", type=named_path, required=True, help="see examples/data/README.md for what it may be")
    add("--out", type=named_path, required=True, help="folder for the shards; an unfinished one is continued")
    add("--image_size", type=partial(positive_int, limit=8192), default=256, help="side of the centre crop in pixels")
    add("--flip", action="store_true", help="keep mirrored versions too, for training without --no_flip")
    add("--vae", required=True, help="folder, or name on the hub")
    add("--text_encoder", help="folder, or name on the hub; without it captions are left out")
    add("--text_length", type=partial(positive_int, limit=4096), help="tokens per caption (CLIP 77, T5 120, else 128)")
    add("--mixed_precision", choices=sorted(DTYPES), default="fp32", help="what the networks compute in")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="what latents are stored in; fp32 is exact")
    add("--text_dtype", choices=["bf16", "fp32"], default="fp32", help="what embeddings are stored in")
    add("--batch_size", type=partial(positive_int, limit=65536), default=16, help="per process")
    add("--shard_size", type=positive_int, default=1024, help="samples per file; what a kill may cost")
    add(
        "--num_workers",
        "--workers",
        type=partial(whole_number, limit=1024),
        default=0,
        help="processes that decode, per process",
    )
    add("--global_seed", "--seed", type=partial(whole_number, limit=2**63 - 1), default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])


def check_image_size(size: int, factor: int, vae: str) -> None:
    if size % factor:
        raise ValueError(f"image_size: got {size}; allowed with {vae}: multiples of {factor}")


def check_num_frames(num_frames: int, vae: Vae) -> None:
    if (kept := vae.frames_kept(num_frames)) != num_frames:
        raise ValueError(f"num_frames: got {num_frames}; {vae.name} gives back {kept} of them. Most take 4·k + 1")


def check_captions(text_encoder: str | None, captions: list[str] | None, path: Path) -> None:
    if text_encoder and captions is None:
        raise ValueError(f"text_encoder: got {text_encoder}, but {path} has no captions. Leave it out, or add captions")
