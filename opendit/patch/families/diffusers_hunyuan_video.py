"""diffusers' `HunyuanVideoTransformer3DModel`, matched by its class.

Blocks of two kinds, in two lists. Double ones modulate a video's tokens x and, with weights of its own, a text's e:

    (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = W·silu(c) + b
    x ← x + gate_a · y    (y, z) = attn(LN(x)·(1 + scale_a) + shift_a, LN(e)·(1 + scale_a') + shift_a'), z for e
    x ← x + gate_m · ff(LN(x)·(1 + scale_m) + shift_m)

Single ones see both as one sequence u = [x, e], with attention and MLP beside each other:

    (shift, scale, gate) = W·silu(c) + b;  h = LN(u)·(1 + scale) + shift
    u ← u + gate · proj_out([attn(h), gelu(proj_mlp(h))])

    attn:  q, k = RMSNorm of each head, x's rotated;  softmax(q·kᵀ/√K + mask)·v over both sequences

Shapes: x [B, L, D], e [B, Lt, D], c [B, D], mask [B, 1, 1, L + Lt], true where there is a token. B batch, L tokens of
the video, Lt of the text, D hidden, H heads, K head dim. What refines the text before the blocks is small and stays.
Over several processes the video's tokens are spread; every process has the whole text (`opendit/patch/joint.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opendit.attention import attend
from opendit.kernels.gate_residual import gate_residual
from opendit.kernels.gelu import gelu
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import autocast_dtype, hooked, untouched
from opendit.patch.diffusers_parts import is_class, path, plan_feed_forward, told_how
from opendit.patch.joint import JointStandIn, SpreadJointAttention, plan_joint_attention, read_low_precision
from opendit.patch.planner import Planner, has, plain_layernorm
from opendit.patch.probe import Inputs, StandIn
from opendit.patch.registry import Family, Spread, Trait
from opendit.patch.rotated import turned

_HERE = "diffusers.models.transformers.transformer_hunyuan_video"
_MODEL, _DOUBLE, _SINGLE, _PROCESSOR = (
    f"{_HERE}.{name}"
    for name in (
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
        "HunyuanVideoAttnProcessor2_0",
    )
)
_LISTS = ("transformer_blocks", "single_transformer_blocks")
_NORM = "diffusers.models.normalization.AdaLayerNormZero"
_SINGLE_NORM = "diffusers.models.normalization.AdaLayerNormZeroSingle"
_SHAPES = "it was not given two sequences [B, L, D] and a condition [B, C]"
_TOUCHED = "something was put on or in place of its norms or its activation"


class FusedDoubleBlock(FusedAdaLN):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass, of each sequence."""

    uses = BLOCK_KERNELS
    ways = ("parts",)
    norm1: Any
    norm1_context: Any
    attn: nn.Module
    norm2: nn.LayerNorm
    norm2_context: nn.LayerNorm
    ff: nn.Module
    ff_context: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        x, e = hidden_states, encoder_hidden_states
        reason = None if _two_sequences(x, e, temb) else _SHAPES
        ada = (self.norm1, self.norm1_context)
        odd = any(path(type(n)) != _NORM or n.emb is not None or hooked(n) or not untouched(n.norm) for n in ada)
        if odd or not untouched(self.norm2, self.norm2_context):
            reason = _TOUCHED
        if reason is not None:
            out: tuple[Tensor, Tensor] = self._upstream(reason, x, e, temb, attention_mask, freqs_cis, *args, **kwargs)
            return out
        lower = autocast_dtype(x)
        if lower is not None:
            x, e = self._stream(x, lower), self._stream(e, lower)
        both: Any = self._kept(self._in_parts, x, e, *(n.linear(n.silu(temb)) for n in ada), attention_mask, freqs_cis)
        return both

    def _in_parts(  # type: ignore[override]
        self, x: Tensor, e: Tensor, modulation: Tensor, of_text: Tensor, mask: Tensor | None, tables: Any
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        e_shift, e_scale, e_gate_a, e_shift_m, e_scale_m, e_gate_m = of_text.chunk(6, dim=1)
        h = self._modulated(x, self.norm1.norm, shift, scale)
        g = self._modulated(e, self.norm1_context.norm, e_shift, e_scale)
        y, z = self.attn(hidden_states=h, encoder_hidden_states=g, attention_mask=mask, image_rotary_emb=tables)
        x, h = self._gated_and_modulated(x, y, gate_a, self.norm2, shift_m, scale_m)
        e, g = self._gated_and_modulated(e, z, e_gate_a, self.norm2_context, e_shift_m, e_scale_m)
        backend = self._kernel("gate_residual")
        y, z = self.ff(h), self.ff_context(g)
        return gate_residual(x, y, gate_m, backend=backend), gate_residual(e, z, e_gate_m, backend=backend)


class FusedSingleBlock(FusedAdaLN):
    """The block with LayerNorm+modulate, GELU, gate+residual each in one pass."""

    uses = ("layernorm_modulate", "gelu", "gate_residual")
    ways = ("parts",)
    norm: Any
    attn: nn.Module
    proj_mlp: nn.Module
    act_mlp: nn.GELU
    proj_out: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        x, e, norm = hidden_states, encoder_hidden_states, self.norm
        reason = None if _two_sequences(x, e, temb) else _SHAPES
        odd = type(self.act_mlp) is not nn.GELU or hooked(self.act_mlp)
        if odd or path(type(norm)) != _SINGLE_NORM or hooked(norm) or not untouched(norm.norm):
            reason = _TOUCHED
        if reason is not None:
            out: tuple[Tensor, Tensor] = self._upstream(
                reason, x, e, temb, attention_mask, image_rotary_emb, *args, **kwargs
            )
            return out
        u, n = torch.cat([x, e], dim=1), e.shape[1]
        u = self._stream_in_parts(u, norm.linear(norm.silu(temb)), n, attention_mask, image_rotary_emb)
        return u[:, :-n], u[:, -n:]

    def _in_parts(  # type: ignore[override]
        self, u: Tensor, modulation: Tensor, n: int, mask: Tensor | None, tables: Any
    ) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=1)
        h = self._modulated(u, self.norm.norm, shift, scale)
        m = gelu(self.proj_mlp(h), approximate=self.act_mlp.approximate, backend=self._kernel("gelu"))
        both = self.attn(
            hidden_states=h[:, :-n], encoder_hidden_states=h[:, -n:], attention_mask=mask, image_rotary_emb=tables
        )
        y = self.proj_out(torch.cat([torch.cat(both, dim=1), m], dim=2))
        return gate_residual(u, y, gate, backend=self._kernel("gate_residual"))


class FusedDoubleBlockInFull(FusedDoubleBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class FusedSingleBlockInFull(FusedSingleBlock):
    """The same for an attention that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class JointAttention(SpreadJointAttention):
    """diffusers' Attention of video and text together, as HunyuanVideo's processor computes it, q, k, v dispatched.

    In double blocks the text has projections and norms of its own; in single blocks it shares the video's.
    """

    uses = ("attention",)
    processor: Any
    add_q_proj: nn.Module | None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        x, e, mask = hidden_states, encoder_hidden_states, attention_mask
        reason = None
        if path(type(self.processor)) != _PROCESSOR:
            reason = f"its processor is now {type(self.processor).__name__}"
        elif told_how(self.processor):
            reason = "diffusers was told an attention backend or a parallel layout for it"
        elif kwargs.keys() - {"image_rotary_emb"}:
            reason = "other arguments were given"
        elif e is None or x.dim() != 3 or e.dim() != 3 or not e.shape[1]:
            reason = "it was not given a video's and a text's tokens [B, L, D]"
        elif mask is not None and (mask.dim() != 4 or mask.dtype != torch.bool):
            reason = f"its mask is {list(mask.shape)} of {mask.dtype}"
        if reason is not None or e is None:
            out: tuple[Tensor, Tensor] = self._upstream(reason or "", x, e, mask, **kwargs)
            return out
        tables = kwargs.get("image_rotary_emb")

        def together(video: Sequence[Tensor], text: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
            both = attend(q, k, v, mask=mask, backend=self._opendit_attention).to(q.dtype)
            return both[:, : video[0].shape[1]], both[:, video[0].shape[1] :]

        text = self._of_text(e)
        if self._in_parts_of_a_sequence():
            y, z = self._spread_with_text(x, text, tables, together)
        else:
            q, k, v = self._project(x)
            q, k = self._normalise(q, k)
            q, k = (q, k) if tables is None else (turned(q, tables), turned(k, tables))
            y, z = (h.flatten(2) for h in together((q, k, v), text))
        to_out, to_add_out = getattr(self, "to_out", None), getattr(self, "to_add_out", None)
        if to_out is not None:
            y = to_out[1](to_out[0](y))
        return y, z if to_add_out is None else to_add_out(z)

    def _of_text(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, Lt, H, K] of the text, normalised."""
        if self.add_q_proj is None:
            q, k, v = self._project(e)
            return (*self._normalise(q, k), v)
        added: Any = self
        linears, norms = (
            (added.add_q_proj, added.add_k_proj, added.add_v_proj),
            (added.norm_added_q, added.norm_added_k),
        )
        q, k, v = (linear(e).unflatten(-1, (self.heads, -1)) for linear in linears)
        q, k = (h if norm is None else norm(h) for h, norm in zip((q, k), norms, strict=True))
        return q, k, v


def _two_sequences(x: Tensor, e: Tensor, c: Tensor) -> bool:
    return x.dim() == e.dim() == 3 and c.dim() == 2 and len(x) == len(e) == len(c) and e.shape[1] > 0


def plan(model: Any, planner: Planner) -> None:
    for blocks in _LISTS:
        for i, block in enumerate(getattr(model, blocks)):
            name, kind = f"{blocks}.{i}", path(type(block))
            if kind == _DOUBLE:
                _plan_double(planner, name, block)
            elif kind == _SINGLE:
                _plan_single(planner, name, block)
            elif "TokenReplace" in kind:
                planner.keep(name, "the first frame's tokens have a modulation of their own")
            else:
                planner.keep(name, f"it is a {kind}, neither {_DOUBLE} nor {_SINGLE}")
                continue
            plan_joint_attention(planner, f"{name}.attn", block.attn, JointAttention, _PROCESSOR, masked=True)
            for part in ("ff", "ff_context"):
                if hasattr(block, part):
                    plan_feed_forward(planner, f"{name}.{part}", getattr(block, part))
    planner.keep("context_embedder", "it refines the text, a few hundred tokens")
    planner.keep("norm_out", "once a forward; its norm and modulation run as they are")


def _plan_double(planner: Planner, name: str, block: Any) -> None:
    norms = (block.norm1, block.norm1_context)
    if any(path(type(n)) != _NORM or n.emb is not None or not plain_layernorm(n.norm) for n in norms):
        planner.keep(name, f"its norms are not {_NORM} of torch's LayerNorm")
    elif not plain_layernorm(block.norm2) or not plain_layernorm(block.norm2_context):
        planner.keep(name, "its norms are not torch's LayerNorm over the last dimension")
    else:
        width = block.norm2.normalized_shape[0]
        low = read_low_precision(planner, block.attn, width, block.ff, block.ff_context)
        fused = planner.offer(
            name,
            block,
            FusedDoubleBlock if low else FusedDoubleBlockInFull,
            "LayerNorm+modulate, gate+residual+LayerNorm+modulate, gate+residual: one pass each, of video and of text",
            [_inputs(3, 2, width), _inputs(70, 5, width)],
            bypassed=(*norms, *(n.norm for n in norms), block.norm2, block.norm2_context),
            stand_ins={"attn": JointStandIn(width), "ff": StandIn(width), "ff_context": StandIn(width)},
        )
        if fused:
            planner.keep(name, "in parts, not one function: two sequences with a modulation each")


def _plan_single(planner: Planner, name: str, block: Any) -> None:
    if path(type(block.norm)) != _SINGLE_NORM or not plain_layernorm(block.norm.norm):
        planner.keep(name, f"its norm is not {_SINGLE_NORM} of torch's LayerNorm")
    elif type(block.act_mlp) is not nn.GELU:
        planner.keep(name, f"its activation is {block.act_mlp}, not torch's GELU")
    else:
        width = block.norm.norm.normalized_shape[0]
        low = read_low_precision(planner, block.attn, width, block.proj_mlp)
        fused = planner.offer(
            name,
            block,
            FusedSingleBlock if low else FusedSingleBlockInFull,
            "LayerNorm+modulate, GELU, gate+residual: one pass each",
            [_inputs(3, 2, width), _inputs(70, 5, width)],
            bypassed=(block.norm, block.norm.norm, block.act_mlp),
            stand_ins={"attn": JointStandIn(width)},
        )
        if fused:
            planner.keep(name, "in parts, not one function: attention and MLP are beside each other")


def _inputs(length: int, text: int, width: int) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return *(torch.randn(2, n, width, dtype=dtype) for n in (length, text)), torch.randn(2, width, dtype=dtype)

    return make


FAMILY = Family(
    name="diffusers_hunyuan_video",
    describes="diffusers' HunyuanVideoTransformer3DModel; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has transformer_blocks and single_transformer_blocks", lambda m: has(m, *_LISTS)),
    ),
    plan=plan,
    blocks=_LISTS,
    spread=Spread(gather="proj_out", attention="attn", mlp="ff"),
)
