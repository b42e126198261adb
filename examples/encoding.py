"""From a batch of the data to what the model takes: x0, pixels or latents, and the condition; and back to pixels.

A batch has "pixels" [B, …, 3, H, W] in [−1, 1], or "mean" and "std" of latents that were computed before; and "label"
[B], "caption", or "text" [B, S, E], "text_mask" [B, S] and "pooled" [B, P] that were computed before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.words import Words

Batch = dict[str, Any]


class Encoder:
    """The frozen networks around the model; each is loaded when it is needed first.

    Args:
        vae: a VAE's name or folder; None for pixels.
        text_encoder: a text encoder's name or folder, or "words"; None for class labels.
        architecture: of the model, which decides how it is given texts.
        classes: their names, which are the captions of data without any.
        text_length: tokens per caption, where it is not the text encoder's own.
    """

    def __init__(
        self,
        vae: str | None,
        text_encoder: str | None,
        architecture: str,
        classes: Sequence[str],
        device: torch.device,
        text_length: int | None = None,
    ):
        self.text_length = text_length
        self.vae_name, self.text_name, self.architecture = vae, text_encoder, architecture
        self.classes, self.device = list(classes), device
        self._vae: Any = None
        self._texts: Any = None

    @property
    def vae(self) -> Any:
        if self._vae is None:
            from examples.encoders import load_vae

            self._vae = load_vae(self.vae_name, self.device, torch.float32)
        return self._vae

    @property
    def texts(self) -> Any:
        if self._texts is None:
            if self.text_name == "words":
                self._texts = Words(self.device)
            else:
                from examples.encoders import load_text_encoder

                self._texts = load_text_encoder(self.text_name, self.device, torch.float32, self.text_length)
        return self._texts

    @torch.no_grad()
    def x0(self, batch: Batch, noise: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """What the model learns to generate. `noise(shape)` draws what the posterior is sampled with, [B, *shape]."""
        if "mean" in batch:
            mean, std = (batch[name].to(self.device, non_blocking=True) for name in ("mean", "std"))
        elif self.vae_name is None:
            return batch["pixels"].to(self.device, non_blocking=True)
        else:
            mean, std = self.vae.encode(batch["pixels"].to(self.device, non_blocking=True))
        return mean + std * noise(mean.shape[1:])

    def pixels(self, x: Tensor) -> Tensor:
        return x if self.vae_name is None else self.vae.decode(x).clamp(-1, 1)

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        if self.text_name is None:
            label = batch["label"] if "label" in batch else torch.zeros(len(batch["id"]), dtype=torch.long)
            return {"y": label.to(self.device, non_blocking=True)}
        if "pooled" in batch:
            given = (batch[name].to(self.device, non_blocking=True) for name in ("text", "text_mask", "pooled"))
            return self._arguments(*given)
        return self.captions(self.captions_of(batch))

    def captions_of(self, batch: Batch) -> list[str]:
        if "caption" in batch:
            return list(batch["caption"])
        if "label" not in batch:
            raise ValueError("--text_encoder: the data has neither captions nor classes to take for captions")
        return [self.classes[label] for label in batch["label"]]

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of texts."""
        return self._arguments(*self.texts.encode(list(texts)))

    def labels(self, labels: Sequence[int]) -> dict[str, Tensor]:
        return {"y": torch.tensor(labels, device=self.device)}

    def _arguments(self, tokens: Tensor, mask: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        if self.architecture == "PixArt":
            return {"y": tokens.float(), "mask": mask}
        return {"text_embedding" if self.architecture == "Latte" else "y": pooled.float()}


def take_networks(args: Any, data: Any) -> None:
    """Latents bring the networks that they were made with: sets `args.vae` and `args.text_length`.

    Raises ValueError where `args` names others, or a text encoder for latents without text. Other data changes nothing.
    """
    args.text_length = None
    made = getattr(data, "settings", None)
    if made is None:
        return
    for name in ("vae", "text_encoder"):
        asked, used = getattr(args, name), made[name]
        if asked is None or (used is not None and _same_network(asked, used)):
            continue
        if used is None:
            raise ValueError(
                f"--text_encoder {asked}: the latents in {data.folder} were made without; leave it out, or run "
                "preprocess with it"
            )
        raise ValueError(f"--{name} {asked}: the latents in {data.folder} were made with {used}. Give the same")
    args.vae = args.vae or made["vae"]
    if args.text_encoder:
        args.text_length = made.get("text_length")


def _same_network(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def model_config(args: Any, data: Any, encoder: Encoder, learn_sigma: bool, sizes: dict[str, Any]) -> dict[str, Any]:
    """{"architecture", "model": its constructor's arguments}, from the settings and the first sample."""
    item = data[0]
    shape = item["mean"].shape if "mean" in item else item["pixels"].shape
    channels, side, frames = shape[-3], shape[-1], shape[0]
    if "mean" in item and encoder.vae.channels != channels:  # loaded now: samples are decoded at the end
        raise ValueError(f"--vae {encoder.vae_name}: has {encoder.vae.channels} channels, the latents {channels}")
    if "pixels" in item and encoder.vae_name is not None:
        latents = encoder.vae.encode(item["pixels"][None])[0]
        channels, side, frames = latents.shape[-3], latents.shape[-1], latents.shape[1]
    changed = {"depth": args.depth, "hidden_size": args.hidden_size, "num_heads": args.num_heads}
    model = {
        **sizes,
        **{name: value for name, value in changed.items() if value},
        "input_size": side,
        "in_channels": channels,
        "learn_sigma": learn_sigma,
        "class_dropout_prob": args.label_drop,
    }
    if len(shape) == 4:
        model["num_frames"] = frames
    if encoder.text_name is None:
        known = max(1, len(data.classes))
        model["num_classes"] = args.num_classes or known
        if model["num_classes"] < known:
            raise ValueError(f"--num_classes {args.num_classes}: the data has {known} classes")
    else:
        tokens, pooled = (item["text"], item["pooled"]) if "pooled" in item else encoder.texts.encode([""])[::2]
        model["text_dim"] = (tokens if encoder.architecture == "PixArt" else pooled).shape[-1]
        if encoder.architecture == "Latte":
            model["extras"] = 78
        if encoder.architecture == "PixArt":
            model["max_tokens"] = max(120, tokens.shape[-2])  # sentence encoders pad to more
    return {"architecture": encoder.architecture, "model": model}
