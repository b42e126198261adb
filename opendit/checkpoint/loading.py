"""`load`: a checkpoint back into a training run, whole and unharmed or not at all.

    manifest → every file's hash → index → does each tensor fit? → plain values → fill → random states

Everything up to the plain values only reads. What takes those may refuse them: then all processes put back what they
had. Once the filling has begun nothing is refused, and only the disk can fail. A process needs the ranges that it holds
now, whoever wrote them, so any division over processes can be read into any other.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from opendit import parallel
from opendit.attached import attached
from opendit.checkpoint import jsonfile, manifest, randomness, together
from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError
from opendit.checkpoint.finding import chosen, intact
from opendit.checkpoint.inventory import WITH_STATE_DICT, Run
from opendit.checkpoint.modules import OptimizerLoad, module_pieces
from opendit.checkpoint.plain import decode
from opendit.checkpoint.saving import wait
from opendit.checkpoint.shards import Shards
from opendit.pieces import Piece
from opendit.wrapping import unwrap

logger = logging.getLogger("opendit")

_ALWAYS = ("step", "extra", "config", "made by", "layout")


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says of itself: its step, the `extra` and `config` that `save` was given, and where it lies."""

    step: int
    extra: Any
    config: Any
    path: Path


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    ema: nn.Module | None = None,
    leave: Collection[str] = (),
) -> Loaded:
    """Loads a training run that `save` saved, in place. Every process calls it; their number may be another one.

    Args:
        path: the run's folder, of which the latest checkpoint is taken, or one checkpoint.
        model, optimizer, scheduler, scaler, sampler, ema: as they were given to `save`; all that the checkpoint holds
            must be given, and nothing else.
        leave: names of what is not to be loaded although it is there: `"optimizer"`, `"scheduler"`, `"scaler"`,
            `"sampler"`, `"ema"`, `"rng"`, or another attached thing's.

    With as many processes as saved it, and the same `sp_size`, the random states continue and the run is the
    uninterrupted one to the bit. Otherwise every process is seeded anew from the saved state, equally where a sequence
    is shared; draw from `opendit.noise` and its like to have the same numbers then too.

    Raises:
        DamagedCheckpointError: the files are not what was saved; it names the newest intact checkpoint before.
        CheckpointError: the checkpoint does not fit: other names, shapes, dtypes or groups, something is missing.
            Nothing has been changed in either case. Only where the disk fails while the tensors are being read, after
            all files were found to be intact, is the run left half loaded; the error says so.
        TypeError: an argument of the wrong type.
    """
    run = Run(model, optimizer, ema, scheduler, scaler, sampler)
    together.prepare()
    wait()
    folder = chosen(Path(path))
    content = intact(folder)
    pending: _Pending | None = None
    problem: Exception | None = None
    try:
        pending = _Pending(folder, content, run, frozenset(leave))
    except CheckpointError as error:
        problem = error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problem = DamagedCheckpointError(f"{folder / manifest.INDEX}: does not describe a run ({error!r})")
    except Exception as error:
        problem = error
    together.everyones(None, problem)
    assert pending is not None
    try:
        pending.give()
    except Exception as error:
        problem = error
    try:
        together.everyones(None, problem)
    except CheckpointError:
        pending.take_back()
        raise
    loaded = None
    try:
        loaded = pending.finish()
    except Exception as error:
        problem = CheckpointError(
            f"{folder}: reading broke off ({type(error).__name__}: {error}), and the run is half loaded; load again "
            "before it goes on"
        )
        problem.__cause__ = error
    together.everyones(None, problem)
    assert loaded is not None
    return loaded


class _Pending:
    """Everything that is about to be loaded, found to fit."""

    def __init__(self, folder: Path, content: Mapping[str, Any], run: Run, leave: frozenset[str]) -> None:
        index = jsonfile.read(folder / manifest.INDEX)
        if not isinstance(index, dict) or index.get("id") != content["id"]:
            raise DamagedCheckpointError(f"{folder / manifest.INDEX}: belongs to another checkpoint than the manifest")
        self._folder, self._run = folder, run
        self._shared, self._own = index["shared"], index["own"]
        self._shards = Shards(folder, index["tensors"], content["files"])
        self._items = self._chosen(leave)
        self._rng = "rng" not in leave
        self._values = {n: self._decoded(self._shared, n) for n in (*_ALWAYS, *self._items) if n != "optimizer"}
        self._random: Any = self._random_states() if self._rng else None
        self._before: list[tuple[Callable[[Any], Any], Any]] = []
        self._pieces = module_pieces(run.model, "model")
        self._optimizer = None
        if run.ema is not None and "ema" in self._items:
            self._pieces.update(module_pieces(run.ema, "ema"))
        if run.optimizer is not None and "optimizer" in self._items:
            self._optimizer = OptimizerLoad(run.optimizer, run.model, self._shared["optimizer"], self._shards.records)
            self._pieces.update(self._optimizer.pieces)
        with_ema = run.ema is not None and "ema" in self._items
        self._check_pieces(self._pieces, ("model", "ema") if with_ema else ("model",))

    def _chosen(self, leave: frozenset[str]) -> list[str]:
        """The names of what is loaded: all that is there, all that was given."""
        saved = [name for name in self._shared if name not in _ALWAYS]
        given = [name for name in self._run.items() if name not in leave]
        known = list(dict.fromkeys([*saved, *self._run.items(), "rng"]))
        unknown = sorted(leave - set(known))
        if unknown:
            raise CheckpointError(f"leave: got {unknown}; allowed: {known}")
        for name in [*_ALWAYS, *given]:
            if name not in self._shared:
                raise CheckpointError(
                    f"{name}: load has one, but the checkpoint does not hold it (it has {saved}); pass none, or "
                    f"leave=({name!r},) to go on with the present one"
                )
        for name in saved:
            if name not in given and name not in leave:
                raise CheckpointError(
                    f"{name}: the checkpoint holds it, and load was not given one; pass it, or leave=({name!r},) to go "
                    "on without"
                )
        return given

    def _decoded(self, values: Mapping[str, Any], name: str) -> Any:
        mine = [k for k in self._shards.records if k == name or k.startswith(f"{name}.")]
        return decode(values[name], {key: self._shards.whole(key) for key in mine})

    def _random_states(self) -> Any:
        """This process's own where the layout is the saved one, else rank 0's, to seed from."""
        name = f"rng/{together.rank()}"
        same = self._values["layout"] == self._run.layout()
        needed = name if same else "rng/0"
        if needed not in self._own:
            raise CheckpointError(f"{needed}: the checkpoint does not hold the random states of that process")
        states = self._decoded(self._own, needed)
        if same:
            randomness.check(states)
        return states

    def _check_pieces(self, pieces: Mapping[str, Piece], whole: tuple[str, ...]) -> None:
        """Each fits what was saved under its name; under the prefixes `whole` nothing else was saved."""
        wrong = []
        for key, piece in pieces.items():
            problem = self._shards.matches(key, piece.shape, piece.values.dtype)
            if problem:
                wrong.append(f"{key}: {problem}")
        for prefix in whole:
            extra = [k for k in self._shards.records if k.startswith(f"{prefix}/") and k not in pieces]
            wrong += [f"{key}: the checkpoint holds it, and the {prefix} has nothing of that name" for key in extra]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise CheckpointError(f"{self._folder.name} does not fit: {'; '.join(wrong[:5])}{more}")

    def give(self) -> None:
        """The plain values, to what may refuse them; `take_back` undoes it."""
        run = self._run
        for name in WITH_STATE_DICT:
            if name in self._items:
                part = getattr(run, name)
                # A sampler whose batches nobody counted knows no state; loading gives it one again.
                with contextlib.suppress(RuntimeError):
                    self._before.append((part.load_state_dict, copy.deepcopy(part.state_dict())))
                part.load_state_dict(self._values[name])
        target = unwrap(run.model)
        for name, thing in attached(target).items():
            if name in self._items:
                before = copy.deepcopy(dict(thing.state(target)))
                self._before.append((partial(thing.load_state, target), before))
                thing.load_state(target, self._values[name])
                pieces = {f"{name}/{key}": piece for key, piece in thing.pieces(target).items()}
                self._check_pieces(pieces, (name,))
                self._pieces.update(pieces)

    def take_back(self) -> None:
        for load, before in reversed(self._before):
            try:
                load(before)
            except Exception:  # noqa: PERF203  the others are put back all the same
                logger.exception("%r does not take its own state back: build the run anew", load)

    def finish(self) -> Loaded:
        for key, piece in self._pieces.items():
            self._shards.fill(key, piece)
        if self._optimizer is not None:
            self._optimizer.finish()
        if self._rng:
            self._continue_randomness()
        return Loaded(self._values["step"], self._values["extra"], self._values["config"], self._folder)

    def _continue_randomness(self) -> None:
        if self._values["layout"] == self._run.layout():
            randomness.restore(self._random)
            return
        if together.rank() == 0:
            logger.warning(
                "saved by %s, loaded by %s: random states can't continue, and are seeded anew from the saved ones",
                self._values["layout"],
                self._run.layout(),
            )
        model = self._run.model
        randomness.derive(self._random["torch"], parallel.data_parallel_rank(model), parallel.data_parallel_size(model))
