"""opendit: Diffusion Transformers, faster, with nothing else changed.

model = opendit.accelerate(model)
model, optimizer = opendit.accelerate(model, "train", optimizer=optimizer)
"""

from opendit.api import Boosted, accelerate, attach, explain, restore
from opendit.attaching import schedule
from opendit.calibrating import calibrate
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
from opendit.ema import ema_state_dict, ema_weights
from opendit.ema_profiles import EMA
from opendit.ema_snapshots import posthoc_ema
from opendit.parallel import data_parallel_rank, data_parallel_size, seed
from opendit.patch.registry import register_family
from opendit.sampler import ResumableSampler
from opendit.sampling import sampling
from opendit.step_cache import StepCache
from opendit.stepping import NonFiniteGradients
from opendit.training import no_sync
from opendit.verify import verify

__all__ = [
    "EMA",
    "Boosted",
    "BoosterConfig",
    "CheckpointError",
    "DamagedCheckpointError",
    "NonFiniteGradients",
    "ResumableSampler",
    "StepCache",
    "accelerate",
    "attach",
    "calibrate",
    "data_parallel_rank",
    "data_parallel_size",
    "ema_state_dict",
    "ema_weights",
    "explain",
    "label_drop",
    "latest_checkpoint",
    "load",
    "load_weights",
    "no_sync",
    "noise",
    "posthoc_ema",
    "register_family",
    "restore",
    "sampling",
    "save",
    "save_weights",
    "schedule",
    "seed",
    "timesteps",
    "uniform",
    "verify",
    "wait",
]
__version__ = "0.1.0"
