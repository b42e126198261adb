"""JSON files, read as if whoever wrote them meant harm: regular, of limited size, no key twice, no NaN or infinity."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from opendit.checkpoint.errors import DamagedCheckpointError, seen_as_damage

# The index of a model with 10⁵ tensors over 64 processes is below this.
LIMIT = 1 << 30


def open_plain(path: Path) -> BinaryIO:
    """`path` for reading, if it is a regular file and no link, pipe or device."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DamagedCheckpointError(
                f"{path}: is no regular file (a folder, link, pipe or device); nothing was read"
            )
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: can't be opened ({error.strerror})") from error


def read(path: Path, limit: int = LIMIT) -> Any:
    with open_plain(path) as file, seen_as_damage(path):
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedCheckpointError(f"{path}: is larger than the {limit} bytes that such a file may have")
    return parse(content, str(path))


def parse(content: bytes, name: str) -> Any:
    """The value of a JSON text; raises `DamagedCheckpointError` naming `name`."""
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{name}: is no JSON ({_short(error)})") from error


def text(value: Any) -> bytes:
    """The one text that we write for `value`."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # what is too large for a float would be infinity
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
