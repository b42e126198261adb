"""Frozen networks around the diffusion model: image and video autoencoders, text encoders."""

from examples.encoders.text import TextEncoder, load_text_encoder
from examples.encoders.vae import Vae, load_vae

__all__ = ["TextEncoder", "Vae", "load_text_encoder", "load_vae"]
