"""Parameters and buffers in a lower dtype for sampling, and the values that came in, for `restore`.

The parameters stay the same objects; their `data` is replaced. What came in is kept in host memory (on a CPU: as it
is), outside the model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

logger = logging.getLogger("opendit")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Original(NamedTuple):
    value: Tensor
    low: torch.dtype  # what it was rounded to
    version: int  # of the rounded one, before anyone else wrote to it


_originals: WeakKeyDictionary[nn.Module, dict[str, _Original]] = WeakKeyDictionary()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


@torch.no_grad()
def lower(model: nn.Module, weights: str) -> None:
    """Rounds what is fp32 or fp64, as `model.to(dtype)` does. weights: a key of DTYPES; else nothing is done."""
    dtype = DTYPES.get(weights)
    if dtype is None:
        return
    found: dict[str, _Original] = {}
    _originals[model] = found
    for name, tensor in _tensors(model):
        if tensor.dtype in (torch.float32, torch.float64):
            original = tensor.data
            kept = original.cpu()  # first, so that nothing is rounded that can't be given back
            _set(tensor, original, tensor.device, dtype)
            found[name] = _Original(kept, dtype, _version(tensor))


def _set(tensor: Tensor, value: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Gives `tensor` a value of another dtype; one of inference mode stays so, for torch tells them apart by flags."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.data = value.to(device, dtype)


def _version(tensor: Tensor) -> int:
    """How often it was written to."""
    return 0 if tensor.is_inference() else tensor._version


def _is_ours(tensor: Tensor, kept: _Original) -> bool:
    """Whether `tensor` is still what `kept` was rounded to, on whatever device and in whatever dtype it is now.

    Versions tell writes in place that left the value; values tell `p.data = …`, `p.data.copy_(…)` and
    `load_state_dict(assign=True)`, which no version counts.
    """
    if _version(tensor) != kept.version or tensor.shape != kept.value.shape:
        return False
    if tensor.is_meta or kept.value.is_meta:
        return tensor.is_meta  # without values there is nothing to compare
    rounded = kept.value.to(kept.low).to(tensor.dtype)
    return torch.allclose(tensor.data.cpu(), rounded, rtol=0, atol=0, equal_nan=True)


def check(model: nn.Module, weights: str) -> None:
    """Raises `ValueError` where `give_back` could not give back all that `lower(model, weights)` rounded."""
    if weights in DTYPES and model not in _originals:
        raise ValueError(
            f"model: it is a copy of one whose weights were rounded to {weights}, and what they were is with the "
            "original; allowed: the model that accelerate was given. Copy that before accelerate"
        )
    gone = _originals.get(model, {}).keys() - dict(_tensors(model)).keys()
    if gone:
        raise ValueError(
            f"model: {sorted(gone)[0]} was replaced since accelerate rounded it; allowed: the parameters that came in. "
            "Take off what replaced it first"
        )


@torch.no_grad()
def give_back(model: nn.Module) -> None:
    """Undoes `lower`, where it was done: to the bit, but for what was written to since, which keeps its new values."""
    tensors = dict(_tensors(model))
    written = 0
    for name, kept in _originals.pop(model, {}).items():
        tensor = tensors[name]
        is_ours = _is_ours(tensor, kept)
        written += not is_ours
        _set(tensor, kept.value if is_ours else tensor.data, tensor.device, kept.value.dtype)
    if written:
        logger.warning("%d tensors were written to while weights were rounded; they keep their new values", written)
