"""What is measured: a model with the arguments of a training step and of a sampling step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit.bench.dit import MODELS, DiT

Arguments = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """`model` is a template in fp32 on the device; copies of it are measured.

    batch: the model's arguments in training, whose first dimension is `samples`. evaluated: those of a sampling step,
    which gives `drawn` samples. loss: of a model and `batch`. low_weights: whether sampling may be by weights in bf16.
    """

    name: str
    model: nn.Module
    batch: Arguments
    evaluated: Arguments
    samples: int
    drawn: int
    loss: Callable[[nn.Module], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    low_weights: bool
    setting: str
    family: str | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def job_of_name(name: str, image_size: int, batch: int, device: torch.device, family: str | None = None) -> Job:
    """A plain DiT by its published name, on random latents of an image of `image_size` px.

    Raises `ValueError` for a name or size that there is no model for.
    """
    if name not in MODELS:
        raise ValueError(
            f"model: got {name!r}; allowed: {', '.join(MODELS)}, or PACKAGE.MODULE:FUNCTION, which returns verify's "
            "arguments as a mapping"
        )
    if image_size < 8 or image_size % 8:
        raise ValueError(f"image_size: got {image_size}; allowed: a multiple of 8, for latents are an eighth of it")
    if batch < 1:
        raise ValueError(f"batch: got {batch}; allowed: 1 or more")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            model = DiT(name, image_size // 8)
        x0 = torch.randn(batch, model.channels, model.size, model.size, device=device)
        noise, t = torch.randn_like(x0), torch.rand(batch, device=device)
        y = torch.randint(model.num_classes, (batch,), device=device)
    share = t.view(-1, 1, 1, 1)
    arguments = {"x": (1 - share) * x0 + share * noise, "t": 1000 * t, "y": y}
    target = noise - x0

    def loss(net: nn.Module) -> Tensor:
        predicted: Tensor = net(**_like(net, arguments))
        return (predicted - target.to(_kind(net))).square().mean()

    both = {key: torch.cat([value, value]) for key, value in arguments.items()}
    both["y"][batch:] = model.num_classes
    return Job(
        name=name,
        model=model,
        batch=arguments,
        evaluated=both,
        samples=batch,
        drawn=batch,
        loss=loss,
        optimizer=_adam(device),
        low_weights=True,
        setting=f"{image_size} px, batch {batch}",
        family=family,
    )


def job_of_model(name: str, given: Mapping[str, Any], device: torch.device, family: str | None = None) -> Job:
    """A user's own model: `given` is what `opendit.verify` takes, "model" and "batch", and "loss", "optimizer".

    Raises `ValueError` and `TypeError` for a mapping that can't be used.
    """
    unknown = sorted(set(given) - {"model", "batch", "loss", "optimizer", "ema"})
    if unknown or not {"model", "batch"} <= set(given):
        raise ValueError(f"{name}: got {sorted(given)}; allowed: model and batch, and loss, optimizer")
    model, batch = given["model"], given["batch"]
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: its model is {type(model).__name__}; allowed: a torch.nn.Module")
    if not isinstance(batch, (Sequence, Mapping)) or isinstance(batch, str) or not batch:
        raise TypeError(f"{name}: its batch is {type(batch).__name__}; allowed: the model's arguments")
    values = batch.values() if isinstance(batch, Mapping) else batch
    sizes = {len(value) for value in values if isinstance(value, Tensor) and value.dim()}
    if len(sizes) != 1:
        raise ValueError(f"{name}: its batch has first dimensions {sorted(sizes)}; allowed: one same number")
    moved = _moved(batch, device)
    asked = given.get("loss")

    def loss(net: nn.Module) -> Tensor:
        arguments = _like(net, moved)
        args, kwargs = ((), arguments) if isinstance(arguments, Mapping) else (arguments, {})
        if asked is not None:
            value: Tensor = asked(net, *args, **kwargs)
            return value
        return tensor_of(net(*args, **kwargs)).square().mean()

    (samples,) = sizes
    return Job(
        name=name,
        model=_without_zeros(model, seed=0).to(device),
        batch=moved,
        evaluated=moved,
        samples=samples,
        drawn=samples,
        loss=loss,
        optimizer=given.get("optimizer") or _adam(device),
        low_weights=False,
        setting=f"batch {samples}",
        family=family,
    )


def evaluate(net: nn.Module, arguments: Arguments) -> Tensor:
    """The model's output for a sampling step's arguments."""
    found = _like(net, arguments)
    return tensor_of(net(**found) if isinstance(found, Mapping) else net(*found))


def tensor_of(output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    if not isinstance(first, Tensor):
        raise TypeError(f"model: it returned {type(output).__name__}; allowed: a tensor, a tuple, or .sample")
    return first


def _adam(device: torch.device) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    on_gpu = device.type == "cuda"
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=on_gpu or None)


def _kind(net: nn.Module) -> torch.dtype:
    return next(p.dtype for p in net.parameters() if p.is_floating_point())


def _like(net: nn.Module, arguments: Arguments) -> Any:
    """In fp64 where the model is; other models take fp32 as callers have it."""
    kind = torch.float64 if _kind(net) == torch.float64 else torch.float32
    cast = {k: v.to(kind) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in _items(arguments)}
    return cast if isinstance(arguments, Mapping) else list(cast.values())


def _without_zeros(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which no trained parameter is zero: behind adaLN-Zero's gates there would be nothing to compare."""
    twin = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return twin


def _moved(arguments: Arguments, device: torch.device) -> Arguments:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _items(arguments)}
    return moved if isinstance(arguments, Mapping) else list(moved.values())


def _items(arguments: Arguments) -> list[tuple[Any, Any]]:
    return list(arguments.items()) if isinstance(arguments, Mapping) else list(enumerate(arguments))
