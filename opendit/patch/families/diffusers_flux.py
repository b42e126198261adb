"""diffusers' `FluxTransformer2DModel`, matched by its class. Blocks of two streams (`diffusers_joint.py`), then of one.

    double:   as in `diffusers_joint.py`; q and k normalised and rotated before attention
    single:   x ← text and image tokens together;   h ← LN(x)·(1 + scale) + shift
              x ← x + gate · proj_out([attention(h), GELU(proj_mlp(h))])

    (shift, scale, gate) = linear(SiLU(c))
    rotated:  q ← q·cos + (−q₂, q₁, −q₄, q₃, …)·sin, in fp32, for each token by its place

Shapes: image [B, L, D], text [B, Lt, D], c [B, D], cos and sin [Lt + L, K], text first. Between blocks the model's own
forward adds a ControlNet's output; embeddings, of guidance too, and positions are its own as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opendit.kernels.gate_residual import gate_residual
from opendit.kernels.gelu import APPROXIMATIONS, gelu
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.core import hooked
from opendit.patch.diffusers_joint import (
    ZERO,
    Heads,
    JointAttention,
    JointStandIn,
    TwoStreams,
    changed,
    plan_continuous,
    unusual,
)
from opendit.patch.diffusers_parts import is_class, path, plan_feed_forward, told_how
from opendit.patch.planner import Planner, has, plain_layernorm
from opendit.patch.probe import Inputs, StandIn, reads_low_precision
from opendit.patch.registry import Family, Joint, Trait
from opendit.patch.spread import ChecksArguments

_FILE = "diffusers.models.transformers.transformer_flux"
_MODEL, _BLOCK, _SINGLE = (
    f"{_FILE}.{name}" for name in ("FluxTransformer2DModel", "FluxTransformerBlock", "FluxSingleTransformerBlock")
)
ATTENTION, _PROCESSOR = f"{_FILE}.FluxAttention", f"{_FILE}.FluxAttnProcessor"
_ZERO_SINGLE = "diffusers.models.normalization.AdaLayerNormZeroSingle"
_LARGEST = 65504  # of fp16; upstream keeps the residual stream finite in it

Rotation = tuple[Tensor, Tensor]


class FusedBlock(TwoStreams):
    """The block of two streams with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass."""

    uses = BLOCK_KERNELS
    norm1: Any
    norm1_context: Any
    attn: nn.Module
    norm2: nn.LayerNorm
    ff: nn.Module
    norm2_context: nn.LayerNorm
    ff_context: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        reason = None
        if changed([(self.norm1, ZERO), (self.norm1_context, ZERO)], self.norm2, self.norm2_context):
            reason = "something was put on or in place of its norms"
        elif unusual(hidden_states, encoder_hidden_states, temb):
            reason = "it was not given two streams and one row of condition per sample"
        if reason is not None:
            return self._upstream(
                reason, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        image, text = self._as_stream(hidden_states), self._as_stream(encoder_hidden_states)
        return self._kept(self._run, image, text, temb, image_rotary_emb, joint_attention_kwargs or {})

    def _run(
        self, image: Tensor, text: Tensor, c: Tensor, rotation: Rotation | None, more: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        h, of_image = self._begun(image, self.norm1, c)
        h_text, of_text = self._begun(text, self.norm1_context, c)
        y, y_text, *adapted = self.attn(
            hidden_states=h, encoder_hidden_states=h_text, image_rotary_emb=rotation, **more
        )
        image = self._ended(image, y, of_image, self.norm2, self.ff)
        if adapted:  # of IP-Adapters
            image = image + adapted[0]
        text = self._ended(text, y_text, of_text, self.norm2_context, self.ff_context)
        return _finite(text), image


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class FusedSingle(FusedAdaLN):
    """The block of one stream with LayerNorm+modulate, GELU, and gate+residual each in one pass."""

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
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        reason = None
        if changed([(self.norm, _ZERO_SINGLE)]):
            reason = "something was put on or in place of its norm"
        elif type(self.act_mlp) is not nn.GELU or hooked(self.act_mlp):
            reason = "something was put on or in place of its activation"
        elif unusual(hidden_states, encoder_hidden_states, temb):
            reason = "it was not given two streams and one row of condition per sample"
        if reason is not None:
            return self._upstream(
                reason, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        text = encoder_hidden_states.shape[1]
        x = self._as_stream(torch.cat([encoder_hidden_states, hidden_states], 1))
        x = self._kept(self._run, x, text, temb, image_rotary_emb, joint_attention_kwargs or {})
        return x[:, :text], x[:, text:]

    def _run(self, x: Tensor, text: int, c: Tensor, rotation: Rotation | None, more: dict[str, Any]) -> Tensor:
        shift, scale, gate = self.norm.linear(self.norm.silu(c)).chunk(3, dim=1)
        h = self._modulated(x, self.norm.norm, shift, scale)
        if self._opendit_sequence is not None:
            more = {**more, "opendit_lengths": (text, x.shape[1] - text)}
        y = self.attn(hidden_states=h, image_rotary_emb=rotation, **more)
        m = gelu(self.proj_mlp(h), approximate=self.act_mlp.approximate, backend=self._kernel("gelu"))
        out = self.proj_out(torch.cat([y, m], 2))
        return _finite(gate_residual(x, out, gate, backend=self._kernel("gate_residual")))


class FusedSingleInFull(FusedSingle):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


def _finite(x: Tensor) -> Tensor:
    return x.clip(-_LARGEST, _LARGEST) if x.dtype == torch.float16 else x


class DispatchedJointAttention(JointAttention):
    """`FluxAttention` as its default processor computes it: of image and text, or of both in one sequence (single)."""

    text_first = True
    head_dim: int
    added_kv_proj_dim: int | None
    fused_projections: bool
    processor: object
    to_out: nn.ModuleList
    to_add_out: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
        opendit_lengths: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`opendit_lengths`: how much of one sequence is text and how much image, from a block that has parts only."""
        x, text, rotation, lengths = hidden_states, encoder_hidden_states, image_rotary_emb, opendit_lengths
        reason = _another_way(self.processor)
        if reason is not None:
            pass
        elif self.fused_projections:
            reason = "its projections are fused"
        elif attention_mask is not None or kwargs:
            reason = "a mask or other arguments were given"
        elif x.dim() != 3 or (text is not None and (text.dim() != 3 or len(text) != len(x))):
            reason = "its inputs are not [B, L, D]"
        elif (text is None) != (self.added_kv_proj_dim is None):
            reason = "its inputs are not those that it was built for"
        elif rotation is not None and not (len(rotation) == 2 and all(rows.dim() == 2 for rows in rotation)):
            reason = "its positions are not cos and sin [L, K]"
        elif text is None and lengths is None and self._in_parts_of_a_sequence():
            reason = "its block does not say how much of its input is text"
        elif text is None:
            return self._rotated_among(self._image(x), rotation, lengths or (x.shape[1],))
        else:
            out = self._rotated_among(
                self._joined(self._image(x), self._text(text)), rotation, (text.shape[1], x.shape[1])
            )
            y, y_text = self._apart(out, x.shape[1])
            return self.to_out[1](self.to_out[0](y)), self.to_add_out(y_text)
        return self._upstream(reason, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)

    def _head_shape(self) -> tuple[int, int]:
        return -1, self.head_dim

    def _rotated_among(self, heads: Heads, rotation: Rotation | None, lengths: tuple[int, ...]) -> Tensor:
        q, k, v = heads
        if rotation is not None:
            cos, sin = rotation
            if self._in_parts_of_a_sequence():
                cos, sin = self._rows_of_parts(cos, lengths), self._rows_of_parts(sin, lengths)
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return self._among(q, k, v, lengths)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, K] rotated by cos and sin [L, K], pair by pair of channels; computed in fp32, as upstream does."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    turned = torch.stack([-second, first], -1).flatten(-2)
    cos, sin = (rows.to(x.device)[None, :, None] for rows in (cos, sin))
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _another_way(processor: object) -> str | None:
    """Why attention is not computed by the default processor on diffusers' default backend."""
    if path(type(processor)) != _PROCESSOR:
        return f"its processor is now {type(processor).__name__}"
    return "diffusers was told an attention backend or a parallel layout for it" if told_how(processor) else None


class NoneBetweenBlocks(ChecksArguments):
    def _needs_all_tokens(self, given: dict[str, Any]) -> str | None:
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if given.get(name) is not None:
                return f"{name} are added to all tokens between blocks"
        return None


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}"
        if path(type(block)) != _BLOCK:
            planner.keep(name, f"it is a {path(type(block))}, not {_BLOCK}")
            continue
        _plan_block(planner, name, block)
        plan_joint_attention(planner, f"{name}.attn", block.attn)
        plan_feed_forward(planner, f"{name}.ff", block.ff)
        plan_feed_forward(planner, f"{name}.ff_context", block.ff_context)
    for i, block in enumerate(model.single_transformer_blocks):
        name = f"single_transformer_blocks.{i}"
        if path(type(block)) != _SINGLE:
            planner.keep(name, f"it is a {path(type(block))}, not {_SINGLE}")
            continue
        _plan_single(planner, name, block)
        plan_joint_attention(planner, f"{name}.attn", block.attn)
    plan_continuous(planner, "norm_out", model.norm_out)


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    adaptive = (block.norm1, block.norm1_context)
    odd = [path(type(norm)) for norm in adaptive if path(type(norm)) != ZERO]
    if odd:
        planner.keep(name, f"its norms are not those of the class: {', '.join(odd)}")
        return
    plain = (*(norm.norm for norm in adaptive), block.norm2, block.norm2_context)
    if not all(plain_layernorm(norm) for norm in plain):
        planner.keep(name, "its norms are not torch's LayerNorm over the last dimension")
    else:
        width = block.norm2.normalized_shape[0]
        low = planner.once(reads_low_precision, block.attn, width, width) and all(
            planner.once(reads_low_precision, sublayer, width) for sublayer in (block.ff, block.ff_context)
        )
        fused = planner.offer(
            name,
            block,
            FusedBlock if low else FusedBlockInFull,
            "LayerNorm+modulate, gate+residual+LayerNorm+modulate, gate+residual: one pass each, of image and text",
            [_inputs(3, width), _inputs(70, width)],
            bypassed=(*adaptive, *(norm.silu for norm in adaptive), *plain),
            stand_ins={"attn": JointStandIn(width), "ff": StandIn(width), "ff_context": StandIn(width)},
        )
        if fused:
            planner.keep(name, "in parts, not one function: image and text meet in its attention")


def _plan_single(planner: Planner, name: str, block: Any) -> None:
    norm = block.norm
    if path(type(norm)) != _ZERO_SINGLE:
        planner.keep(name, f"its norm is a {path(type(norm))}, not {_ZERO_SINGLE}")
    elif not plain_layernorm(norm.norm):
        planner.keep(name, "its norm is not torch's LayerNorm over the last dimension")
    elif type(block.act_mlp) is not nn.GELU or block.act_mlp.approximate not in APPROXIMATIONS:
        planner.keep(name, f"its activation is {block.act_mlp}, not torch's GELU")
    else:
        width = norm.norm.normalized_shape[0]
        low = all(planner.once(reads_low_precision, m, width) for m in (block.attn, block.proj_mlp))
        fused = planner.offer(
            name,
            block,
            FusedSingle if low else FusedSingleInFull,
            "LayerNorm+modulate, GELU, gate+residual: one pass each",
            [_inputs(3, width), _inputs(70, width)],
            bypassed=(norm, norm.silu, norm.norm, block.act_mlp),
            stand_ins={"attn": JointStandIn(width)},
        )
        if fused:
            planner.keep(name, "in parts, not one function: its attention and its MLP stand side by side")


def _inputs(length: int, width: int) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        image, text = torch.randn(2, length, width, dtype=dtype), torch.randn(2, 4, width, dtype=dtype)
        return image, text, torch.randn(2, width, dtype=dtype), _rotation(length + 4, 6)

    return make


def _rotation(length: int, head_dim: int) -> Rotation:
    """Different for each token and channel; fp32, as the model makes them."""
    angles = torch.randn(length, head_dim)
    return angles.cos(), angles.sin()


def plan_joint_attention(planner: Planner, name: str, attn: Any) -> None:
    """Offers `DispatchedJointAttention` for a `FluxAttention` with its default processor, or says why not."""
    if path(type(attn)) != ATTENTION:
        planner.keep(name, f"it is a {path(type(attn))}, not {ATTENTION}")
        return
    reason = _another_way(attn.processor)
    if reason is not None:
        planner.keep(name, reason.replace("is now", "is"))
        return
    width, head_dim, joint = attn.to_q.weight.shape[1], attn.head_dim, attn.added_kv_proj_dim is not None

    def inputs(rows: int, length: int, others: int) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            x, text = torch.randn(rows, length, width, dtype=dtype), None
            if joint:
                text = torch.randn(rows, others, attn.add_q_proj.weight.shape[1], dtype=dtype)
            return x, text, None, _rotation(length + (others if joint else 0), head_dim)

        return make

    planner.offer(
        name,
        attn,
        DispatchedJointAttention,
        f"q, k, v of image and text together{'' if joint else ', in one sequence,'} go to the chosen attention backend",
        [inputs(2, 5, 3), inputs(1, 133, 4)],
    )


FAMILY = Family(
    name="diffusers_flux",
    describes="diffusers' FluxTransformer2DModel; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait(
            "it has transformer_blocks and single_transformer_blocks",
            lambda m: has(m, "transformer_blocks", "single_transformer_blocks"),
        ),
    ),
    plan=plan,
    blocks=("transformer_blocks", "single_transformer_blocks"),
    spread=Joint(gather="proj_out", around=NoneBetweenBlocks),
)
