"""LayerNorms that no family's edit takes over: left to torch unless another kernel was asked for by name."""

from __future__ import annotations

import torch
from torch import nn

from opendit.kernels.layernorm import layernorm
from opendit.patch.core import Choices, Patched, autocast_dtype
from opendit.patch.planner import Planner, plain_layernorm
from opendit.patch.probe import Inputs


class FusedLayerNorm(Patched):
    """torch's LayerNorm through the `layernorm` kernel: x [..., D] → LN(x)·weight + bias."""

    uses = ("layernorm",)
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast runs torch's LayerNorm in fp32 and returns fp32; it leaves fp64 alone.
        out_dtype = torch.float32 if autocast_dtype(x) is not None else None
        return layernorm(
            x, self.weight, self.bias, eps=self.eps, out_dtype=out_dtype, backend=self._kernel("layernorm")
        )


def plan_norms(planner: Planner, model: nn.Module, choices: Choices) -> None:
    """Adds every remaining plain LayerNorm of `model` to the planner's edits, or to what it keeps."""
    wanted = choices.kernel("layernorm") in ("triton", "apex")
    for fqn, norm in model.named_modules():
        if not plain_layernorm(norm) or planner.took_over(norm):
            continue
        if not wanted:
            planner.keep(fqn, "a LayerNorm on its own stays torch's; kernels={'layernorm': 'triton'} replaces it")
            continue
        planner.offer(fqn, norm, FusedLayerNorm, "LayerNorm: one pass", _rows(norm.normalized_shape[0]))


def _rows(width: int) -> Inputs:
    return lambda dtype: (torch.randn(2, 3, width, dtype=dtype),)
