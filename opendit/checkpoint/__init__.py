"""Checkpoints of training runs that survive kills, and weights in the formats of the world. docs/checkpoints.md."""

from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError
from opendit.checkpoint.finding import latest_checkpoint
from opendit.checkpoint.loading import Loaded, load
from opendit.checkpoint.saving import Saving, save, wait
from opendit.checkpoint.weights import load_weights, save_weights

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "Loaded",
    "Saving",
    "latest_checkpoint",
    "load",
    "load_weights",
    "save",
    "save_weights",
    "wait",
]
