"""The list of a checkpoint's files with their sizes and SHA-256, checked before anything of them is used.

    manifest.json   {"checkpoint": "step-00000100", "id": …, "files": {name: {"sha256": …, "size": …}}, "sha256": …}

The last is of the manifest's own text without it, and the text must be, byte for byte, the one that we write: a flip
anywhere is seen. `id` is new for each save and stands in the index as well; with the checkpoint's name it tells an old
manifest, or an old checkpoint under another step's name, from the right one.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from opendit.checkpoint import disk, jsonfile
from opendit.checkpoint.errors import DamagedCheckpointError, seen_as_damage

NAME = "manifest.json"
INDEX = "index.json"
FORMAT = 1
_FILE = re.compile(r"index\.json|shard-\d{5}-\d{5}\.safetensors")
_LIMIT = 64 << 20


def file_record(path: Path) -> dict[str, Any]:
    """Size and hash of a file as it lies on the disk."""
    digest, size = hashlib.sha256(), 0
    with jsonfile.open_plain(path) as file, seen_as_damage(path):
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "size": size}


def build(name: str, identity: str, files: dict[str, dict[str, Any]]) -> bytes:
    content = {"checkpoint": name, "files": files, "format": FORMAT, "id": identity}
    return jsonfile.text({**content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(jsonfile.text(content)).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `folder`, its own integrity and every file's name and size checked."""
    with seen_as_damage(folder / NAME):
        return _read(folder, folder / NAME)


def _read(folder: Path, path: Path) -> dict[str, Any]:
    with jsonfile.open_plain(path) as file:
        text = file.read(_LIMIT)
    found = jsonfile.parse(text, str(path))
    if not isinstance(found, dict) or "sha256" not in found:
        raise DamagedCheckpointError(f"{path}: is no manifest of a checkpoint")
    content = {key: value for key, value in found.items() if key != "sha256"}
    if found["sha256"] != _digest(content) or jsonfile.text(found) != text:
        raise DamagedCheckpointError(f"{path}: is damaged (its own SHA-256 does not match)")
    if content.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path}: has format {content.get('format')!r}; this version reads {FORMAT}")
    if disk.step_of(folder.name) is not None and content.get("checkpoint") != folder.name:
        raise DamagedCheckpointError(f"{path}: belongs to {content.get('checkpoint')!r}, not to {folder.name}")
    files = content.get("files")
    if not isinstance(files, dict) or INDEX not in files:
        raise DamagedCheckpointError(f"{path}: lists no {INDEX}")
    for name, record in files.items():
        if not _FILE.fullmatch(name):
            raise DamagedCheckpointError(f"{path}: lists a file called {name!r}, which is no name of ours")
        if not isinstance(record, dict) or set(record) != {"sha256", "size"}:
            raise DamagedCheckpointError(f"{path}: says {record!r} of {name}")
        with jsonfile.open_plain(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
        if size != record["size"]:
            raise DamagedCheckpointError(f"{folder / name}: has {size} bytes; {record['size']} were written")
    return content


def check_files(folder: Path, content: dict[str, Any], which: list[str]) -> None:
    """Compares the hashes of the files `which`."""
    for name in which:
        if file_record(folder / name) != content["files"][name]:
            raise DamagedCheckpointError(f"{folder / name}: is damaged (its SHA-256 does not match)")
