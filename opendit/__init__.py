"""opendit: Diffusion Transformers, faster, with nothing else changed.

model = opendit.accelerate(model)
model, optimizer = opendit.accelerate(model, "train", optimizer=optimizer)
"""

from opendit.api import Boosted, accelerate, explain, restore
from opendit.config import BoosterConfig
from opendit.parallel import data_parallel_rank, data_parallel_size, seed
from opendit.patch.registry import register_family
from opendit.training import no_sync
from opendit.verify import verify

__all__ = [
    "Boosted",
    "BoosterConfig",
    "accelerate",
    "data_parallel_rank",
    "data_parallel_size",
    "explain",
    "no_sync",
    "register_family",
    "restore",
    "seed",
    "verify",
]
__version__ = "0.1.0"
