"""Weights alone, in the formats that others read and write, under the model's own names.

file.safetensors    names and tensors; loads in the unaccelerated model with no opendit installed
file.pt, file.pth   facebookresearch/DiT's and Vchitect/Latte's (published.py)
a folder            diffusers': config.json and diffusion_pytorch_model.safetensors, one file or several with an index
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from opendit.checkpoint import disk, jsonfile, published, together
from opendit.checkpoint.errors import CheckpointError, DamagedCheckpointError
from opendit.checkpoint.inventory import check_finite
from opendit.checkpoint.modules import module_pieces
from opendit.checkpoint.saving import wait
from opendit.checkpoint.shards import check_dtypes, open_file, save_file
from opendit.wrapping import unwrap

_STEMS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\.safetensors")
_ALLOWED = "a .safetensors file, a .pt or .pth file, or a folder of diffusers with .safetensors files"


def load_weights(path: str | os.PathLike[str], model: nn.Module, *, which: str | None = None) -> None:
    """Loads weights into `model`, in place; every process calls it. Values are cast to the model's dtypes.

    A save in the background is waited for first, and what went wrong with it is raised.

    Args:
        path: a `.safetensors` file, a `.pt` of facebookresearch/DiT or Latte, or a folder of diffusers.
        model: plain, accelerated, wrapped or sharded. Its names and shapes must be the file's, all of them.
        which: `"model"` or `"ema"` of a `.pt` that holds both; by default `"ema"`, as upstream's sampling does.

    Raises:
        DamagedCheckpointError: no such file, or it is not what its name says. Nothing in it is ever run.
        CheckpointError: names or shapes differ. The model is as before in either case.
    """
    if which not in (None, "model", "ema"):
        raise ValueError(f"which: got {which!r}; allowed: 'model', 'ema', or None")
    together.prepare()
    wait()
    problem = None
    fits: list[tuple[Any, Callable[[], Tensor]]] = []
    try:
        found = _read(Path(path), which, model)
        pieces = {key.partition("/")[2]: piece for key, piece in module_pieces(model, "model").items()}
        _check_names(found, {name: piece.shape for name, piece in pieces.items()}, path)
        fits = [(piece, found[name][1]) for name, piece in pieces.items()]
    except Exception as error:
        problem = error
    together.everyones(None, problem)
    for piece, read in fits:
        piece.values.copy_(read().reshape(-1)[piece.start : piece.stop])


def save_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    state: Mapping[str, Tensor] | None = None,
    ema: nn.Module | Mapping[str, Tensor] | None = None,
) -> None:
    """Writes weights that open without opendit; every process calls it, rank 0 writes, at once or not at all.

    A save in the background is waited for first, and what went wrong with it is raised.

    Args:
        path: a `.safetensors` file; a `.pt`, as facebookresearch/DiT and Latte write; or a folder, as diffusers writes
            (for models of diffusers); weights that lie there already, in one file or several, are replaced.
        model: whose weights and names; a sharded one is gathered tensor by tensor.
        state: weights to write in place of the model's, full ones on rank 0, such as `opendit.ema_state_dict(model)`.
        ema: for `.pt`: what goes under `"ema"`, beside `"model"`; without it the file is one flat state dict.

    A `.pt` is the one kind of file in which torch keeps a pickle, of names and tensors; prefer the others.

    Raises `CheckpointError` for weights that are not finite, in a dtype that `save` refuses too, or can't be written.
    """
    path = Path(path)
    kind = path.suffix if path.suffix in (".safetensors", ".pt", ".pth") else ""
    # A dot in a folder's name, as of a version, is no kind of file; but nobody means a folder by these.
    folder = path.is_dir() or (hasattr(unwrap(model), "to_json_string") and path.suffix not in (".bin", ".ckpt"))
    if path.suffix and not kind and not folder:
        raise CheckpointError(f"path: got {path.name}; allowed: {_ALLOWED}")
    if ema is not None and kind not in (".pt", ".pth"):
        raise CheckpointError(f"ema: a {kind or 'folder'} holds one set of weights; pass state=..., and leave ema out")
    together.prepare()
    wait()
    weights = _full(model) if state is None else {}
    averages = _full(ema) if isinstance(ema, nn.Module) else None
    problem = None
    try:
        if together.rank() == 0:
            weights = _apart("state", state) if state is not None else weights
            averages = _apart("ema", ema) if isinstance(ema, Mapping) else averages
            _write(path, kind, unwrap(model), weights, averages)
    except Exception as error:
        problem = error
    together.everyones(None, problem)


def _write(
    path: Path, kind: str, model: nn.Module, weights: dict[str, Tensor], averages: dict[str, Tensor] | None
) -> None:
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for kind_of, values in (("model", weights), ("ema", averages or {})):
        check_dtypes({f"{kind_of}/{name}": value.dtype for name, value in values.items()})
        check_finite({f"{kind_of}/{name}": value for name, value in values.items() if name not in buffers})
    if kind == ".safetensors":
        _in_one_step(path, lambda to: save_file(weights, to, metadata={"format": "pt"}))
    elif kind:
        content = weights if averages is None else {"model": weights, "ema": averages}
        _in_one_step(path, lambda to: torch.save(content, to))
    else:
        if not hasattr(model, "to_json_string"):
            raise CheckpointError(
                f"path: got the folder {path}, but {type(model).__name__} is no model of diffusers; allowed: a "
                ".safetensors or .pt file"
            )
        config = json.loads(cast(Any, model).to_json_string())
        # fully_shard and others give the class another name.
        config["_class_name"] = next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("diffusers."))
        path.mkdir(parents=True, exist_ok=True)
        file = path / f"{_STEMS[0]}.safetensors"
        _in_one_step(file, lambda to: save_file(weights, to, metadata={"format": "pt"}))
        disk.replace(path / "config.json", json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        _remove_several(path)


def _remove_several(folder: Path) -> None:
    """What lay there as several files, which readers would take; the new file counts once their index is gone."""
    index = folder / f"{_STEMS[0]}.safetensors.index.json"
    if os.path.lexists(index):
        index.unlink()
        disk.flush(folder)
    for entry in list(os.scandir(folder)):
        if re.fullmatch(rf"{_STEMS[0]}-\d{{5}}-of-\d{{5}}\.safetensors", entry.name):
            os.unlink(entry.path)


def _in_one_step(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    try:
        write(beside)
        disk.flush(beside)
        os.rename(beside, path)
        disk.flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _apart(argument: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that was given, on the CPU, nothing shared: tied weights are written under each name."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{argument}: got {type(value).__name__} for {name!r}; allowed: tensors")
    return {name: _copy(value.detach()) for name, value in state.items()}


def _copy(value: Tensor) -> Tensor:
    return value.cpu().clone(memory_format=torch.contiguous_format)


def _full(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on rank 0, on the CPU, nothing shared; other ranks help to gather it and get {}."""
    whole = {}
    for name, value in unwrap(module).state_dict(keep_vars=True).items():
        value = value.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if together.rank() == 0:
            whole[name] = _copy(value)
    return whole


# Shape, and how to read it, by name.
_Found = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def _read(path: Path, which: str | None, model: nn.Module) -> _Found:
    if path.is_dir():
        found = _read_folder(path, model)
    elif path.suffix == ".safetensors":
        found = _read_safetensors(path)
    elif path.suffix in (".pt", ".pth"):
        state = published.read(path, which)
        found = {name: (tuple(value.shape), value.clone) for name, value in state.items()}
    else:
        raise DamagedCheckpointError(f"path: got {path.name}; allowed: {_ALLOWED}. Nothing was opened")
    if which is not None and path.suffix not in (".pt", ".pth"):
        raise CheckpointError(f"which: got {which!r}; {path.name} holds one set of weights, leave it out")
    for prefix in ("module.", "_orig_mod."):  # of DDP and torch.compile
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _read_safetensors(path: Path) -> _Found:
    file = open_file(path)
    return {name: (tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)) for name in file.keys()}  # noqa: SIM118


def _read_folder(path: Path, model: nn.Module) -> _Found:
    config = path / "config.json"
    if os.path.lexists(config):
        found = jsonfile.read(config, 1 << 24)
        name = found.get("_class_name") if isinstance(found, dict) else None
        known = {c.__name__ for c in type(unwrap(model)).__mro__}
        if name is not None and name not in known:
            raise CheckpointError(
                f"{config}: is of a {str(name)[:80]!r}; the model is a {type(unwrap(model)).__name__}"
            )
    for stem in _STEMS:
        if os.path.lexists(index := path / f"{stem}.safetensors.index.json"):
            return _read_several(path, index)
        if os.path.lexists(one := path / f"{stem}.safetensors"):
            return _read_safetensors(one)
    inside = [name for name in ("transformer", "unet") if (path / name).is_dir()]
    hint = f"; pass {path / inside[0]}" if inside else "; files that are pickles (.bin, .pt) in a folder are not read"
    raise DamagedCheckpointError(f"{path}: holds no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors{hint}")


def _read_several(folder: Path, index: Path) -> _Found:
    content = jsonfile.read(index, 1 << 28)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise DamagedCheckpointError(f"{index}: holds no weight_map of names and files")
    found: _Found = {}
    for name in sorted(set(places.values())):
        if not _SHARD.fullmatch(name):
            raise DamagedCheckpointError(
                f"{index}: names the file {name[:80]!r}; allowed: .safetensors files beside it"
            )
        inside = _read_safetensors(folder / name)
        for key in (key for key, place in places.items() if place == name):
            if key not in inside:
                raise DamagedCheckpointError(f"{folder / name}: does not hold {key[:80]!r}, which the index puts there")
            found[key] = inside[key]
    return found


def _check_names(found: _Found, wanted: Mapping[str, tuple[int, ...]], path: Any) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {found[name][0]} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and found[name][0] != shape
    ]
    told = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("misses", missing), ("has besides", extra), ("has of another shape", shapes))
        if names
    ]
    if told:
        raise CheckpointError(f"{path}: does not fit the model: it {'; it '.join(told)}")
