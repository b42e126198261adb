"""Triton's interpreter as the tests use it: rounding to bfloat16 and float8 as a GPU does, and twice as fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def patch_interpreter() -> None:
    """Patches the interpreter for the whole process; written against Triton 3.7."""
    from triton.runtime import interpreter

    _round_to_nearest(interpreter)
    _prepare_the_language_once(interpreter)


def _round_to_nearest(interpreter: Any) -> None:
    """Whatever rounding a cast to bfloat16 asks for, the interpreter cuts off the lower half of a float32; and a float8
    whose fraction is rounded up to the next power of two it halves.

    What it computes then says little about what a GPU would.
    """
    import triton.language as tl

    original = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _prepare_the_language_once(interpreter: Any) -> None:
    """The interpreter prepares triton.language again for each function that a kernel calls: half of its time.

    A kernel's launch has done so already, except for what the language's own functions see, which stays prepared.
    """
    import triton.language as tl

    prepared: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if id(names) not in prepared:
            prepared.add(id(names))
            if any(value is tl.core for value in names.values()):
                interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
