"""Cases for two processes: preprocessing and scoring shared between them, as `tests.launch` runs them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from examples.common import Process
from examples.data import open_data
from examples.data.prepare import Preparation
from examples.encoders import load_text_encoder, load_vae
from examples.evaluate.features import load_extractor
from examples.evaluate.run import Pass, open_samples, report

SETTINGS = {"image_size": 16, "num_frames": 1, "frame_interval": 1, "flip": True, "variants": 2, "seed": 3}
SETTINGS |= {"vae": "vae", "text_encoder": "text", "dtype": "fp32", "text_dtype": "fp32"}


def prepare(root: Path, out: Path, process: Process) -> dict:
    """Root holds `data`, `vae` and `text`."""
    data = open_data(root / "data", image_size=16, flip=True, seed=3)
    preparation = Preparation(out, data, SETTINGS, shard_size=2, process=process)
    text = load_text_encoder(root / "text", length=6)
    index = preparation.run(load_vae(root / "vae"), text, batch_size=3)
    return {"made": preparation.mine + preparation.my_text, "index": index}


def score(root: Path, process: Process) -> dict | None:
    metrics = {"frechet", "precision_recall"}
    extractor = load_extractor("pixels", process.device)
    real, generated = (
        Pass(open_samples(root / name, 16), extractor, metrics, process).run(3, 0, name)
        for name in ("real", "generated")
    )
    return report(generated, real, None)


def cases(world: int) -> dict:
    process = Process(dist.get_rank(), world, torch.device("cpu"))
    root = Path(os.environ["PREPARING"])
    return {
        "prepare": lambda: prepare(root, root / "out2", process),
        "score": lambda: score(root, process),
    }
