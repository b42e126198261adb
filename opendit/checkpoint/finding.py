"""Which checkpoint is meant, whether its files are what was saved, and where not, which one before it is intact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from opendit.checkpoint import disk, manifest, together
from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError


def latest_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that `load(path, …)` would take, or None where none was saved yet."""
    name = disk.latest(Path(path))
    return None if name is None else Path(path) / name


def chosen(path: Path) -> Path:
    """The one checkpoint to load, as rank 0 sees it."""
    found: Path | None = None
    problem: Exception | None = None
    try:
        if together.rank() == 0:
            if (path / ".metadata").exists():
                raise DamagedCheckpointError(
                    f"{path}: holds a checkpoint of torch.distributed.checkpoint, whose .metadata is a pickle and runs "
                    "code when it is read; allowed: checkpoints of opendit.save"
                )
            found = path if os.path.lexists(path / manifest.NAME) else latest_checkpoint(path)
            if found is None:
                raise CheckpointError(f"path: {path} holds no checkpoint; allowed: a folder that opendit.save wrote to")
    except DamagedCheckpointError as error:
        problem = with_intact(error, path, None)
    except Exception as error:
        problem = error
    folder = together.everyones(found, problem)[0]
    assert folder is not None
    return folder


def intact(folder: Path) -> dict[str, Any]:
    """The manifest, once all files were found to be what it says; each process reads its share of them."""
    content: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        content = manifest.read(folder)
        manifest.check_files(folder, content, sorted(content["files"])[together.rank() :: together.size()])
    except DamagedCheckpointError as error:
        problem = with_intact(error, folder.parent, folder.name)
    except Exception as error:
        problem = error
    together.everyones(None, problem)
    return content


def with_intact(error: DamagedCheckpointError, folder: Path, damaged: str | None) -> DamagedCheckpointError:
    """The error, with the newest checkpoint of `folder` before `damaged` that is intact.

    Raises nothing: other processes wait for this one to tell what is wrong.
    """
    try:
        names = disk.names(folder) if folder.is_dir() else []
    except OSError:
        names = []
    earlier = names[: names.index(damaged)] if damaged in names else [n for n in names if n != damaged]
    newest = None
    for name in reversed(earlier):
        try:
            content = manifest.read(folder / name)
            manifest.check_files(folder / name, content, sorted(content["files"]))
        except Exception:  # whatever is wrong with it
            continue
        newest = name
        break
    advice = (
        f"the newest intact checkpoint before it is {folder / newest}" if newest else "there is no intact one before it"
    )
    found = DamagedCheckpointError(f"{error}. Nothing was loaded; {advice}")
    found.intact = newest
    return found
