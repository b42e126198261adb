"""The `.pt` files of facebookresearch/DiT and Vchitect/Latte: torch archives, read without running anything of them.

    {"model": state dict, "ema": state dict, "opt": …, "args": argparse.Namespace}      a training run's
    state dict                                                                          published weights

torch's reader with `weights_only=True` builds tensors and containers and calls nothing else. The name
argparse.Namespace is let in for an inert class of ours that stands in its place, so not even that class of the
standard library is made; its content is thrown away. Archives must be zip files whose entries are stored as they are:
torch writes no others, and one that was compressed could unfold into any size.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opendit.checkpoint import jsonfile
from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError


class _Arguments:
    """Stands for argparse.Namespace."""


def read(path: Path, which: str | None) -> dict[str, Tensor]:
    """The state dict in `path`: of a training run's, "ema" or "model", by default the first that is there.

    Raises `DamagedCheckpointError` for what is no archive of tensors, `CheckpointError` where it has no `which`.
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, each meaning that this is no such file
        first = str(error).strip().partition("\n")[0]
        raise DamagedCheckpointError(
            f"{path}: is no archive of tensors alone; nothing of it was run ({first})"
        ) from error
    if not isinstance(found, Mapping):
        raise DamagedCheckpointError(f"{path}: holds {type(found).__name__}, not a state dict")
    present = [name for name in ("ema", "model") if isinstance(found.get(name), Mapping)]
    if which is not None and which not in present:
        raise CheckpointError(
            f"which: got {which!r}; allowed for {path.name}: {present or 'None, it is one state dict'}"
        )
    return checked(found[which or present[0]] if present else found, path)


def checked(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The state dict, if it is names and plain tensors."""
    for name, value in state.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise DamagedCheckpointError(
                f"{path}: {str(name)[:80]!r} is {type(value).__name__}; allowed: plain tensors by name"
            )
    return {name: value.detach() for name, value in state.items()}


def _check_archive(path: Path) -> None:
    with jsonfile.open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise DamagedCheckpointError(f"{path}: is no archive of torch ({error})") from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or len({entry.filename for entry in entries}) < len(entries) or sum(e.file_size for e in entries) > size:
        raise DamagedCheckpointError(
            f"{path}: is no archive of torch (compressed, a name twice, or larger than its file)"
        )
