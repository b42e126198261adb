"""What lies at a path, as a list of samples in a fixed order: where each one's bytes are, its label, its caption.

| at the path | read as |
|---|---|
| a `.csv` or `.jsonl`, or a folder with `captions` or `metadata` of that kind | rows: file, text, class |
| folder with `.tar` files, or one `.tar` | WebDataset shards: `key.jpg`, `key.cls`, `key.txt`, `key.json` |
| folder with `.parquet` or `.arrow` files, or one of them | Hugging Face data sets (`examples/data/arrow.py`) |
| `folder/train-*.parquet`, `folder/*.tar`: a pattern as the last part | those of the shards |
| folder with sub-folders of images or videos | one class per sub-folder |
| folder of images or videos | no classes |

Nothing is decoded here. Rows that can't be samples (no file name, no text among captioned ones, a shard that ends too
early) are named in `skipped`.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif"}
TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "captions.csv")
# What a table's columns may be called, first found first taken: ours, Hugging Face's image folders', common others.
FILE, TEXT, LABEL = ("path", "file", "file_name", "video"), ("text", "caption", "prompt"), ("class", "label")


@dataclass
class Listing:
    """`names[i]` says which sample i is, `load(i)` gives its file or its bytes; `load` may be used in any process."""

    names: list[str]
    load: Callable[[int], Path | bytes]
    classes: list[str] = field(default_factory=list)
    labels: list[int] | None = None
    captions: list[str] | None = None
    skipped: list[str] = field(default_factory=list)


def list_samples(path: Path, extensions: set[str]) -> Listing:
    """`extensions`: IMAGES or VIDEOS, those that are asked for."""
    if "*" not in path.name and not path.exists():
        raise ValueError(f"data_path: {path} does not exist")
    found = _find(path, extensions)
    if not found.names:
        kind, other = ("images", "videos") if extensions is IMAGES else ("videos", "images")
        why = f"; it has {other}" if _find(path, VIDEOS if extensions is IMAGES else IMAGES).names else ""
        more = f", of {len(found.skipped)} entries: {found.skipped[0]}" if found.skipped else ""
        raise ValueError(f"data_path: {path} holds no {kind}{why}{more}. num_frames 1 reads images, above 1 videos")
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


class Files:
    """`load` of samples that are files."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __call__(self, index: int) -> Path:
        return self.paths[index]


def list_folder(root: Path, extensions: set[str]) -> Listing:
    def inside(folder: Path) -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in extensions)

    folders = [(folder, inside(folder)) for folder in sorted(p for p in root.iterdir() if p.is_dir())]
    folders = [(folder, paths) for folder, paths in folders if paths]
    loose = sorted(p for p in root.iterdir() if p.suffix.lower() in extensions)
    if folders and loose:
        raise ValueError(
            f"data_path: {root} has files both beside and in sub-folders, such as {loose[0].name} and "
            f"{folders[0][1][0].relative_to(root)}; allowed: sub-folders (classes) or files, not both"
        )
    paths = loose or [path for _, paths in folders for path in paths]
    names = [str(path.relative_to(root)) for path in paths]
    labels = None if loose else [label for label, (_, paths) in enumerate(folders) for _ in paths]
    return Listing(names, Files(paths), [folder.name for folder, _ in folders], labels)


def list_table(table: Path, extensions: set[str]) -> Listing:
    """A .csv with a header or a .jsonl: a file (beside the table, or an absolute path), its text, its class."""
    rows, skipped = [], []
    columns: tuple[str | None, ...] | None = None
    for number, row in _rows(table):
        if isinstance(row, str):
            skipped.append(f"{table.name}:{number}: {row}")
            continue
        if columns is None:
            columns = tuple(next((c for c in names if c in row), None) for names in (FILE, TEXT, LABEL))
            if columns[0] is None:
                raise ValueError(
                    f"data_path: {table} has the columns {', '.join(map(str, row)) or 'none'}; one of "
                    f"{', '.join(FILE)} must name the file, and {', '.join(TEXT)} may hold its text"
                )
        file, text, label = (row.get(c) if c else None for c in columns)
        if not file:
            skipped.append(f"{table.name}:{number}: no {columns[0]}")
        elif columns[1] and not text:
            skipped.append(f"{table.name}:{number}: no {columns[1]}")
        elif columns[2] and label in (None, ""):
            skipped.append(f"{table.name}:{number}: no {columns[2]}")
        elif Path(file).suffix.lower() in extensions:
            rows.append((str(file), text, label))
    names = [file for file, _, _ in rows]
    listing = Listing(names, Files([table.parent / file for file in names]), skipped=skipped)
    if columns and columns[1]:
        listing.captions = [str(text) for _, text, _ in rows]
    if columns and columns[2]:
        listing.classes, listing.labels = number_classes([label for _, _, label in rows])
    return listing


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line numbers with the row, or with what is wrong with it."""
    with table.open(newline="", encoding="utf-8") as file:
        if table.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                yield number, f"not JSON: {error}"
                continue
            if row is not None:
                yield number, row if isinstance(row, dict) else "not a JSON object"


def number_classes(labels: list[Any]) -> tuple[list[str], list[int]]:
    """Whole numbers are class numbers as they are; anything else is a name, numbered in the order of the names."""
    texts = [str(label) for label in labels]
    if all(text.isdecimal() for text in texts):
        numbers = [int(text) for text in texts]
        return [str(number) for number in range(max(numbers, default=-1) + 1)], numbers
    classes = sorted(set(texts))
    position = {name: i for i, name in enumerate(classes)}
    return classes, [position[text] for text in texts]


class Members:
    """`load` of samples in tar files: opened anew each time, so that processes share no position in a file."""

    def __init__(self, places: list[tuple[Path, int, int]]):
        self.places = places

    def __call__(self, index: int) -> bytes:
        path, offset, size = self.places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def list_tars(paths: list[Path], extensions: set[str]) -> Listing:
    """WebDataset: members that share a name up to its first dot are one sample."""
    names: list[str] = []
    places: list[tuple[Path, int, int]] = []
    about: list[dict[str, Any]] = []
    skipped: list[str] = []
    for path in paths:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path) as tar:
                while member := tar.next():
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    key, _, extension = base.partition(".")
                    suffix = f".{extension.lower()}"
                    sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
                    if suffix in extensions:
                        sample["media"] = (member.name, (path, member.offset_data, member.size))
                    elif suffix in (".cls", ".txt", ".json") and (file := tar.extractfile(member)):
                        sample[suffix] = file.read().decode("utf-8", "replace").strip()
                with path.open("rb") as raw:  # at a broken header tarfile just stops; whole files end in zeros
                    raw.seek(tar.offset)
                    if any(raw.read(512)):
                        raise tarfile.ReadError("a broken header")
        except (tarfile.TarError, EOFError, OSError) as error:  # what was read before it is kept
            skipped.append(f"{path.name} after {len(samples)} samples: {error}")
        for sample in samples.values():
            if "media" in sample:
                member_name, place = sample["media"]
                names.append(f"{path.name}/{member_name}")
                places.append(place)
                about.append(sample)
    captions, labels = zip(*map(_about, about), strict=True) if about else ((), ())
    expected = {"text": captions, "class": labels}
    expected = {what: values for what, values in expected.items() if any(value is not None for value in values)}
    kept = []
    for i, name in enumerate(names):
        lacking = [what for what, values in expected.items() if values[i] is None]
        if lacking:
            skipped.append(f"{name}: no {lacking[0]}, which others have")
        else:
            kept.append(i)
    listing = Listing([names[i] for i in kept], Members([places[i] for i in kept]), skipped=skipped)
    if "text" in expected:
        listing.captions = [str(captions[i]) for i in kept]
    if "class" in expected:
        listing.classes, listing.labels = number_classes([labels[i] for i in kept])
    return listing


def _about(sample: dict[str, str]) -> tuple[str | None, str | None]:
    """The caption and the class that lie beside a member."""
    more: Any = {}
    if ".json" in sample:
        try:
            more = json.loads(sample[".json"])
        except ValueError:
            more = {}
    more = more if isinstance(more, dict) else {}
    caption = sample.get(".txt") or next((more[name] for name in TEXT if more.get(name)), None)
    label = sample.get(".cls") or next((more[name] for name in LABEL if more.get(name) is not None), None)
    return caption, label
