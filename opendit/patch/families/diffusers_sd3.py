"""diffusers' `SD3Transformer2DModel` (SD3, SD3.5), matched by its class. Blocks of two streams: `diffusers_joint.py`.

What its blocks have besides:

    attn2, in dual_attention_layers:  x ← x + gate_2 · attn2(LN(x)·(1 + scale_2) + shift_2), of the image's first x,
                                      after attn and before ff; nine vectors of [B, D] then, these three last
    the last block (context_pre_only): the text is normed by AdaLayerNormContinuous, read by attention, and ends there
    qk_norm:                           RMSNorm of each head of q and k, with weights for each stream

Shapes: image [B, L, D], text [B, Lt, D], temb [B, D]. Between blocks the model's own forward adds a ControlNet's output
and skips layers; both stay its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opendit.kernels.gate_residual import gate_residual
from opendit.patch.adaln import BLOCK_KERNELS
from opendit.patch.diffusers_joint import (
    ZERO,
    JointAttention,
    JointStandIn,
    Modulation,
    TwoStreams,
    changed,
    plan_continuous,
    unusual,
)
from opendit.patch.diffusers_parts import ATTENTION, comes_as, is_class, path, plan_feed_forward
from opendit.patch.planner import Planner, has, plain_layernorm
from opendit.patch.probe import Inputs, StandIn, reads_low_precision
from opendit.patch.registry import Family, Joint, Trait
from opendit.patch.spread import ChecksArguments

_MODEL = "diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel"
_BLOCK = "diffusers.models.attention.JointTransformerBlock"
PROCESSOR = "diffusers.models.attention_processor.JointAttnProcessor2_0"
_DUAL = "diffusers.models.normalization.SD35AdaLayerNormZeroX"


class FusedBlock(TwoStreams):
    """The block with LayerNorm+modulate and gate+residual+LayerNorm+modulate each in one pass, for each stream."""

    uses = BLOCK_KERNELS
    norm1: Any
    norm1_context: Any
    attn: nn.Module
    attn2: nn.Module | None
    norm2: nn.LayerNorm
    ff: nn.Module
    norm2_context: nn.LayerNorm | None
    ff_context: nn.Module | None
    context_pre_only: bool
    _chunk_size: int | None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        norms = [(self.norm1, _DUAL if _dual(self) else ZERO)]
        plain: list[Any] = [self.norm2]
        if not self.context_pre_only:
            norms.append((self.norm1_context, ZERO))
            plain.append(self.norm2_context)
        reason = None
        if self._chunk_size is not None:
            reason = "the feed-forward is chunked"
        elif changed(norms, *plain):
            reason = "something was put on or in place of its norms"
        elif unusual(hidden_states, encoder_hidden_states, temb):
            reason = "it was not given two streams and one row of condition per sample"
        if reason is not None:
            given = () if joint_attention_kwargs is None else (joint_attention_kwargs,)  # older ones take none
            return self._upstream(reason, hidden_states, encoder_hidden_states, temb, *given)
        image, text = self._as_stream(hidden_states), self._as_stream(encoder_hidden_states)
        return self._kept(self._run, image, text, temb, joint_attention_kwargs or {})

    def _run(self, image: Tensor, text: Tensor, c: Tensor, more: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        second = None
        if _dual(self):
            *six, shift_2, scale_2, gate_2 = self.norm1.linear(self.norm1.silu(c)).chunk(9, dim=1)
            of_image = Modulation(*six)
            h = self._modulated(image, self.norm1.norm, of_image.shift_a, of_image.scale_a)
            second = self._modulated(image, self.norm1.norm, shift_2, scale_2)
        else:
            h, of_image = self._begun(image, self.norm1, c)
        of_text = None
        if self.context_pre_only:
            h_text = self.norm1_context(text, c)
        else:
            h_text, of_text = self._begun(text, self.norm1_context, c)
        y, y_text = self.attn(hidden_states=h, encoder_hidden_states=h_text, **more)
        if second is not None:
            assert self.attn2 is not None
            image = gate_residual(image, y, of_image.gate_a, backend=self._kernel("gate_residual"))
            y, of_image = self.attn2(hidden_states=second, **more), of_image._replace(gate_a=gate_2)
        image = self._ended(image, y, of_image, self.norm2, self.ff)
        if of_text is None:
            return None, image
        assert self.norm2_context is not None
        assert self.ff_context is not None
        return self._ended(text, y_text, of_text, self.norm2_context, self.ff_context), image


class FusedBlockInFull(FusedBlock):
    """The same for sublayers that must be given upstream's fp32 under autocast."""

    casts_for_linear = False


class DispatchedJointAttention(JointAttention):
    """diffusers' Attention as `JointAttnProcessor2_0` computes it: of image and text, or of the image alone (attn2)."""

    text_first = False
    context_pre_only: bool | None
    processor: object
    to_out: nn.ModuleList
    to_add_out: nn.Module | None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        if path(type(self.processor)) != PROCESSOR:
            reason = f"its processor is now {type(self.processor).__name__}"
        elif attention_mask is not None or kwargs:
            reason = "a mask or other arguments were given"
        elif x.dim() != 3 or (text is not None and (text.dim() != 3 or len(text) != len(x))):
            reason = "its inputs are not [B, L, D]"
        elif text is None:
            return self._out(self._among(*self._image(x), (x.shape[1],)))
        else:
            out = self._among(*self._joined(self._image(x), self._text(text)), (x.shape[1], text.shape[1]))
            y, y_text = self._apart(out, x.shape[1])
            if not self.context_pre_only:
                assert self.to_add_out is not None
                y_text = self.to_add_out(y_text)
            return self._out(y), y_text
        return self._upstream(reason, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def _out(self, y: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](y))


class NoneBetweenBlocks(ChecksArguments):
    def _needs_all_tokens(self, given: dict[str, Any]) -> str | None:
        if given.get("block_controlnet_hidden_states") is not None:
            return "block_controlnet_hidden_states are added to all tokens between blocks"
        if 0 in (given.get("skip_layers") or ()):
            return "skip_layers leaves the first block out, which splits the tokens"
        return None


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}"
        if path(type(block)) != _BLOCK:
            planner.keep(name, f"it is a {path(type(block))}, not {_BLOCK}")
            continue
        _plan_block(planner, name, block)
        plan_joint_attention(planner, f"{name}.attn", block.attn)
        if getattr(block, "attn2", None) is not None:
            plan_joint_attention(planner, f"{name}.attn2", block.attn2)
        plan_feed_forward(planner, f"{name}.ff", block.ff)
        if block.context_pre_only:
            plan_continuous(planner, f"{name}.norm1_context", block.norm1_context)
        else:
            plan_feed_forward(planner, f"{name}.ff_context", block.ff_context)
    plan_continuous(planner, "norm_out", model.norm_out)


def _plan_block(planner: Planner, name: str, block: Any) -> None:
    ends, dual = block.context_pre_only, _dual(block)
    kinds = [(block.norm1, _DUAL if dual else ZERO), *([] if ends else [(block.norm1_context, ZERO)])]
    odd = [path(type(norm)) for norm, kind in kinds if path(type(norm)) != kind]
    if odd:
        planner.keep(name, f"its norms are not those of the class: {', '.join(odd)}")
        return
    plain = [*(norm.norm for norm, _ in kinds), block.norm2, *([] if ends else [block.norm2_context])]
    if not all(plain_layernorm(norm) for norm in plain):
        planner.keep(name, "its norms are not torch's LayerNorm over the last dimension")
    else:
        width = block.norm2.normalized_shape[0]
        single = [block.ff, *([] if ends else [block.ff_context]), *([block.attn2] if dual else [])]
        low = planner.once(reads_low_precision, block.attn, width, width) and all(
            planner.once(reads_low_precision, sublayer, width) for sublayer in single
        )
        stand_ins: dict[str, nn.Module] = {"attn": JointStandIn(width), "ff": StandIn(width)}
        if dual:
            stand_ins["attn2"] = JointStandIn(width)
        if not ends:
            stand_ins["ff_context"] = StandIn(width)
        bypassed = [m for norm, _ in kinds for m in (norm, norm.silu)]
        fused = planner.offer(
            name,
            block,
            FusedBlock if low else FusedBlockInFull,
            _what(ends, dual),
            [_inputs(3, width), _inputs(70, width)],
            bypassed=(*bypassed, *plain),
            stand_ins=stand_ins,
        )
        if fused:
            planner.keep(name, "in parts, not one function: image and text meet in its attention")


def _dual(block: Any) -> bool:
    return bool(getattr(block, "use_dual_attention", False))  # the attribute came with SD3.5


def _what(ends: bool, dual: bool) -> str:
    middle = "gate+residual, gate+residual+LayerNorm+modulate" if dual else "gate+residual+LayerNorm+modulate"
    streams = "of the image, where the text ends" if ends else "of image and text"
    return f"LayerNorm+modulate, {middle}, gate+residual: one pass each, {streams}"


def _inputs(length: int, width: int) -> Inputs:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        image, text = torch.randn(2, length, width, dtype=dtype), torch.randn(2, 4, width, dtype=dtype)
        return image, text, torch.randn(2, width, dtype=dtype)

    return make


def plan_joint_attention(planner: Planner, name: str, attn: Any) -> None:
    """Offers `DispatchedJointAttention` for diffusers' Attention with its joint processor, or says why not."""
    if not comes_as(planner, name, attn, ATTENTION, PROCESSOR):
        return
    width = attn.to_q.weight.shape[1]
    add_q_proj = getattr(attn, "add_q_proj", None)  # absent in older versions where it is None now
    added = None if add_q_proj is None else add_q_proj.weight.shape[1]

    def inputs(rows: int, length: int, others: int) -> Inputs:
        def make(dtype: torch.dtype) -> tuple[Any, ...]:
            x = torch.randn(rows, length, width, dtype=dtype)
            return (x,) if added is None else (x, torch.randn(rows, others, added, dtype=dtype))

        return make

    what = "q, k, v of image and text together" if added is not None else "q, k, v"
    planner.offer(
        name,
        attn,
        DispatchedJointAttention,
        f"{what} go to the chosen attention backend",
        [inputs(2, 5, 3), inputs(1, 133, 4)],
    )


FAMILY = Family(
    name="diffusers_sd3",
    describes="diffusers' SD3Transformer2DModel, SD3 and SD3.5; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has transformer_blocks", lambda m: has(m, "transformer_blocks")),
    ),
    plan=plan,
    blocks="transformer_blocks",
    spread=Joint(
        gather="proj_out",
        around=NoneBetweenBlocks,
        tokens=lambda model: (model.config.sample_size // model.config.patch_size) ** 2,
    ),
)
