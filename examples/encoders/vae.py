"""Autoencoders by name or folder, all with one face: pixels in [−1, 1] ↔ latents ready for a diffusion model.

    z = (latent − mean_c) · scale / std_c,   and its inverse before decoding

with what the VAE's own configuration says: `scaling_factor` and `shift_factor` (Stable Diffusion, FLUX, CogVideoX),
`latents_mean` and `latents_std` per channel (Wan, Mochi, LTX), or TAEF2's measured ones. An image VAE takes a clip
frame by frame; a video VAE compresses time as well.

A sample's result must not depend on what else is in its batch, not in a bit, but kernels choose their order of
summation by shape. So batches go through the network in chunks of one size, the last one padded; on a CPU, where the
order may differ from place to place in a batch as well, one by one.

Shapes: images [B, 3, H, W] ↔ [B, C, h, w]; clips [B, T, 3, H, W] ↔ [B, T', C, h, w].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.encoders.taef2 import Taef2


class Vae:
    """`channels` C, `factor` H / h, `is_video`; `name` says which one it is in indices and reports."""

    def __init__(
        self, model: nn.Module, name: str, *, shift: Any, scale: Any, device: torch.device, dtype: torch.dtype
    ):
        self.model = model.to(device).eval().requires_grad_(False)
        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.is_video = any(isinstance(module, nn.Conv3d) for module in model.modules())
        self.chunk = 1 if self.is_video or self.device.type == "cpu" else 8  # clips, or images
        self.shift, self.scale = (self._per_channel(value) for value in (shift, scale))
        probe = self.encode(torch.zeros(1, *(1,) * self.is_video, 3, 64, 64))[0]
        self.channels, self.factor = probe.shape[-3], 64 // probe.shape[-1]

    def _per_channel(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.device).view(-1, 1, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (0 where there is no posterior) in the latent units above, fp32."""
        if self.is_video and pixels.ndim != 5:
            raise ValueError(f"pixels: got shape {tuple(pixels.shape)}; {self.name} takes clips [B, T, 3, H, W]")
        mean, std = self._in_chunks(self._encode, pixels)
        return (mean - self.shift) * self.scale, std * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [−1, 1], fp32, not clamped."""
        return self._in_chunks(self._decode, latents.to(self.device).float() / self.scale + self.shift)[0]

    def frames_kept(self, num_frames: int) -> int:
        """How many of a clip's frames come back: video VAEs with causal time silently drop those that fill no step."""
        if not self.is_video:
            return num_frames
        return self.decode(self.encode(torch.zeros(1, num_frames, 3, 64, 64))[0]).shape[1]

    def _in_chunks(self, compute: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        frames = x.shape[:2] if x.ndim == 5 and not self.is_video else None
        x = (x.flatten(0, 1) if frames else x).to(self.device, self.dtype)
        if self.is_video:
            x = x.transpose(1, 2)  # diffusers' order: channels, then time
        parts = []
        for chunk in x.split(self.chunk):
            missing = self.chunk - len(chunk)
            padded = torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]) if missing else chunk
            parts.append([out[: len(chunk)].float() for out in compute(padded)])
        whole = tuple(torch.cat(outs) for outs in zip(*parts, strict=True))
        if self.is_video:
            whole = tuple(out.transpose(1, 2) for out in whole)
        return tuple(out.unflatten(0, frames) for out in whole) if frames else whole

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, Taef2):
            mean = self.model.encode((pixels + 1) / 2)
            return mean, torch.zeros_like(mean)
        encoded = self.model.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean, encoded.latent_dist.std
        return encoded[0], torch.zeros_like(encoded[0])

    def _decode(self, latents: Tensor) -> tuple[Tensor]:
        if isinstance(self.model, Taef2):
            return (self.model.decode(latents) * 2 - 1,)
        return (self.model.decode(latents).sample,)


def load_vae(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """A folder or a hub name of one of diffusers' autoencoders or pipelines, or a folder in TAEF2's layout."""
    device, folder = torch.device(device), Path(name)
    config_file = folder / "config.json"
    if config_file.is_file() and "TAEF2" in str(json.loads(config_file.read_text()).get("name")):
        model, config = Taef2.load(folder)
        scale = 1 / torch.tensor(config["latent_std"])
        return Vae(model.to(dtype), "TAEF2", shift=config["latent_mean"], scale=scale, device=device, dtype=dtype)

    config, place = read_config(name, "vae", "VAE")
    import diffusers

    kind = config.get("_class_name", "")
    found = getattr(diffusers, kind, None) if kind.startswith("Autoencoder") else None
    if found is None or kind == "AutoencoderKLFlux2":  # its latents are normalised by a BatchNorm on packed 2×2 tokens
        raise ValueError(
            f"vae: {name} is a {kind or 'model without a class'}; allowed: diffusers' Autoencoder… classes"
        )
    model = found.from_pretrained(name, use_safetensors=True, torch_dtype=dtype, **place)
    scale = torch.tensor(float(config.get("scaling_factor") or 1.0))
    shift: Any = config.get("shift_factor") or 0.0
    # In the configuration or, with LTX, in buffers of the model.
    known = {**dict(model.named_buffers()), **{key: value for key, value in config.items() if value is not None}}
    mean, std = known.get("latents_mean"), known.get("latents_std")
    if mean is not None and std is not None:
        shift, scale = mean, scale / torch.as_tensor(std, dtype=torch.float32).cpu()
    return Vae(model, f"{kind} {name}", shift=shift, scale=scale, device=device, dtype=dtype)


def read_config(name: str | Path, subfolder: str, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json of a local folder or a hub name, there or in `subfolder`; the latter as an argument to load with."""
    folder = Path(name)
    argument = "vae" if what == "VAE" else "text_encoder"
    if folder.is_dir():
        for place in ({}, {"subfolder": subfolder}):
            file = folder / place.get("subfolder", "") / "config.json"
            if file.is_file():
                return json.loads(file.read_text()), place
        raise ValueError(f"{argument}: {folder} has no config.json, nor has its sub-folder {subfolder}")
    if folder.is_absolute() or str(name).startswith("."):
        raise ValueError(f"{argument}: the folder {folder} does not exist")
    for place in ({}, {"subfolder": subfolder}):
        if (found := _from_hub(str(name), place, argument)) is not None:
            return found, place
    raise ValueError(f"{argument}: {name} on the hub has no config.json, nor has its sub-folder {subfolder}")


def _from_hub(name: str, place: dict[str, str], argument: str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(name, "config.json", **place)).read_text())
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{argument}: {name} is no folder here, and the hub did not give it: {first}") from error
