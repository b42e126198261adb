"""Ranges of tensors in safetensors files, written whole and read range by range.

A shard holds one-dimensional tensors: elements [start, stop) of the tensor of that name in the index.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opendit.checkpoint import disk, jsonfile, manifest
from opendit.checkpoint.division import check_whole
from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError
from opendit.pieces import Piece

# Up to this many bytes go into one file; what is on a GPU passes through host memory file by file.
PART = 2 << 30

# What may be in a checkpoint: torch's name, safetensors' name.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "bool": "BOOL",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_HEADER_LIMIT = 100_000_000  # the library's own


def library() -> Any:
    """The safetensors package; raises `CheckpointError` with the line that installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            f"checkpoints need the safetensors package and numpy ({error}): pip install 'opendit[checkpoint]'"
        ) from error
    return safetensors


def check_dtypes(values: Mapping[str, torch.dtype]) -> None:
    """Raises `CheckpointError` naming those of `values` whose dtype could be written and never read."""
    bad = [f"{key} is {dtype}" for key, dtype in values.items() if str(dtype).removeprefix("torch.") not in _DTYPES]
    if bad:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        raise CheckpointError(f"{', '.join(bad[:3])}{more}; allowed in a checkpoint: {', '.join(_DTYPES)}")


def save_file(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
    """The library's, which says of a dtype that it can't write, as older ones can't all, no more than a KeyError."""
    safetensors = library()
    try:
        safetensors.torch.save_file(tensors, path, **more)
    except KeyError as error:
        names = [name for name, value in tensors.items() if value.dtype in error.args][:3]
        raise CheckpointError(
            f"{', '.join(names)}: safetensors {safetensors.__version__} can't write {error}; allowed: the dtypes that "
            "it knows. Cast it, or install a newer one"
        ) from error


def write(folder: Path, rank: int, ranges: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Writes one-dimensional `ranges` by name into files of this rank; {file: size, hash and the names in it}."""
    written = {}
    for number, part in enumerate(_parts(ranges)):
        path = folder / f"shard-{rank:05d}-{number:05d}.safetensors"
        save_file(_apart(part), path)
        disk.flush(path)
        written[path.name] = {**manifest.file_record(path), "holds": list(part)}
    return written


def _apart(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and no two in one memory, which the library refuses: tied weights are written under each name."""
    seen: set[int] = set()
    found = {}
    for key, values in part.items():
        values = values.cpu()
        pointer = values.untyped_storage().data_ptr()
        found[key] = values.clone() if pointer in seen else values
        seen.add(pointer)
    return found


def _parts(ranges: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for key, values in ranges.items():
        if part and size + values.nbytes > PART:
            yield part
            part, size = {}, 0
        part[key] = values
        size += values.nbytes
    if part:
        yield part


def open_file(path: Path) -> Any:
    """A safetensors file, open for reading ranges; raises `DamagedCheckpointError` for anything else."""
    safetensors = library()
    with jsonfile.open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise DamagedCheckpointError(f"{path}: is no safetensors file (a header of {length} bytes in {size})")
        jsonfile.parse(file.read(length), f"{path}: the header")  # the library lets names occur twice
    try:
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: is no safetensors file ({error})") from error


class Shards:
    """The tensors of a checkpoint whose files were checked, by the names in its index.

    Raises `DamagedCheckpointError` for an index that does not describe tensors, or not those of the files.
    """

    def __init__(self, folder: Path, tensors: Any, files: Mapping[str, Any]) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._held: dict[str, frozenset[str]] = {}
        if not isinstance(tensors, dict):
            raise DamagedCheckpointError(f"{folder / manifest.INDEX}: holds no tensors")
        self.records: dict[str, dict[str, Any]] = tensors
        for key, record in tensors.items():
            try:
                self._check(key, record, files)
            except (CheckpointError, TypeError, KeyError, ValueError) as error:  # noqa: PERF203
                raise DamagedCheckpointError(f"{folder / manifest.INDEX}: {key}: {error}") from error

    def _check(self, key: str, record: Any, files: Mapping[str, Any]) -> None:
        shape, pieces = record["shape"], record["pieces"]
        numbers = [*shape, *(n for piece in pieces for n in piece[:2])]
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError("shapes and ranges are whole numbers")
        if record["dtype"] not in _DTYPES:
            raise ValueError(f"has the unknown dtype {record['dtype']!r}")
        check_whole(key, tuple(shape), [(start, stop) for start, stop, _ in pieces])
        for start, stop, name in pieces:
            if name not in files or not name.endswith(".safetensors"):
                raise ValueError(f"is in {name!r}, which the manifest does not list")
            file = self._file(name)
            if key not in self._held[name]:
                raise ValueError(f"{name} does not hold it")
            found = file.get_slice(key)
            if found.get_shape() != [stop - start] or found.get_dtype() != _DTYPES[record["dtype"]]:
                raise ValueError(f"{name} holds {found.get_dtype()} {found.get_shape()} for [{start}, {stop})")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = open_file(self._folder / name)
            self._held[name] = frozenset(self._open[name].keys())
        return self._open[name]

    def matches(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """What is wrong with loading `key` into such a tensor."""
        if key not in self.records:
            return "the checkpoint does not hold it"
        record = self.records[key]
        given = str(dtype).removeprefix("torch.")
        if tuple(record["shape"]) != shape or record["dtype"] != given:
            return f"the checkpoint holds {record['dtype']} {tuple(record['shape'])}, this is {given} {shape}"
        return None

    def fill(self, key: str, piece: Piece) -> None:
        """Writes the saved elements of [piece.start, piece.stop) to the piece."""
        for start, stop, name in self.records[key]["pieces"]:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                values = self._file(name).get_slice(key)[low - start : high - start]
                piece.values[low - piece.start : high - piece.start].copy_(values)

    def whole(self, key: str) -> Tensor:
        """The tensor as it was saved, on the CPU."""
        record = self.records[key]
        shape = tuple(record["shape"])
        values = torch.empty(math.prod(shape), dtype=getattr(torch, record["dtype"]))
        self.fill(key, Piece(shape, 0, values.numel(), values))
        return values.view(shape)
