"""The steps of a save, each ended by all processes together: prepare → copy → write → commit.

Where one process fails, all raise its reason, rank 0 takes the temporary folder away, and nothing else has changed.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opendit.checkpoint import disk, jsonfile, manifest, shards, together
from opendit.checkpoint.division import Row, check_equal, checksums, divide, table
from opendit.checkpoint.errors import CheckpointError
from opendit.checkpoint.inventory import Run, State, check_finite, collect

# Host memory that copies of GPU tensors go to, kept from one background save to the next: to make it takes seconds.
_staging: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Job:
    """One process's share of a save: `values` are the elements from `starts` of the tensors it writes.

    `everyones` (rank 0 only) is what each process held: its ranges and its own plain values.
    """

    temporary: Path
    name: str
    values: dict[str, Tensor]
    starts: dict[str, int]
    shared: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


def prepare(folder: Path, run: Run, step: int, extra: Any, config: Any) -> Job:
    """Collects, compares, divides and checks; then rank 0 makes the temporary folder."""
    state, problem, told = State(), None, None
    try:
        shards.library()
        state = collect(run, step, extra, config)
        shards.check_dtypes({key: piece.values.dtype for key, piece in state.pieces.items()})
        hashes = {name: hashlib.sha256(jsonfile.text(v)).hexdigest() for name, v in state.shared.items()}
        told = (table(state.pieces), hashes, state.own)
    except Exception as error:
        problem = error
    told_by = [t for t in together.everyones(told, problem) if t is not None]
    tables = [t[0] for t in told_by]
    values: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    sums: dict[str, int] = {}
    try:
        for r, (_, theirs, _) in enumerate(told_by):
            for name in {**told_by[0][1], **theirs}:
                if told_by[0][1].get(name) != theirs.get(name):
                    raise CheckpointError(f"{name}: rank 0 and rank {r} have different values; allowed: equal ones")
        for key, (start, stop) in divide(tables, together.rank(), state.buffers).items():
            piece = state.pieces[key]
            values[key], starts[key] = piece.values[start - piece.start : stop - piece.start], start
        check_finite({key: value for key, value in values.items() if key not in state.buffers})
        sums = checksums(state.pieces, tables, together.rank())
    except Exception as error:
        problem = error
    everyones_sums = together.everyones({k: v for k, v in sums.items() if k not in state.buffers}, problem)
    begun = None
    try:
        check_equal(everyones_sums, tables)
        if together.rank() == 0:
            begun = disk.begin(folder, step)
    except Exception as error:
        problem = error
    begun = together.everyones(begun, problem)[0]
    assert begun is not None
    rows = {key: row for one in tables for key, row in one.items()}
    own = {name: value for _, _, owned in told_by for name, value in owned.items()}
    return Job(*begun, values, starts, state.shared, rows, own)


def copied(job: Job) -> Job:
    """The job with copies that training can't change; those of GPU tensors are in pinned host memory."""
    copies: dict[str, Tensor] = {}
    problem = None
    try:
        for key, value in job.values.items():
            if value.device.type == "cpu":
                copies[key] = value.clone()
                continue
            room = _staging.get(key)
            if room is None or room.shape != value.shape or room.dtype != value.dtype:
                room = _staging[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copies[key] = room.copy_(value, non_blocking=True)
        for device in {value.device for value in job.values.values() if value.device.type == "cuda"}:
            torch.cuda.synchronize(device)
    except Exception as error:
        problem = error
    _together_or_undone(job, None, problem)
    return replace(job, values=copies)


def write(job: Job, keep: int | None) -> Path:
    """Every process's shards, then rank 0's index, manifest and rename; the folder that came to be."""
    told, problem = None, None
    try:
        written = shards.write(job.temporary, together.rank(), job.values)
        ranges = {key: (start, start + job.values[key].numel()) for key, start in job.starts.items()}
        told = (written, ranges)
    except Exception as error:
        problem = error
    everyone = _together_or_undone(job, told, problem)
    final = None
    try:
        if together.rank() == 0:
            final = _commit(job, everyone, keep)
    except Exception as error:
        problem = error
    final = _together_or_undone(job, final, problem)[0]
    assert final is not None
    return final


def _commit(job: Job, everyone: list[Any], keep: int | None) -> Path:
    tensors: dict[str, dict[str, Any]] = {
        key: {"shape": list(shape), "dtype": dtype, "pieces": []} for key, (shape, dtype, _, _) in job.rows.items()
    }
    files = {}
    for written, ranges in everyone:
        for name, record in written.items():
            files[name] = {"sha256": record["sha256"], "size": record["size"]}
            for key in record["holds"]:
                tensors[key]["pieces"].append([*ranges[key], name])
    for record in tensors.values():
        record["pieces"].sort()
    identity = secrets.token_hex(16)
    index = {"id": identity, "own": job.own, "shared": job.shared, "tensors": tensors}
    disk.write(job.temporary / manifest.INDEX, jsonfile.text(index))
    files[manifest.INDEX] = manifest.file_record(job.temporary / manifest.INDEX)
    disk.write(job.temporary / manifest.NAME, manifest.build(job.name, identity, files))
    final = disk.commit(job.temporary, job.name)
    if keep is not None:
        disk.keep_newest(final.parent, job.name, keep)
    return final


def _together_or_undone(job: Job, told: Any, problem: Exception | None) -> list[Any]:
    try:
        return together.everyones(told, problem)
    except Exception:
        if together.rank() == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
        raise
