"""Tells what lies at a path, and lists it.

| at the path | read as |
|---|---|
| a `.csv` or `.jsonl`, or a folder with `captions` or `metadata` of that kind | rows: file, text, class |
| folder with `.tar` files, or one `.tar` | WebDataset shards: `key.jpg`, `key.cls`, `key.txt`, `key.json` |
| folder with `.parquet` or `.arrow` files, or one of them | Hugging Face data sets (`examples/data/arrow.py`) |
| `folder/train-*.parquet`, `folder/*.tar`: a pattern as the last part | those of the shards |
| folder with sub-folders of images or videos | one class per sub-folder |
| folder of images or videos | no classes |

A table or an image folder is read by listing.py, WebDataset shards by tars.py, Hugging Face's files by arrow.py.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from examples.data.listing import IMAGES, TABLES, VIDEOS, Listing, list_folder, list_table
from examples.data.tars import list_tars


def list_samples(path: Path, extensions: set[str]) -> Listing:
    """`extensions`: IMAGES or VIDEOS, those that are asked for."""
    if "*" not in path.name and not path.exists():
        raise ValueError(f"data_path: {path} does not exist")
    found = _find(path, extensions)
    if not found.names:
        kind, other = ("images", "videos") if extensions is IMAGES else ("videos", "images")
        why = f"; it has {other}" if _find(path, VIDEOS if extensions is IMAGES else IMAGES).names else ""
        more = f"; of {len(found.skipped)} entries: {found.skipped[0]}" if found.skipped else ""
        raise ValueError(f"data_path: {path} holds no {kind}{why}{more}. num_frames 1 reads images, above 1 videos")
    if found.skipped:
        more = "" if len(found.skipped) == 1 else f", and {len(found.skipped) - 1} more"
        print(f"skipping {found.skipped[0]}{more}", file=sys.stderr, flush=True)
    return found


def _find(path: Path, extensions: set[str]) -> Listing:
    if "*" in path.name:
        shards = sorted(path.parent.glob(path.name))
        if not shards or {shard.suffix for shard in shards} not in ({".tar"}, {".parquet"}, {".arrow"}):
            raise ValueError(f"data_path: {path} matches {len(shards)} files; allowed: only .tar, .parquet or .arrow")
        return list_tars(shards, extensions) if path.suffix == ".tar" else _list_arrow(shards, extensions)
    if path.is_file():
        if path.suffix in (".csv", ".jsonl"):
            return list_table(path, extensions)
        if path.suffix == ".tar":
            return list_tars([path], extensions)
        if path.suffix in (".parquet", ".arrow"):
            return _list_arrow([path], extensions)
        raise ValueError(f"data_path: {path} is a file; allowed: a folder, .csv, .jsonl, .tar, .parquet or .arrow")
    for name in TABLES:
        if (path / name).is_file():
            return list_table(path / name, extensions)
    for suffix, read in ((".tar", list_tars), (".parquet", _list_arrow), (".arrow", _list_arrow)):
        if shards := sorted(path.glob(f"*{suffix}")) or sorted(path.glob(f"*/*{suffix}")):
            splits = sorted({re.split(r"[-_.]?\d", shard.stem)[0] for shard in shards})
            if len(splits) > 1:  # training on the test split by mistake costs more than an error
                raise ValueError(
                    f"data_path: {path} has {suffix} files of several names, {', '.join(splits)}. Say which: "
                    f"{shards[0].parent / splits[0]}*{suffix}"
                )
            return read(shards, extensions)
    return list_folder(path, extensions)


def _list_arrow(paths: list[Path], extensions: set[str]) -> Listing:
    if not importlib.util.find_spec("pyarrow"):
        raise ValueError(f"data_path: {paths[0].name} takes pyarrow to read. pip install pyarrow")
    from examples.data.arrow import list_arrow

    return list_arrow(paths, extensions)
