"""Snapshots of power-function averages on disk, and averages of any width out of them.

    folder/00001000/rank-0-of-2.safetensors     "std0.05/blocks.0.attn.qkv.weight" [stop - start] fp32 …
                                                metadata "opendit": {"step", "gammas", "shapes", "starts"} as JSON

Each process writes its own parts, to another name first; a snapshot counts once all files are there and together hold
every element. Reading needs one process, one snapshot at a time in memory, and executes nothing.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opendit.ema_profiles import WIDEST, Power, gamma_of, synthesis
from opendit.everyone import several

_PATTERN = "rank-*-of-*.safetensors"


def write(folder: str, ema: Any) -> None:
    """Writes this process's parts of `ema`'s (a `ShardedEma`) power functions."""
    save_file = _safetensors("torch").save_file
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several() else (0, 1)
    powers = {label: p for label, p in ema.profiles.items() if isinstance(p, Power)}
    about = {
        "step": ema.steps,
        "gammas": {label: p.gamma for label, p in powers.items()},
        "shapes": {part.name: part.shape for part in ema.parts},
        "starts": {part.name: part.start for part in ema.parts},
    }
    tensors = {
        f"{label}/{part.name}": value.cpu()
        for label in powers
        for part, value in zip(ema.parts, ema.values[label], strict=True)
    }
    place = Path(folder) / f"{ema.steps:08d}"
    place.mkdir(parents=True, exist_ok=True)
    final = place / f"rank-{rank}-of-{world}.safetensors"
    temporary = final.with_suffix(".writing")
    # One storage holds all values: what is written is a copy of each.
    save_file({name: t.clone() for name, t in tensors.items()}, temporary, metadata={"opendit": json.dumps(about)})
    os.replace(temporary, final)


def check_packages() -> None:
    """Raises `ImportError` where what `write` needs is missing."""
    _safetensors("torch")


def posthoc_ema(folder: str | os.PathLike[str], *, std: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of width `std` (σ_rel) over the steps up to `step`, synthesised from snapshots after training.

    Least squares over all snapshots up to that step (Karras et al. 2023, arXiv 2312.02696, section 3.2).

    Args:
        folder: where `EMA(snapshots=folder)` wrote, by any number of processes.
        std: the width wanted, between 0 and 1/√12 = 0.288.
        step: the last step of the average, which must have a snapshot; default: the last one.

    Returns:
        Name → fp32 tensor on the CPU, for the parameters that were trained; `load_state_dict(..., strict=False)` takes
        it, and the model keeps its own frozen parameters and buffers.

    Raises:
        ValueError: no complete snapshot, or a width that is not allowed.
    """
    if not isinstance(std, (int, float)) or isinstance(std, bool) or not 0 < std < WIDEST:
        raise ValueError(f"std: got {std!r}; allowed: a number between 0 and 0.288")
    found = _complete(Path(folder))
    if not found:
        raise ValueError(
            f"folder: got {os.fspath(folder)!r}, which has no complete snapshot; allowed: the folder given to EMA"
        )
    last = max(found) if step is None else step
    if last not in found:
        raise ValueError(f"step: got {step}; allowed: a step with a snapshot: {', '.join(map(str, sorted(found)))}")
    stored: list[tuple[int, str, float]] = []
    for at in sorted(t for t in found if t <= last):
        _, about = _header(next(iter(found[at])))
        stored += [(at, label, float(gamma)) for label, gamma in about["gammas"].items()]
    factors = synthesis([(t, gamma) for t, _, gamma in stored], (last, gamma_of(std)))
    total: dict[str, Tensor] = {}
    for (at, label, _), factor in zip(stored, factors, strict=True):
        for file, names in found[at].items():
            _add(total, file, names, label, factor)
    return {name: value.float() for name, value in total.items()}


def _add(total: dict[str, Tensor], file: Path, names: list[str], label: str, factor: float) -> None:
    with _safetensors().safe_open(str(file), framework="pt") as opened:
        about = json.loads(opened.metadata()["opendit"])
        for name in names:
            whole = total.setdefault(name, torch.zeros(about["shapes"][name], dtype=torch.float64))
            values = opened.get_tensor(f"{label}/{name}")
            start = about["starts"][name]
            whole.view(-1)[start : start + values.numel()] += factor * values.double()


def _complete(folder: Path) -> dict[int, dict[Path, list[str]]]:
    """By step, the snapshots that are whole: which parameters to read from which file.

    A step may have been written again by another number of processes, which leaves the files of both; what was written
    last counts, if it is whole.
    """
    found: dict[int, dict[Path, list[str]]] = {}
    for place in folder.glob("[0-9]*"):
        written: dict[str, list[Path]] = {}
        for file in sorted(place.glob(_PATTERN)):
            written.setdefault(file.stem.split("-of-")[1], []).append(file)
        for files in sorted(written.values(), key=lambda files: -max(file.stat().st_mtime_ns for file in files)):
            take = _whole(files)
            if take is not None:
                found[int(place.name)] = take
                break
    return found


def _whole(files: list[Path]) -> dict[Path, list[str]] | None:
    """Which parameters to read from which of `files`, written together; None where something is missing.

    Hybrid sharding writes some parts several times; the first counts.
    """
    take: dict[Path, list[str]] = {}
    missing: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for file in files:
        sizes, about = _header(file)
        for name, n in sizes.items():
            part = (name, about["starts"][name])
            missing.setdefault(name, math.prod(about["shapes"][name]))
            if part not in seen and (n or not math.prod(about["shapes"][name])):
                seen.add(part)
                missing[name] -= n
                take.setdefault(file, []).append(name)
    return take if take and not any(missing.values()) else None


def _header(file: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """How many elements of each parameter are in `file`, and what is said about them."""
    with _safetensors().safe_open(str(file), framework="pt") as opened:
        about = json.loads((opened.metadata() or {}).get("opendit", "null"))
        if not isinstance(about, dict):
            raise ValueError(f"folder: {file} is not a snapshot of opendit's")
        label = next(iter(about["gammas"]))
        return {n: opened.get_slice(f"{label}/{n}").get_shape()[0] for n in about["shapes"]}, about


def _safetensors(module: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError as error:
        raise ImportError("snapshots of an EMA need safetensors: pip install safetensors") from error
