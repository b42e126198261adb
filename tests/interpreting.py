"""Makes Triton's interpreter round to bfloat16 as a GPU does.

Whatever rounding a cast asks for, Triton 3.7's interpreter cuts off the lower half of a float32, which doubles the
error: what it computes then says little about what a GPU would.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def round_bfloat16_to_nearest() -> None:
    """Patches the interpreter's conversion between float32 and bfloat16, for the whole process."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
