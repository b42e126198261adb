"""opendit: Diffusion Transformers, faster, with nothing else changed.

model = opendit.accelerate(model)
model, optimizer = opendit.accelerate(model, "train", optimizer=optimizer)
"""

from opendit.api import Boosted, accelerate, explain, restore
from opendit.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    latest_checkpoint,
    load,
    load_weights,
    save,
    save_weights,
    wait,
)
from opendit.config import BoosterConfig
from opendit.draws import label_drop, noise, timesteps, uniform
from opendit.parallel import data_parallel_rank, data_parallel_size, seed
from opendit.patch.registry import register_family
from opendit.sampler import ResumableSampler
from opendit.training import no_sync
from opendit.verify import verify

__all__ = [
    "Boosted",
    "BoosterConfig",
    "CheckpointError",
    "DamagedCheckpointError",
    "ResumableSampler",
    "accelerate",
    "data_parallel_rank",
    "data_parallel_size",
    "explain",
    "label_drop",
    "latest_checkpoint",
    "load",
    "load_weights",
    "noise",
    "no_sync",
    "register_family",
    "restore",
    "save",
    "save_weights",
    "seed",
    "timesteps",
    "uniform",
    "verify",
    "wait",
]
__version__ = "0.1.0"
