"""Writes the small files that the accuracy runs read, so that a machine without the data or its decoders needs no more.

    python benchmarks/accuracy/prepare.py cifar DATA --out FOLDER      cifar_0.safetensors, cifar_1.safetensors
    python benchmarks/accuracy/prepare.py emoji DATA --out FOLDER      emoji.safetensors
    python benchmarks/accuracy/prepare.py shapes DATA --out FOLDER     shapes.safetensors

DATA is a folder that holds, as the run needs them,

    cifar10/            labels.json and sheets of 500 images, lossless WebP of 32 × 16000
    cifar_resnet/       resnet56.safetensors
    fluent_emoji_3d/    captions.jsonl ("file", "caption", "class") and its images
    video_shapes/       captions.jsonl ("file", "caption", "class") and its clips
    taef2/, minilm/     an autoencoder and a sentence encoder, as examples/encoders reads them
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.accuracy.files import packed, write

FRAMES, SIDE = 16, 32  # of the clips, every other frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WRITERS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for path in WRITERS[args.what](args.data, args.out):
        print(f"written {path}: {path.stat().st_size / 1e6:.1f} MB")


def cifar(data: Path, out: Path) -> list[Path]:
    """Two files, so that neither is large. The second has the test images and the classifier."""
    about = json.loads((data / "cifar10/labels.json").read_text())
    train, test = about["splits"]["train"], about["splits"]["test"]
    files = [(data / "cifar10" / sheet).read_bytes() for sheet in train["sheets"]]
    labels, middle = torch.tensor(train["labels"]), len(files) * 3 // 5
    per_sheet = len(labels) // len(files)
    first = packed("train_0", files[:middle]) | {"train_0.labels": labels[: middle * per_sheet]}
    second = packed("train_1", files[middle:]) | {"train_1.labels": labels[middle * per_sheet :]}
    second |= packed("test", [(data / "cifar10" / sheet).read_bytes() for sheet in test["sheets"]])
    second |= {"test.labels": torch.tensor(test["labels"])}
    network = load_file(data / "cifar_resnet/resnet56.safetensors")
    second |= {f"resnet.{name}": _half_if_weight(value) for name, value in network.items()}
    paths = [out / "cifar_0.safetensors", out / "cifar_1.safetensors"]
    for path, tensors in zip(paths, (first, second), strict=True):
        write(path, tensors, classes=about["classes"])
    return paths


def emoji(data: Path, out: Path) -> list[Path]:
    """Images as they are, their captions' embeddings, and the autoencoder."""
    rows = _captions(data / "fluent_emoji_3d")
    tensors = packed("images", [(data / "fluent_emoji_3d" / row["file"]).read_bytes() for row in rows])
    tensors |= {"pooled": _embedded(data / "minilm", [row["caption"] for row in rows])}
    for half in ("encoder", "decoder"):
        weights = load_file(data / f"taef2/taef2_{half}.safetensors")
        tensors |= {f"taef2.{half}.{name}": value for name, value in weights.items()}
    about = json.loads((data / "taef2/config.json").read_text())
    tensors |= {f"taef2.{name}": torch.tensor(about[f"latent_{name}"]) for name in ("mean", "std")}
    classes = sorted({row["class"] for row in rows})
    tensors["images.labels"] = torch.tensor([classes.index(row["class"]) for row in rows])
    path = out / "emoji.safetensors"
    write(path, tensors, classes=classes, captions=[row["caption"] for row in rows])
    return [path]


def shapes(data: Path, out: Path) -> list[Path]:
    """Every other frame of 32 at 32 px, a clip's frames side by side; motion, colour and shape as labels."""
    from examples.data.video import decode_video

    rows = _captions(data / "video_shapes")
    facts = [_parts(row["caption"]) for row in rows]
    names = {what: sorted({fact[what] for fact in facts}) for what in ("motion", "colour", "shape")}
    clips = [decode_video(data / "video_shapes" / row["file"], SIDE, FRAMES, 2, 0.0) for row in rows]
    tensors = packed("clips", [_strip(clip) for clip in clips])
    for what, values in names.items():
        tensors[f"clips.{what}"] = torch.tensor([values.index(fact[what]) for fact in facts])
    captions = [f"a {fact['colour']} {fact['shape']} in {fact['motion']} motion" for fact in facts]
    tensors["pooled"] = _embedded(data / "minilm", captions)
    path = out / "shapes.safetensors"
    write(path, tensors, captions=captions, **names)
    return [path]


def _parts(caption: str) -> dict[str, str]:
    """Of "a COLOUR SHAPE in MOTION motion". Of a colour of several words, the last: the others are no help."""
    words = caption.split()
    return {"colour": words[-5], "shape": words[-4], "motion": words[-2]}


def _strip(frames_F3HW: Tensor) -> bytes:
    """A clip's frames side by side, as a lossless WebP."""
    held = io.BytesIO()
    pixels = frames_F3HW.permute(2, 0, 3, 1).flatten(1, 2).contiguous()
    Image.fromarray(pixels.numpy()).save(held, "WEBP", lossless=True, quality=100)
    return held.getvalue()


def _captions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def _embedded(folder: Path, captions: list[str]) -> Tensor:
    """[N, E] in fp16."""
    from examples.encoders import load_text_encoder

    encoder = load_text_encoder(str(folder), torch.device("cpu"), torch.float32)
    unique = list(dict.fromkeys(captions))
    found = dict(zip(unique, encoder.encode(unique)[2], strict=True))
    return torch.stack([found[caption] for caption in captions]).half()


def _half_if_weight(value: Tensor) -> Tensor:
    return value.half() if value.dim() == 4 else value


WRITERS: dict[str, Callable[[Path, Path], list[Path]]] = {"cifar": cifar, "emoji": emoji, "shapes": shapes}

if __name__ == "__main__":
    main()
