"""Hugging Face data sets on disk: `.parquet` files as the hub has them, `.arrow` files as `save_to_disk` writes them.

Columns: `image` or `video` (bytes, or {bytes, path}), `label` or `class` (numbers, whose names the schema knows, or
names), `text`, `caption` or `prompt`. Parquet is read a row group at a time and the last few groups are kept: reading
in order is fast, and shuffled reading wants groups of a few hundred rows or less (the hub's are 100 for images).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.data.listing import IMAGES, LABEL, TEXT, Listing, number_classes

MEDIA = {True: ("image", "img", "jpg", "png"), False: ("video", "mp4")}


class Rows:
    """`load` of samples that are rows: (file, row group, row in it, column)."""

    def __init__(self, places: list[tuple[str, int, int, str]]):
        self.places = places

    def __call__(self, index: int) -> bytes | Path:
        path, group, row, column = self.places[index]
        value = _group(path, group, column)[row].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return Path(path).parent / value["path"]
            value = value.get("bytes")
        if isinstance(value, str):
            return Path(path).parent / value
        if not isinstance(value, bytes):
            raise ValueError(f"the row holds no {column}")
        return value


@functools.lru_cache(maxsize=4)
def _group(path: str, group: int, column: str) -> pa.ChunkedArray:
    if path.endswith(".parquet"):
        return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)
    return _arrow_table(path).column(column)


@functools.lru_cache(maxsize=64)
def _arrow_table(path: str) -> pa.Table:
    """Mapped, not read: rows come from the page cache."""
    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def list_arrow(paths: list[Path], extensions: set[str]) -> Listing:
    images = extensions is IMAGES
    names: list[str] = []
    places: list[tuple[str, int, int, str]] = []
    texts: list[Any] = []
    labels: list[Any] = []
    skipped: list[str] = []
    schema: pa.Schema | None = None
    for path in paths:
        try:
            file = pq.ParquetFile(path) if path.suffix == ".parquet" else None
            table = None if file else _arrow_table(str(path))
        except (pa.ArrowException, OSError) as error:
            skipped.append(f"{path.name}: {' '.join(str(error).split())}")
            continue
        found = file.schema_arrow if file else table.schema
        if schema is None:
            schema = found
            medium, text, label = (
                next((name for name in options if name in found.names), None)
                for options in (MEDIA[images], TEXT, LABEL)
            )
        elif found.names != schema.names:
            raise ValueError(
                f"data_path: {path} has the columns {', '.join(found.names)}, the files before it "
                f"{', '.join(schema.names)}; all must have the same. Keep data sets in folders of their own"
            )
        if medium is None:
            continue
        wanted = [name for name in (text, label) if name]
        groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] if file else [table.num_rows]
        few = (file.read(columns=wanted) if file else table.select(wanted)) if wanted else None
        texts += few.column(text).to_pylist() if text else []
        labels += few.column(label).to_pylist() if label else []
        for group, rows in enumerate(groups):
            start = sum(groups[:group])
            names += [f"{path.name}#{start + row}" for row in range(rows)]
            places += [(str(path), group, row, medium) for row in range(rows)]
    if schema is None or medium is None:
        return Listing([], Rows([]), skipped=skipped)

    keep = []
    for i, name in enumerate(names):
        lacking = [what for what, values in ((text, texts), (label, labels)) if what and values[i] in (None, "")]
        if lacking:
            skipped.append(f"{name}: no {lacking[0]}")
        else:
            keep.append(i)
    listing = Listing([names[i] for i in keep], Rows([places[i] for i in keep]), skipped=skipped)
    if text:
        listing.captions = [str(texts[i]) for i in keep]
    if label:
        listing.classes, listing.labels = number_classes([labels[i] for i in keep])
        if (known := _class_names(schema, label)) and len(known) >= len(listing.classes):
            listing.classes = known
    return listing


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """What `datasets` writes beside the columns: {"info": {"features": {column: {"names": […]}}}}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return None
