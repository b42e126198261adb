"""What blocks with adaptive LayerNorm have in common, computed with the fused kernels.

    x ← x + gate_a · attn(norm_a(x)·(1 + scale_a) + shift_a)
    x ← x + gate_m · mlp(norm_m(x)·(1 + scale_m) + shift_m)

Shapes: x [B, L, D], shift, scale, gate [B, D]. B batch, L tokens, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opendit.attention import choose_backend, two_pass
from opendit.fastseq import Sequence, in_block
from opendit.kernels import fp8
from opendit.kernels.backend import resolve
from opendit.kernels.gate_residual import gate_residual
from opendit.kernels.gate_residual_layernorm_modulate import gate_residual_layernorm_modulate
from opendit.kernels.layernorm_modulate import layernorm_modulate
from opendit.patch.block import Static, adaln_block
from opendit.patch.core import Patched, autocast_dtype, hooked
from opendit.patch.parts import AttentionParts, MlpParts, parts_of, plain_linear

Sublayer = Callable[[Tensor], Tensor]
Ada = nn.Module | tuple[nn.Module, ...]


class FusedAdaLN(Patched):
    """Base of mixins that hand a fused LayerNorm's output to a sublayer.

    Under autocast upstream hands on fp32, and the sublayer's first Linear casts it. Where the planner has seen that the
    sublayers do the same with an input that is cast already, the fused pass writes it so (`casts_for_linear`).
    """

    casts_for_linear: ClassVar[bool] = True
    # How a block can be computed: "parts", "whole"; nothing for what is no block.
    ways: ClassVar[tuple[str, ...]] = ()

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
        self, x: Tensor, c: Tensor, ada: Ada, norm_a: nn.LayerNorm, attn: Any, norm_m: nn.LayerNorm, mlp: Any
    ) -> Tensor:
        """The block; `ada` maps c [B, C] to [B, 6·D]: shift, scale, gate for attn, then for mlp."""
        lower = autocast_dtype(x)
        if lower is not None:
            x = self._stream(x, lower)
        whole = self._whole(x, lower, c, ada, norm_a, attn, norm_m, mlp)
        if whole is not None:
            return whole
        if isinstance(ada, tuple):
            for module in ada:
                c = module(c)
        else:
            c = ada(c)
        return self._kept(self._in_parts, x, c, norm_a, attn, norm_m, mlp)

    def _stream_in_parts(self, x: Tensor, *args: Any) -> Tensor:
        """`_in_parts` for a block that can be nothing else: `_block`, given the modulation."""
        return self._kept(self._in_parts, self._as_stream(x), *args)

    def _kept(self, run: Callable[..., Any], *args: Any) -> Any:
        """What `run` makes of the block, keeping for its backward what was asked for."""
        if self._opendit_keep == "full" and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)

    def _as_stream(self, x: Tensor) -> Tensor:
        """x in the dtype of the residual stream."""
        lower = autocast_dtype(x)
        return x if lower is None else self._stream(x, lower)

    def _stream(self, x: Tensor, lower: torch.dtype) -> Tensor:
        """x in the dtype that was asked for the residual stream under autocast."""
        if self._opendit_residual == "fp32":
            return x.float()
        if self._opendit_residual == "bf16":
            if lower == torch.bfloat16:
                return x.to(lower)
            self._note(f"the residual stream stays {x.dtype}: autocast computes in {lower}, which bf16 is no part of")
        return x

    def _in_parts(
        self,
        x: Tensor,
        modulation: Tensor,
        norm_a: nn.LayerNorm,
        attn: Sublayer,
        norm_m: nn.LayerNorm,
        mlp: Sublayer,
        cross: Sublayer | None = None,
    ) -> Tensor:
        """`cross`: a sublayer between the two that is neither modulated nor gated, x ← x + cross(x)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        y = attn(self._modulated(x, norm_a, shift_a, scale_a))
        if cross is not None:
            x = gate_residual(x, y, gate_a, backend=self._kernel("gate_residual"))
            y = cross(x)
            # Added with a gate of one, it shares the pass of the norm. In y's dtype: no wider than upstream's sum.
            gate_a = y.new_ones(gate_a.shape)
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

    def _whole(
        self,
        x: Tensor,
        lower: torch.dtype | None,
        c: Tensor,
        ada: Ada,
        norm_a: nn.LayerNorm,
        attn: Any,
        norm_m: nn.LayerNorm,
        mlp: Any,
    ) -> Tensor | None:
        """The block as one function, or None where it is to be computed in parts."""
        forced = self._opendit_fusion == "block"
        if self._opendit_fusion == "adaln" or (not forced and x.device.type != "cuda"):
            return None
        attn_parts, mlp_parts = parts_of(attn), parts_of(mlp)
        if not isinstance(attn_parts, AttentionParts):
            return self._not_whole(f"attention: {attn_parts}")
        if not isinstance(mlp_parts, MlpParts):
            return self._not_whole(f"MLP: {mlp_parts}")
        modules = tuple(ada) if type(ada) is nn.Sequential and not hooked(ada) else ada
        if not (
            isinstance(modules, tuple)
            and [type(m) for m in modules] == [nn.SiLU, nn.Linear]
            and not hooked(modules[0])
            and isinstance(last := modules[1], nn.Linear)
            and plain_linear(last)
        ):
            return self._not_whole("its modulation is not SiLU and torch's own Linear")
        dtype = lower or attn_parts.proj.weight.dtype
        reason = self._why_in_parts(x, dtype, norm_a, norm_m)
        if reason is not None:
            return self._not_whole(reason)
        B, L, D = x.shape
        inner = attn_parts.proj.in_features
        shape = (B, L, attn_parts.heads, inner // attn_parts.heads)
        sequence = self._opendit_sequence
        if sequence is not None and sequence.in_attention:
            reason = _why_spread_in_parts(sequence, attn_parts.heads)
            if reason is not None:
                return self._not_whole(reason)
            shape = in_block.seen(*shape, sequence)
        else:
            sequence = None
        backend = choose_backend(attn_parts.backend, x.device, dtype, shape)
        refusal = two_pass.refuses(backend, x.device, dtype, shape, torch.is_grad_enabled())
        if refusal is not None:
            return self._not_whole(f"attention: {refusal}")
        if not two_pass.paired(backend, x.device) and (not forced or torch.compiler.is_compiling()):
            return self._not_whole(f"attention: {backend} has no backward of its own")
        groups: list[list[Tensor]] = []
        for linears in ((last,), attn_parts.qkv, (attn_parts.proj,), (mlp_parts.fc1,), (mlp_parts.fc2,)):
            groups.append([linear.weight for linear in linears])
            groups.append([linear.bias for linear in linears if linear.bias is not None])
        if lower is None and any(t.dtype != dtype for t in (x, c, *(p for group in groups for p in group))):
            return self._not_whole("its inputs and parameters are not of one dtype")
        if len(groups[3]) not in (0, len(groups[2])):
            return self._not_whole("q, k and v have not all a bias, or none")
        static = Static(
            heads=attn_parts.heads,
            eps_a=norm_a.eps,
            eps_m=norm_m.eps,
            tanh=mlp_parts.tanh,
            attention=backend,
            keep=self._opendit_keep,
            dtype=dtype,
            counts=tuple(len(group) for group in groups),
            fp8=self._opendit_fp8 and self._in_fp8(x, dtype, D, 3 * inner, mlp_parts.fc1.out_features),
            wide=lower is not None and x.dtype == lower and self._opendit_residual == "bf16",
            sequence=sequence,
        )
        return adaln_block(x, c, groups, static, self._opendit_graphs)

    def _why_in_parts(self, x: Tensor, dtype: torch.dtype, norm_a: nn.LayerNorm, norm_m: nn.LayerNorm) -> str | None:
        names = (*BLOCK_KERNELS, "gelu")
        if x.numel() == 0:
            return "it is empty"
        double = x.dtype == torch.float64 or dtype == torch.float64
        if any(resolve(self._kernel(n), n, x.device, x.shape[-1], double) != "triton" for n in names):
            return "its kernels are not all triton's"
        if not self.casts_for_linear:
            return "its sublayers must be given fp32 under autocast"
        if any(p is not None for norm in (norm_a, norm_m) for p in (norm.weight, norm.bias)):
            return "its norms have weights of their own"
        if self._opendit_fusion == "auto" and dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in {dtype}, where torch's attention has no separate backward"
        if torch.promote_types(x.dtype, dtype) != x.dtype:
            return f"a {x.dtype} residual with {dtype} sublayers"
        return None

    def _in_fp8(self, x: Tensor, dtype: torch.dtype, *widths: int) -> bool:
        """Whether the block's products are of 8 bits, where that was asked for."""
        reason = fp8.unavailable(x.device, widths)
        if dtype != torch.bfloat16:
            reason = f"they give bf16, and the block computes in {dtype}"
        if reason is not None:
            self._note(f"no products in 8 bits: {reason}", logging.WARNING)
        return reason is None

    def _not_whole(self, reason: str) -> Tensor | None:
        # Speed apart, nothing is lost by it; but of 8 bits nothing is left.
        self._note(f"fused in parts, not as a whole: {reason}", logging.WARNING if self._opendit_fp8 else logging.INFO)
        return None

    def _sublayer_dtype(self, x: Tensor) -> torch.dtype | None:
        lower = autocast_dtype(x)
        return lower if lower is None or self.casts_for_linear else torch.float32


def _why_spread_in_parts(sequence: Sequence, heads: int) -> str | None:
    if sequence.method not in in_block.METHODS:
        return f"attention: the method {sequence.method} is a module's, not a block's"
    if heads < sequence.size:
        return f"attention: some of {sequence.size} processes have none of its {heads} heads"
    if torch.compiler.is_compiling():
        return "attention: torch.compile is given the collectives one by one"
    return None


BLOCK_KERNELS = ("layernorm_modulate", "gate_residual_layernorm_modulate", "gate_residual")
