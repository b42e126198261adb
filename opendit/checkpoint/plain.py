"""Plain Python values as JSON, and back to exactly what they were.

JSON has no tuples, infinities, bytes, or keys other than strings. They are written as {"!": kind, "is": value}:

    (1, 2)              {"!": "tuple", "is": [1, 2]}
    float("inf")        {"!": "float", "is": "inf"}
    {3: 4}              {"!": "dict", "is": [[3, 4]]}
    a tensor            {"!": "tensor", "is": its name}, the tensor itself being kept elsewhere

Anything else is refused by name: what can't be read back exactly is not written.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from typing import Any

from torch import Tensor

from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError

_KIND = "!"


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` for JSON; tensors in it are added to `tensors` under names that begin with `name`."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_KIND: "float", "is": repr(value)}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "is": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"{name}: two tensors would have this name; rename one of the keys that lead to it")
        tensors[name] = value
        return {_KIND: "tensor", "is": name}
    if type(value) is list:
        return [encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if type(value) is tuple:
        return {_KIND: "tuple", "is": [encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if type(value) in (dict, OrderedDict, Counter):
        if type(value) is not Counter and all(isinstance(k, str) and k != _KIND for k in value):
            return {k: encode(v, f"{name}.{k}", tensors) for k, v in value.items()}
        pairs = [[encode(k, name, {}), encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {_KIND: "counter" if type(value) is Counter else "dict", "is": pairs}
    raise CheckpointError(
        f"{name}: got {type(value).__module__}.{type(value).__qualname__}; allowed: None, bool, int, float, str, "
        "bytes, tensors, and lists, tuples and dicts of them. Nothing is pickled: turn it into these first"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `encode` was given. Raises `DamagedCheckpointError` for what `encode` never wrote."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {k: decode(v, tensors) for k, v in value.items()}
    kind: Any = value[_KIND]
    content: Any = value.get("is")
    try:
        if kind == "float":
            return float(content)
        if kind == "bytes":
            return base64.b64decode(content, validate=True)
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(decode(v, tensors) for v in content)
        if kind in ("dict", "counter"):
            pairs = {decode(k, tensors): decode(v, tensors) for k, v in content}
            return Counter(pairs) if kind == "counter" else pairs
    except (TypeError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"index: {kind} can't be {content!r}") from error
    raise DamagedCheckpointError(f"index: holds a value of the unknown kind {kind!r}")
