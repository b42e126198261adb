"""opendit: Diffusion Transformers, faster, with nothing else changed.

model = opendit.accelerate(model)
model, optimizer = opendit.accelerate(model, "train", optimizer=optimizer)
"""

from opendit.api import Boosted, accelerate, attach, explain, restore
from opendit.attaching import schedule
from opendit.config import BoosterConfig
from opendit.ema import ema_state_dict, ema_weights
from opendit.ema_profiles import EMA
from opendit.ema_snapshots import posthoc_ema
from opendit.parallel import data_parallel_rank, data_parallel_size, seed
from opendit.patch.registry import register_family
from opendit.stepping import NonFiniteGradients
from opendit.training import no_sync
from opendit.verify import verify

__all__ = [
    "EMA",
    "Boosted",
    "BoosterConfig",
    "NonFiniteGradients",
    "accelerate",
    "attach",
    "data_parallel_rank",
    "data_parallel_size",
    "ema_state_dict",
    "ema_weights",
    "explain",
    "no_sync",
    "posthoc_ema",
    "register_family",
    "restore",
    "schedule",
    "seed",
    "verify",
]
__version__ = "0.1.0"
