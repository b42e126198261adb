"""What blocks with adaptive LayerNorm have in common, computed with the fused kernels.

    x ← x + gate_a · attn(norm_a(x)·(1 + scale_a) + shift_a)
    x ← x + gate_m · mlp(norm_m(x)·(1 + scale_m) + shift_m)

Shapes: x [B, L, D], shift, scale, gate [B, D]. B batch, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from opendit.kernels.gate_residual import gate_residual
from opendit.kernels.gate_residual_layernorm_modulate import gate_residual_layernorm_modulate
from opendit.kernels.layernorm_modulate import layernorm_modulate
from opendit.patch.core import Patched, autocast_dtype


class FusedAdaLN(Patched):
    """Base of mixins that hand a fused LayerNorm's output to a sublayer.

    Under autocast upstream hands on fp32, and the sublayer's first Linear casts it. Where the planner has seen that the
    sublayers do the same with an input that is cast already, the fused pass writes it so (`casts_for_linear`).
    """

    casts_for_linear: ClassVar[bool] = True

    def _modulated(self, x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x)·(1 + scale) + shift, for a sublayer."""
        return layernorm_modulate(
            x,
            shift,
            scale,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            out_dtype=self._sublayer_dtype(x),
            backend=self._kernel("layernorm_modulate"),
        )

    def _block(
        self,
        x: Tensor,
        modulation: Tensor,
        norm_a: nn.LayerNorm,
        attn: Callable[[Tensor], Tensor],
        norm_m: nn.LayerNorm,
        mlp: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The block; modulation [B, 6·D] holds shift, scale, gate for attn, then for mlp."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        y = attn(self._modulated(x, norm_a, shift_a, scale_a))
        x, h = gate_residual_layernorm_modulate(
            x,
            y,
            gate_a,
            shift_m,
            scale_m,
            weight=norm_m.weight,
            bias=norm_m.bias,
            eps=norm_m.eps,
            out_dtype=self._sublayer_dtype(x),
            backend=self._kernel("gate_residual_layernorm_modulate"),
        )
        return gate_residual(x, mlp(h), gate_m, backend=self._kernel("gate_residual"))

    def _sublayer_dtype(self, x: Tensor) -> torch.dtype | None:
        lower = autocast_dtype(x)
        return lower if lower is None or self.casts_for_linear else torch.float32


BLOCK_KERNELS = ("layernorm_modulate", "gate_residual_layernorm_modulate", "gate_residual")
