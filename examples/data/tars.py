"""WebDataset shards: members of a .tar that share a name up to its first dot are one sample.

`key.jpg` or `key.mp4` beside `key.cls` (its class), `key.txt` (its text) or `key.json` (both, under the names of a
table's columns). A shard that ends too early gives what comes before, and is named.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from examples.data.listing import LABEL, TEXT, Listing, kind_of, number_classes


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
        for key, sample in samples.items():
            if "media" not in sample:
                skipped.append(f"{path.name}/{key}: no {kind_of(extensions)}")
                continue
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
