"""Checks in fp64 of models that compute in fp32 whatever they are given.

Some forwards write `x.float()` or `x.to(torch.float32)` around a norm or a rotation, so that bf16 weights do not lower
it. Given fp64 they round to fp32, and nothing can be compared beyond seven digits. Under `keeping_doubles()` an fp64
tensor that is cast so is that tensor: the formula is the same, without the rounding. For comparisons only; it is a mode
of this thread, no patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Keeping(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        lowers = func is Tensor.float or (func is Tensor.to and torch.float32 in args[1:])
        if lowers and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def keeping_doubles(enabled: bool = True) -> AbstractContextManager[Any]:
    """A context in which casts to fp32 leave fp64 as it is."""
    return _Keeping() if enabled else nullcontext()


def at_least_float(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it comes so."""
    return x if x.dtype == torch.float64 else x.float()
