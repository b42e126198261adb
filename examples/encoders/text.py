"""Frozen text encoders by name or folder: captions → one vector per token, and one vector per caption.

| config.json's model_type | tokens | pooled |
|---|---|---|
| clip, clip_text_model | CLIP's text transformer, last layer after its norm | at the end-of-text token |
| t5, mt5, umt5 | T5's encoder | mean over the caption's tokens |
| bert, mpnet, roberta, … (sentence-transformers) | last layer | mean, or the first token where 1_Pooling says so |

Each caption is encoded once: those met lately are remembered. They go through in chunks of one shape, on a CPU one by
one, so that a caption's embedding does not depend, to the bit, on those beside it; vae.py says why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.encoders.vae import read_config

CLIP, T5 = ("clip", "clip_text_model"), ("t5", "mt5", "umt5")
# Longer captions are cut. T5's is what PixArt trained with; sentence encoders were trained with 128.
LENGTHS = {**dict.fromkeys(CLIP, 77), **dict.fromkeys(T5, 120)}


class TextEncoder:
    """`width` E of the tokens, `pooled_width` P, `length` L: every caption is padded to it."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, *, pooling: str, normalize: bool, length: int):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name, self.pooling, self.normalize, self.length = name, pooling, normalize, length
        self.device = next(model.parameters()).device
        self.chunk = 1 if self.device.type == "cpu" else 8
        self.remembered: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        tokens, _, pooled = self.encode([""])
        self.width, self.pooled_width = tokens.shape[-1], pooled.shape[-1]

    def encode(self, captions: Sequence[str], remember: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens fp32 [B, L, E], their mask bool [B, L], pooled fp32 [B, P]."""
        known = {caption: self.remembered[caption] for caption in captions if caption in self.remembered}
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if new:
            for start in range(0, len(new), self.chunk):
                chunk = new[start : start + self.chunk]
                encoded = self._encode(chunk + [""] * (self.chunk - len(chunk)))
                known |= zip(chunk, zip(*(out[: len(chunk)] for out in encoded), strict=True), strict=True)
            self.remembered |= {caption: known[caption] for caption in new}
            for caption in list(self.remembered)[: max(0, len(self.remembered) - remember)]:
                del self.remembered[caption]
        tokens, mask, pooled = zip(*(known[caption] for caption in captions), strict=True)
        return torch.stack(tokens), torch.stack(mask), torch.stack(pooled)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        mask = inputs["attention_mask"]
        out = self.model(input_ids=inputs["input_ids"], attention_mask=mask)
        tokens = out.last_hidden_state.float()
        if self.pooling == "pooler":
            pooled = out.pooler_output.float()
        elif self.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return tokens, mask.bool(), F.normalize(pooled, dim=-1) if self.normalize else pooled


def load_text_encoder(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    length: int | None = None,
) -> TextEncoder:
    """A folder or a hub name that transformers reads (or a pipeline's folder with text_encoder and tokenizer in it)."""
    import transformers

    config, place = read_config(name, "text_encoder", "text encoder")
    kind = config.get("model_type", "")
    classes = {**dict.fromkeys(CLIP, transformers.CLIPTextModel), **dict.fromkeys(T5[:2], transformers.T5EncoderModel)}
    classes["umt5"] = transformers.UMT5EncoderModel
    if not kind:
        raise ValueError(f"text_encoder: config.json of {name} names no model_type, so it is not one of transformers'")
    found = classes.get(kind, transformers.AutoModel)
    folder = Path(name) / place.get("subfolder", "")
    only_half = (folder / "model.fp16.safetensors").is_file() and not (folder / "model.safetensors").is_file()
    model = found.from_pretrained(
        name, dtype=dtype, use_safetensors=True, variant="fp16" if only_half else None, **place
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **({"subfolder": "tokenizer"} if place else {}))
    pooling = "pooler" if kind in CLIP else "mean"
    if (settings := read_json(Path(name) / "1_Pooling" / "config.json")) and settings.get("pooling_mode_cls_token"):
        pooling = "cls"
    normalize = any("Normalize" in str(module.get("type")) for module in read_json(Path(name) / "modules.json") or [])
    text_config = getattr(model.config, "text_config", model.config)
    longest = min(
        tokenizer.model_max_length, 10**6 if kind in T5 else getattr(text_config, "max_position_embeddings", 10**6)
    )
    length = length or min(LENGTHS.get(kind, 128), longest)
    if length > longest:
        raise ValueError(f"text_length: got {length}; {name} takes up to {longest} tokens")
    return TextEncoder(
        model.to(device), tokenizer, f"{kind} {name}", pooling=pooling, normalize=normalize, length=length
    )


def read_json(path: Path) -> Any:
    """What is in it, or None where there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None
