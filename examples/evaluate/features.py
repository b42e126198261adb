"""Feature extractors by what `--features` says. Every report carries the extractor's name.

| `--features` | network | standard |
|---|---|---|
| `inception.safetensors` | FID's Inception-v3 from a file in the layout that inception.py documents | FID |
| `clip:FOLDER` | CLIP's image embedding, by transformers | no |
| `pixels` | no network: the image averaged to 8 × 8 | no |
| `package.module:function` | your own: `function(device)` returns an `Extractor` | as it says |

Clips go through an image extractor frame by frame: their features are the mean over the frames beside the mean absolute
change from frame to frame. FVD proper takes an I3D network, which you can give as `package.module:function`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.evaluate.inception import load_inception

Features = tuple[Tensor, Tensor | None]


@dataclass
class Extractor:
    """`compute`: uint8 images [B, 3, H, W], clips [B, T, 3, H, W] if `takes_clips` → features [B, D], logits or None.

    `standard`: "FID" or "FVD" where the distance between its features is what everybody calls by that name.
    """

    name: str
    compute: Callable[[Tensor], Features]
    standard: str | None = None
    takes_clips: bool = False
    has_logits: bool = False

    def name_for(self, num_frames: int) -> str:
        whole = num_frames == 1 or self.takes_clips
        return self.name if whole else f"{self.name}, per frame: mean and mean change"

    def standard_for(self, num_frames: int) -> str | None:
        return self.standard if num_frames == 1 or self.takes_clips else None

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        whole = pixels.ndim == 4 or self.takes_clips
        # Not TF32, PyTorch's default for convolutions: others' statistics were made without.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.compute(pixels if whole else pixels.flatten(0, 1))
        if whole:
            return features, logits
        features = features.unflatten(0, pixels.shape[:2])
        logits = None if logits is None else logits.unflatten(0, pixels.shape[:2]).mean(1)
        return torch.cat([features.mean(1), features.diff(dim=1).abs().mean(1)], 1), logits


def load_extractor(spec: str, device: torch.device) -> Extractor:
    if spec == "pixels":
        return Extractor("pixels 8x8", lambda x: (F.adaptive_avg_pool2d(x.float() / 255, 8).flatten(1), None))
    if spec.startswith("clip:"):
        clip = ClipImages(spec.removeprefix("clip:"), device)
        return Extractor(f"CLIP {spec.removeprefix('clip:')}", lambda x: (clip(x), None))
    if spec.endswith(".safetensors"):
        path = Path(spec)
        if not path.is_file():
            raise ValueError(f"features: the file {path} does not exist")
        model = load_inception(path).to(device)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        name = f"FID Inception-v3, 2048 features, weights sha256 {digest}"
        return Extractor(name, lambda x: model(x.to(device)), standard="FID", has_logits=model.fc is not None)
    module, _, function = spec.partition(":")
    if not function:
        raise ValueError(
            f"features: got {spec}; allowed: pixels, clip:FOLDER, a .safetensors file, package.module:function"
        )
    try:
        extractor = getattr(importlib.import_module(module), function)(device)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {spec} can't be had: {error}") from error
    if not isinstance(extractor, Extractor):
        raise ValueError(f"features: {spec} returned a {type(extractor).__name__}; allowed: an Extractor")
    return extractor


class ClipImages:
    """Images to normalised CLIP embeddings, resized and normalised as preprocessor_config.json says, on the device."""

    def __init__(self, folder: str, device: torch.device):
        import transformers

        from examples.encoders.text import read_json

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"clip: {folder} has no config.json; allowed: a folder with a CLIP model of transformers")
        self.model = transformers.CLIPModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
        self.tokenizer = None
        self.folder, self.device, self.size = folder, device, self.model.config.vision_config.image_size
        settings = read_json(Path(folder) / "preprocessor_config.json") or {}
        # Where there is no such file: the values that OpenAI's models were trained with.
        mean = settings.get("image_mean", [0.48145466, 0.4578275, 0.40821073])
        std = settings.get("image_std", [0.26862954, 0.26130258, 0.27577711])
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255) / 255
        out = self.model.vision_model(pixel_values=(x - self.mean) / self.std)
        return F.normalize(self.model.visual_projection(out.pooler_output), dim=-1)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        import transformers

        self.tokenizer = self.tokenizer or transformers.AutoTokenizer.from_pretrained(self.folder)
        length = self.model.config.text_config.max_position_embeddings
        embedded = []
        for i in range(0, len(captions), 256):
            inputs = self.tokenizer(
                captions[i : i + 256], padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).to(self.device)
            out = self.model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            embedded.append(F.normalize(self.model.text_projection(out.pooler_output), dim=-1))
        return torch.cat(embedded)
