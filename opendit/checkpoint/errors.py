"""What goes wrong with checkpoints, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class CheckpointError(ValueError):
    """A checkpoint that can't be written, or that can't be read into what it was given for."""


class DamagedCheckpointError(CheckpointError):
    """Files that are not what was written, or were never a checkpoint. Nothing of them was used.

    `intact` is the name of the newest intact checkpoint before it in the same folder, or None.
    """

    intact: str | None = None


@contextlib.contextmanager
def seen_as_damage(name: object) -> Iterator[None]:
    """What the disk, or a value in a file, makes Python raise is a `DamagedCheckpointError` about `name`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{name}: can't be read ({type(error).__name__}: {error})") from error
