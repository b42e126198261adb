"""The FlashAttention packages: telling whether they are really there, and calling them.

They are imported on first use only. q [B, Lq, H, K], k and v [B, Lk, H, K], as everywhere in this package.
"""

import importlib
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

_INSTALL_FLASH_ATTN = "pip install flash-attn --no-build-isolation"
_INSTALL_FLASH_ATTN_4 = 'pip install "flash-attn-4>=4.0.0b30"'  # betas only so far: the bare name finds nothing


@cache
def flash_attn_problem() -> str | None:
    """Why flash-attn (FlashAttention 2) cannot be used, with the install line; None if it can."""
    # `import flash_attn` proves nothing: flash-attn-4 alone leaves an empty namespace package of that name.
    return _problem(
        "flash-attn",
        _INSTALL_FLASH_ATTN,
        {"flash_attn:flash_attn_func": "q k v dropout_p softmax_scale deterministic"},
    )


@cache
def flash_attn_4_problem() -> str | None:
    """Why flash-attn-4 cannot be used, with the install line; None if it can."""
    # The backward is private to the package, and betas change it; written against 4.0.0b30 and 4.0.0b36.
    return _problem(
        "flash-attn-4",
        _INSTALL_FLASH_ATTN_4,
        {
            "flash_attn.cute:flash_attn_func": "q k v softmax_scale deterministic return_lse",
            "flash_attn.cute.interface:_flash_attn_bwd": ("q k v out dout lse softmax_scale deterministic dq dk dv"),
        },
    )


def _problem(package: str, install: str, wanted: Mapping[str, str]) -> str | None:
    """Why the functions `wanted` {"module:function": "parameters"} cannot be called; None if they can."""
    for where, parameters in wanted.items():
        module, name = where.split(":")
        try:
            found = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        except Exception as error:  # a package that is there but broken fails in many ways; all are told
            return (
                f"package {package} is not usable (`from {module} import {name}`: {type(error).__name__}: {error}); "
                f"install it with: {install}"
            )
        missing = [parameter for parameter in parameters.split() if parameter not in found]
        if missing:
            return (
                f"the installed {package} has an interface opendit does not know ({module}.{name} has no "
                f"{', '.join(missing)}); install another release with: {install}"
            )
    return None


def run_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """FlashAttention 2. It registers operators of its own, so this traces under torch.compile as it is."""
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def run_flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """FlashAttention 4: in eager the package's own autograd function, under torch.compile the operators below."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.compiler.is_compiling():
        return _forward(q, k, v, scale)[0]
    from flash_attn.cute import flash_attn_func

    with _device_of(q):
        result = flash_attn_func(
            q, k, v, softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled()
        )
    # Releases so far return (out, lse) whether or not the lse was asked for.
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """FA4 launches on the current device, wherever its tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# torch.compile cannot trace the package, so its forward and backward are two operators. They return fresh contiguous
# tensors whatever the strides of their inputs: that is what the fakes promise.


@torch.library.custom_op("opendit::flash_attn_4", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, K], logarithm of each query's softmax denominator [B, H, Lq] in fp32)."""
    from flash_attn.cute import flash_attn_func

    with torch.no_grad(), _device_of(q):
        out, lse = flash_attn_func(q, k, v, softmax_scale=scale, return_lse=True)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, Lq, H, _K = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Lq), dtype=torch.float32)


@torch.library.custom_op("opendit::flash_attn_4_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes and dtypes of q, k, v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    # Given to it because it would lay them out like q, k, v.
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.no_grad(), _device_of(q):
        _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, deterministic=deterministic, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    # dlse is zero: the lse never leaves this module.
    return (*_backward(dout, *ctx.saved_tensors, ctx.scale), None)


_forward.register_autograd(_gradient, setup_context=_save)
