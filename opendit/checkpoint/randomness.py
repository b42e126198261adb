"""The random states of this process: Python's, numpy's, torch's on the CPU and on every GPU."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opendit.checkpoint.errors import CheckpointError
from opendit.fastseq.seed import set_everywhere


def states() -> dict[str, Any]:
    """All of them. numpy's where numpy is loaded, GPUs' where CUDA is in use."""
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)
        found["numpy"] = {
            "kind": state["bit_generator"],
            "words": torch.tensor(state["state"]["key"].tolist()),
            "position": int(state["state"]["pos"]),
            "gauss": (int(state["has_gauss"]), float(state["gauss"])),
        }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = {"states": torch.cuda.get_rng_state_all(), "current": torch.cuda.current_device()}
    return found


def check(found: Mapping[str, Any]) -> None:
    """Raises what `restore` would, and changes nothing."""
    python = found["python"]
    random.Random().setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.Generator().set_state(found["torch"])
    if "numpy" in found:
        try:
            import numpy
        except ImportError as error:
            raise CheckpointError("rng: the checkpoint holds numpy's random state, and there is no numpy") from error
        numpy.random.RandomState().set_state(_of_numpy(found["numpy"]))
    if "cuda" in found and not torch.cuda.is_available():
        raise CheckpointError(
            "rng: the checkpoint holds the random states of GPUs, and there is none; pass leave=('rng',) to go on "
            "with the present random states"
        )


def restore(found: Mapping[str, Any]) -> None:
    """Puts `states()` back, once `check` let them pass. With another number of GPUs than then, the process's own gets
    that of its own."""
    python = found["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(found["torch"])
    if "numpy" in found:
        import numpy

        numpy.random.set_state(_of_numpy(found["numpy"]))
    if "cuda" in found:
        saved = found["cuda"]
        if len(saved["states"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["states"])
        else:
            torch.cuda.set_rng_state(saved["states"][saved["current"]])


def _of_numpy(saved: Mapping[str, Any]) -> tuple[Any, ...]:
    return (saved["kind"], saved["words"].tolist(), saved["position"], *saved["gauss"])


def derive(state: Tensor, dp_rank: int, dp_size: int) -> None:
    """Seeds all generators from a saved one, for a run on another number of processes than it was saved from.

    Equal where a sequence is shared, different across data-parallel ranks.
    """
    digest = hashlib.sha256(bytes(state.tolist()) + f"{dp_rank} of {dp_size}".encode()).digest()
    set_everywhere(int.from_bytes(digest[:7], "little"))
