"""Samples in a fixed order: where each one's bytes are, its label, its caption; of folders and of tables.

Nothing is decoded here. Rows that can't be samples (no file name, no text among captioned ones) are named in `skipped`.
"""

from __future__ import annotations

import csv
import json
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


def kind_of(extensions: set[str]) -> str:
    return "image" if extensions is IMAGES else "video"


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
    if all(folder.name.isdecimal() for folder, _ in folders):  # 2 before 10
        folders.sort(key=lambda found: int(found[0].name))
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
        elif Path(file).suffix.lower() not in extensions:
            skipped.append(f"{table.name}:{number}: {file} is no {kind_of(extensions)}")
        else:
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
