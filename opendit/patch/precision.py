"""The model's forward in a chosen precision: a mixin around the root, with fp32 parameters.

    bf16, fp16    torch's autocast inside the forward; what comes out is fp32 again, like the model's own
    fp32          autocast off inside the forward, whatever the caller switched on

fp16's gradients are scaled where they enter the model, and scaled back where they leave it:

    output        identity forward; backward dout·S, in fp32, before it is rounded to fp16
    inputs        identity forward; backward dx/S, for inputs that need gradients
    parameters    `opendit/loss_scale.py`

S is found when the backward runs, by the module's identity, in `SCALES`; a copy of the model is not in there, and is
not scaled. Both ends are operators, so that `torch.compile` traces through them and reads S anew each time.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from opendit.patch.core import Edit, Patched, logger
from opendit.patch.planner import Planner


class Scale(Protocol):
    """What the backward needs of a loss scale."""

    def current(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(S, 1/S), scalars on `device`."""


# By `id` of the model; whoever puts one in takes it out when the model goes.
SCALES: dict[int, Scale] = {}
_unscaled: set[int] = set()


class Autocast(Patched):
    """Around the root's forward: computes in `dtype`."""

    dtype: ClassVar[torch.dtype]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if kind is None:
            kind = next(cast(nn.Module, self).parameters()).device.type
        with torch.autocast(kind, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            out = cast(Any, super()).forward(*args, **kwargs)
        return out.float() if isinstance(out, Tensor) and low(out) else tree_map(_widened, out)


class Bf16(Autocast):
    dtype = torch.bfloat16


class Fp32(Autocast):
    dtype = torch.float32


class Fp16(Autocast):
    dtype = torch.float16

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        key = id(self)

        def leaves(x: Any) -> Any:
            return gradient_leaves(x, key) if isinstance(x, Tensor) and x.requires_grad else x

        def enters(x: Any) -> Any:
            return gradient_enters(x, key) if isinstance(x, Tensor) and x.requires_grad else x

        args, kwargs = tree_map(leaves, args), tree_map(leaves, kwargs)
        return tree_map(enters, super().forward(*args, **kwargs))


# fp8 is bf16 here; which products are of 8 bits is the blocks' business (opendit/patch/block.py).
MIXINS: dict[str, type[Autocast]] = {"bf16": Bf16, "fp16": Fp16, "fp32": Fp32, "fp8": Bf16}


def plan_precision(planner: Planner, model: nn.Module, precision: str) -> None:
    """Puts the mixin of `precision` around the root's forward.

    Raises `ValueError` where parameters are not fp32: they are the masters, and nothing keeps the bits that they lack.
    """
    if precision == "inherit":
        return
    wrong = [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
    if wrong:
        dtype = str(model.get_parameter(wrong[0]).dtype).removeprefix("torch.")
        raise ValueError(
            f"precision: got {precision!r}, but {len(wrong)} parameters are not fp32, such as {wrong[0]} in {dtype}; "
            f"allowed: fp32 parameters, which the optimizer updates, while the forward computes in {precision}. Call "
            "model.float() first, or leave precision at 'inherit'"
        )
    mixin = MIXINS[precision]
    lower = "bf16" if precision == "fp8" else precision
    what = {"fp32": "autocast off in its forward"}.get(precision, f"its forward under {lower} autocast, fp32 out")
    for i, edit in enumerate(planner.edits):
        if edit.fqn == "":
            planner.edits[i] = Edit("", edit.mixin, f"{edit.what}; {what}", (mixin, *edit.around))
            return
    planner.edits.append(Edit("", mixin, what))


def low(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and low(x) else x


def _scaled(gradient: Tensor, key: int, which: int) -> Tensor:
    scale = SCALES.get(key)
    if scale is not None:
        return gradient * scale.current(gradient.device)[which].to(gradient.dtype)
    if key not in _unscaled:
        _unscaled.add(key)
        logger.log(
            logging.WARNING,
            "precision='fp16' in a backward without loss scaling: small gradients are lost. Give accelerate the "
            "optimizer, or call opendit.attach(model, optimizer)",
        )
    return gradient.clone()


@torch.library.custom_op("opendit::gradient_enters", mutates_args=())
def gradient_enters(x: Tensor, key: int) -> Tensor:
    """A copy of `x`, whose gradient is multiplied by the scale of the model `key`."""
    return x.clone()


@torch.library.custom_op("opendit::gradient_leaves", mutates_args=())
def gradient_leaves(x: Tensor, key: int) -> Tensor:
    """A copy of `x`, whose gradient is divided by the scale of the model `key`."""
    return x.clone()


@torch.library.custom_op("opendit::scaled_gradient", mutates_args=())
def _scaled_gradient(gradient: Tensor, key: int, which: int) -> Tensor:
    return _scaled(gradient, key, which)


def _like(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _keep_key(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.key = inputs[1]


def _enter(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _scaled_gradient(gradient, ctx.key, 0), None


def _leave(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _scaled_gradient(gradient, ctx.key, 1), None


for _operator in (gradient_enters, gradient_leaves, _scaled_gradient):
    _operator.register_fake(_like)
gradient_enters.register_autograd(_enter, setup_context=_keep_key)
gradient_leaves.register_autograd(_leave, setup_context=_keep_key)
