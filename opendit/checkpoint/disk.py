"""Checkpoints as folders: their names, which is the latest, and how one comes to be there at once or not at all.

    folder/
        latest                  the name of the checkpoint that was saved last
        step-00000100/          whole, always
        step-00000200/
        step-00000200-2/        step 200, saved again
        step-00000300.tmp-…/    being written, or left by a process that was killed; nobody reads it

A checkpoint is written into a `.tmp-` folder; each file and the folder are flushed to the disk, then it gets its name
by one rename, the parent is flushed, and only then `latest` changes, by a rename as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from pathlib import Path

from opendit.checkpoint import jsonfile
from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger("opendit")

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TEMPORARY = re.compile(_NAME.pattern + r"\.tmp-[0-9a-f]{16}")


def names(folder: Path) -> list[str]:
    """The checkpoints in `folder`, by step, then by when they were saved."""
    found = [(_order(entry.name), entry.name) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    return [name for order, name in sorted((order, name) for order, name in found if order is not None)]


def _order(name: str) -> tuple[int, int] | None:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def step_of(name: str) -> int | None:
    order = _order(name)
    return order and order[0]


def begin(folder: Path, step: int) -> tuple[Path, str]:
    """An empty temporary folder, and the name it shall get. What killed processes left is removed, if it can be."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        flush(folder.parent)
    for entry in list(os.scandir(folder)):
        if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _remove(Path(entry.path))
    base = name = f"step-{step:08d}"
    again = 1
    while os.path.lexists(folder / name):
        again += 1
        name = f"{base}-{again}"
    temporary = folder / f"{name}.tmp-{secrets.token_hex(8)}"
    temporary.mkdir()
    return temporary, name


def commit(temporary: Path, name: str) -> Path:
    """Gives what lies in `temporary`, flushed file by file already, its name, and makes it the latest.

    Raises `CheckpointError` where it has its name, is whole, and could not be made the latest.
    """
    folder, final = temporary.parent, temporary.parent / name
    flush(temporary)
    os.rename(temporary, final)
    try:
        flush(folder)
        replace(folder / LATEST, name.encode() + b"\n")
    except OSError as error:
        raise CheckpointError(_named_only(final, error)) from error
    return final


def _named_only(final: Path, error: OSError) -> str:
    taken = None
    with contextlib.suppress(OSError, CheckpointError):
        taken = latest(final.parent)
    what = f"{final}: was saved and is whole, but"
    if taken == final.name:
        return f"{what} the disk did not confirm its name, or that it is the latest ({error}); a crash may undo that"
    return (
        f"{what} {LATEST} could not be changed ({error}), so load({str(final.parent)!r}) takes {taken}; "
        f"load({str(final)!r}) takes this one, and the next save that succeeds becomes the latest"
    )


def replace(path: Path, content: bytes) -> None:
    """Puts a file with `content` at `path` in one step."""
    beside = path.with_name(f"{path.name}.new")
    write(beside, content)
    os.rename(beside, path)
    flush(path.parent)


def write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_newest(folder: Path, name: str, keep: int) -> None:
    """Removes all but `keep` checkpoints up to `name`, which was just saved. Later ones, of a run that went further
    before it was taken back, stay.

    A folder gets a temporary name first, so that what is removed by halves is never taken for a checkpoint.
    """
    known = names(folder)
    for old in known[: max(0, known.index(name) + 1 - keep)]:
        doomed = folder / f"{old}.tmp-{secrets.token_hex(8)}"
        try:
            os.rename(folder / old, doomed)
        except OSError as error:
            logger.warning("%s: can't be removed (%s)", folder / old, error)
            continue
        _remove(doomed)


def _remove(folder: Path) -> None:
    """Where it can't be, that is logged, and the next save tries again; what is saved is whole all the same."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s: can't be removed (%s); the next save tries again", folder, error)


def latest(folder: Path) -> str | None:
    """The name that `latest` holds; without that file, as after a kill during the first save, the newest that is whole.

    None where there is neither. Raises `DamagedCheckpointError` where `latest` names nothing that is here.
    """
    if not os.path.lexists(folder / LATEST):
        return next(reversed(names(folder)), None) if folder.is_dir() else None
    with jsonfile.open_plain(folder / LATEST) as file:
        content = file.read(200)
    name = content.decode("ascii", "replace").removesuffix("\n")
    if _order(name) is None:
        raise DamagedCheckpointError(f"{folder / LATEST}: holds {name[:80]!r}, which is no checkpoint's name")
    if not os.path.isdir(folder / name) or os.path.islink(folder / name):
        raise DamagedCheckpointError(f"{folder / LATEST}: names {name}, and there is no folder of that name")
    return name
