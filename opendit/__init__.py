"""opendit: fused kernels and attention for Diffusion Transformers, applied to the model you already have."""

__version__ = "0.1.0"
