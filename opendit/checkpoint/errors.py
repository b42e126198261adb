"""What goes wrong with checkpoints, by name."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that can't be written, or that can't be read into what it was given for."""


class DamagedCheckpointError(CheckpointError):
    """Files that are not what was written, or were never a checkpoint. Nothing of them was used.

    `intact` is the name of the newest intact checkpoint before it in the same folder, or None.
    """

    intact: str | None = None
