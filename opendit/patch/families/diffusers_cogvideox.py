"""diffusers' `CogVideoXTransformer3DModel`, 1.0 and 1.5, matched by its class.

Two sequences, a video's tokens x and a text's e, share LayerNorms, attention and feed-forward, and are modulated apart:

    (shift, scale, gate, shift', scale', gate') = W·silu(c) + b                  of norm1, and again of norm2
    [y', y] = attn1([LN(e)·(1 + scale') + shift', LN(x)·(1 + scale) + shift])    then ff of the same, of norm2
    x ← x + gate · y,  e ← e + gate' · y'                                        after each

    attn1:  q, k = LayerNorm of each head's x·W, of the video's tokens rotated;  softmax(q·kᵀ/√K)·v over both sequences

Shapes: x [B, L, D], e [B, Lt, D], c [B, C]. B batch, L tokens of the video, Lt of the text, D hidden, H heads, K head
dim. Over several processes the video's tokens are spread; every process has the whole text, and its heads of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opendit.kernels.gate_residual import gate_residual
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import autocast_dtype, hooked, untouched
from opendit.patch.diffusers_parts import is_class, path, plan_feed_forward
from opendit.patch.joint import JointStandIn, SpreadJointAttention, plan_joint_attention, read_low_precision
from opendit.patch.planner import Planner, has, plain_layernorm
from opendit.patch.probe import Inputs, StandIn
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.rotated import turned

_HERE = "diffusers.models.transformers.cogvideox_transformer_3d"
_MODEL, _BLOCK = f"{_HERE}.CogVideoXTransformer3DModel", f"{_HERE}.CogVideoXBlock"
_NORM = "diffusers.models.normalization.CogVideoXLayerNormZero"
_PROCESSOR = "diffusers.models.attention_processor.CogVideoXAttnProcessor2_0"


class FusedBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass, of each sequence."""

    uses = BLOCK_KERNELS
    ways = ("parts",)
    norm1: Any
    attn1: nn.Module
    norm2: Any
    ff: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, e = hidden_states, encoder_hidden_states
        reason = None
        if x.dim() != 3 or e.dim() != 3 or temb.dim() != 2 or not len(x) == len(e) == len(temb):
            reason = "it was not given two sequences [B, L, D] and a condition [B, C]"
        elif any(path(type(n)) != _NORM or hooked(n) or not untouched(n.norm) for n in (self.norm1, self.norm2)):
            reason = "something was put on or in place of its norms"
        if reason is not None:
            out: tuple[Tensor, Tensor] = self._upstream(reason, x, e, temb, image_rotary_emb, attention_kwargs)
            return out
        lower = autocast_dtype(x)
        if lower is not None:
            x, e = self._stream(x, lower), self._stream(e, lower)
        modulation = [norm.linear(norm.silu(temb)) for norm in (self.norm1, self.norm2)]
        both: Any = self._kept(self._in_parts, x, e, *modulation, image_rotary_emb, attention_kwargs or {})
        return both

    def _in_parts(  # type: ignore[override]
        self, x: Tensor, e: Tensor, modulation_a: Tensor, modulation_m: Tensor, tables: Any, more: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate, e_shift, e_scale, e_gate = modulation_a.chunk(6, dim=1)
        norm = self.norm1.norm
        h, g = self._modulated(x, norm, shift, scale), self._modulated(e, norm, e_shift, e_scale)
        y, z = self.attn1(hidden_states=h, encoder_hidden_states=g, image_rotary_emb=tables, **more)
        shift, scale, gate_m, e_shift, e_scale, e_gate_m = modulation_m.chunk(6, dim=1)
        x, h = self._gated_and_modulated(x, y, gate, self.norm2.norm, shift, scale)
        e, g = self._gated_and_modulated(e, z, e_gate, self.norm2.norm, e_shift, e_scale)
        z, y = self.ff(torch.cat([g, h], dim=1)).split([g.shape[1], h.shape[1]], dim=1)
        backend = self._kernel("gate_residual")
        return gate_residual(x, y, gate_m, backend=backend), gate_residual(e, z, e_gate_m, backend=backend)


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class JointAttention(SpreadJointAttention):
    """diffusers' Attention of text and video together, as CogVideoX's processor computes it, q, k, v dispatched."""

    uses = ("attention",)
    processor: object
    to_out: nn.ModuleList

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        x, e = hidden_states, encoder_hidden_states
        tables = kwargs.get("image_rotary_emb")
        reason = None
        if path(type(self.processor)) != _PROCESSOR:
            reason = f"its processor is now {type(self.processor).__name__}"
        elif attention_mask is not None or kwargs.keys() - {"image_rotary_emb"}:
            reason = "a mask or other arguments were given"
        elif e is None or x.dim() != 3 or e.dim() != 3:
            reason = "it was not given a video's and a text's tokens [B, L, D]"
        elif tables is not None and any(table.dim() != 2 for table in tables):
            reason = "its rotary positions are not two tables [L, K]"
        if reason is not None or e is None:
            out: tuple[Tensor, Tensor] = self._upstream(reason or "", x, e, attention_mask, **kwargs)
            return out
        if self._in_parts_of_a_sequence():
            q, k, v = self._project(e)
            y, z = self._spread_with_text(x, (*self._normalise(q, k), v), tables, self._together)
            return self._out(y), self._out(z)
        q, k, v = self._project(torch.cat([e, x], dim=1))
        q, k = self._normalise(q, k)
        if tables is not None:
            q, k = (torch.cat([h[:, : e.shape[1]], turned(h[:, e.shape[1] :], tables)], dim=1) for h in (q, k))
        both = self._out(self._attend(q, k, v).flatten(2))
        return both[:, e.shape[1] :], both[:, : e.shape[1]]

    def _together(self, video: Sequence[Tensor], text: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, video, strict=True))
        both, n = self._attend(q, k, v), text[0].shape[1]
        return both[:, n:], both[:, :n]

    def _out(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out[1](self.to_out[0](x))
        return out


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}"
        if path(type(block)) != _BLOCK:
            planner.keep(name, f"it is a {path(type(block))}, not {_BLOCK}")
            continue
        _plan_block(planner, name, block)
        plan_joint_attention(planner, f"{name}.attn1", block.attn1, JointAttention, _PROCESSOR, masked=False)
        plan_feed_forward(planner, f"{name}.ff", block.ff)


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    norms = (block.norm1, block.norm2)
    if any(path(type(norm)) != _NORM or not plain_layernorm(norm.norm) for norm in norms):
        planner.keep(name, f"its norms are not {_NORM} of torch's LayerNorm")
        return
    width, C = block.norm1.norm.normalized_shape[0], block.norm1.linear.in_features
    low = read_low_precision(planner, block.attn1, width, block.ff)

    def inputs(length: int, text: int) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            x, e = (torch.randn(2, n, width, dtype=dtype) for n in (length, text))
            return x, e, torch.randn(2, C, dtype=dtype)

        return make

    fused = planner.offer(
        name,
        block,
        FusedBlock if low else FusedBlockInFull,
        "LayerNorm+modulate, gate+residual+LayerNorm+modulate, gate+residual: one pass each, of video and of text",
        [inputs(3, 2), inputs(70, 5)],
        bypassed=(*norms, *(norm.norm for norm in norms)),
        stand_ins={"attn1": JointStandIn(width), "ff": StandIn(width)},
    )
    if fused:
        planner.keep(name, "in parts, not one function: two sequences with a modulation each")


def _tokens(model: Any) -> int:
    c = model.config
    frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
    frames = -(-frames // (c.patch_size_t or 1))
    return int(frames * (c.sample_height // c.patch_size) * (c.sample_width // c.patch_size))


FAMILY = Family(
    name="diffusers_cogvideox",
    describes="diffusers' CogVideoXTransformer3DModel, 1.0 and 1.5; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has transformer_blocks", lambda m: has(m, "transformer_blocks")),
    ),
    plan=plan,
    blocks="transformer_blocks",
    spread=Spread(gather="proj_out", attention="attn1", mlp="ff", tokens=_tokens),
)
