"""Checks in fp64 of models that compute in fp32 whatever they are given.

Some forwards write `x.float()` or `x.to(torch.float32)` around a norm or a rotation, so that bf16 weights do not lower
it. Given fp64 they round to fp32, and nothing can be compared beyond seven digits. Under `keeping_doubles()` a cast of
fp64 to fp32 gives fp64: the formula is the same, without the rounding, in forwards and in what checkpointing computes
again. For comparisons only; it is a mode of this thread, no patch, and torch.compile can't trace through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.overloadpacket is torch.ops.aten.to:  # in inference mode, where it has not been taken apart yet
            with self:
                return func.decompose(*args, **kwargs)
        cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if cast and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def keeping_doubles(enabled: bool = True) -> AbstractContextManager[Any]:
    """A context in which casts to fp32 leave fp64 as it is."""
    return _Keeping() if enabled else nullcontext()  # type: ignore[no-untyped-call]


def at_least_float(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it comes so."""
    return x if x.dtype == torch.float64 else x.float()
