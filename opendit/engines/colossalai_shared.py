"""What ColossalAI's plugins share: the package, an accelerator for CPUs, checks of what its optimizers can step."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from opendit import optim
from opendit.config import OptimizerFactory
from opendit.engines.engine import Setup

VERSION = "0.5.0"
INSTALL = f"pip install 'opendit[colossalai]' && pip install --no-deps colossalai=={VERSION}"

# They look at a parameter's shape, or at all of them; an engine that steps on flat ranges gives them neither.
_SHAPED = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


@functools.cache
def colossalai() -> Any:
    """The package, with what is used of it imported; raises `ImportError` that says how to install it."""
    try:
        package = importlib.import_module("colossalai")
        for name in ("accelerator.cpu_accelerator", "booster", "booster.plugin", "zero.low_level"):
            importlib.import_module(f"colossalai.{name}")
    except Exception as error:  # beside another torch it may fail in any way
        missing = f"{error.name} is missing" if isinstance(error, ModuleNotFoundError) else f"{error!r}"
        raise ImportError(
            f"engine: got 'colossalai', but ColossalAI can't be imported ({missing}). Install it with: {INSTALL} "
            "(its metadata pins an old torch; --no-deps leaves yours), or leave engine out"
        ) from error
    if package.__version__ != VERSION:
        raise ImportError(
            f"engine: got 'colossalai', and found ColossalAI {package.__version__}; allowed: {VERSION}. Install it "
            f"with: {INSTALL}, or leave engine out"
        )
    return package


class _NoStream:
    """A CPU has one stream, and nothing to wait for."""

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@functools.cache
def _cpu() -> Any:
    """What ColossalAI's CPU accelerator leaves out, for its public `set_accelerator`."""

    class Cpu(colossalai().accelerator.cpu_accelerator.CpuAccelerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"  # its ZeRO asks for this name, and for nothing else of a GPU

        def synchronize(self, device: object = None) -> None:
            pass

        def Stream(self, *args: object, **kwargs: object) -> _NoStream:
            return _NoStream()

        def current_stream(self, device: object = None) -> _NoStream:
            return _NoStream()

        def stream(self, stream: object) -> AbstractContextManager[None]:
            return contextlib.nullcontext()

    return Cpu()


def use(device: torch.device) -> None:
    accelerator = colossalai().accelerator
    accelerator.set_accelerator(_cpu() if device.type == "cpu" else device.type)


class Plugin:
    """What the plugins have in common."""

    source = "colossalai"
    plugin = ""
    moves_parameters: str | None = None

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        if setup.device.type not in ("cpu", "cuda"):
            raise ValueError(f"engine: got 'colossalai' for a model on {setup.device}; allowed: a CPU or a CUDA device")
        if setup.device.type == "cuda" and setup.device.index not in (None, torch.cuda.current_device()):
            raise ValueError(
                f"engine: got 'colossalai' for a model on {setup.device}, but ColossalAI goes by the current device, "
                f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device({setup.device.index}) first"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"plugin: got {self.plugin!r} for a model without trainable parameters; leave plugin out for sampling"
            )
        colossalai()

    def stepped(self, placed: nn.Module) -> None:
        pass

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def stays(plugin: str) -> ValueError:
    return ValueError(
        f"model: it was placed by ColossalAI's {plugin!r}, which can't be undone; allowed: models that it did not "
        "divide. Save a checkpoint, and load it into a model that is built anew"
    )


def lines(promises: list[str]) -> tuple[str, ...]:
    return (f"over {dist.get_world_size()} processes, {dist.get_backend()}", *promises)


def alike(model: nn.Module) -> None:
    """Every process begins with rank 0's parameters and buffers, as with DDP."""
    for tensor in (*model.parameters(), *model.buffers()):
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, 0)
        tensor.data.copy_(whole)


def trained_groups(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of its groups; frozen ones are taken out, ColossalAI would convert or step them."""
    _check_groups(optimizer)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [list(group["params"]) for group in optimizer.param_groups]


def _check_groups(optimizer: Optimizer) -> None:
    for index, group in enumerate(optimizer.param_groups):
        if not any(p.requires_grad for p in group["params"]):
            raise ValueError(
                f"optimizer: its group {index} holds no parameter that needs gradients; allowed with ColossalAI: "
                "groups with some. Leave the group out"
            )


def check_optimizer(plugin: str, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None) -> None:
    if optimizer is None:
        raise ValueError(
            f"optimizer: got none with plugin={plugin!r}, which divides its steps; pass the optimizer, or a factory, "
            "or choose plugin='ddp'"
        )
    if not isinstance(optimizer, Optimizer):
        return
    check_kind(plugin, optimizer)
    _check_groups(optimizer)
    optim.check_divisible(optimizer, model)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if left:
        raise ValueError(
            f"optimizer: got one without {len(left)} trainable parameters, such as {left[0]}, with plugin={plugin!r}, "
            "which averages gradients of those it holds; allowed: one with all of them. Freeze the others "
            "(requires_grad_(False)), or choose plugin='ddp'"
        )


def check_kind(plugin: str, optimizer: Optimizer) -> None:
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _SHAPED:
            raise ValueError(
                f"optimizer: got {cls.__name__} with plugin={plugin!r}, where it would see flat ranges of parameters; "
                "allowed: optimizers that step each element by itself, such as AdamW. Choose one, or plugin='ddp'"
            )


def check_parameters(plugin: str, model: nn.Module, dtypes: tuple[torch.dtype, ...]) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {p.dtype for p in trained.values()}
    if len(found) > 1 or not found <= set(dtypes):
        raise ValueError(
            f"model: got trainable parameters in {_names(found)} with plugin={plugin!r}; allowed: all in one of "
            f"{_names(dtypes)}. Convert them with model.to(dtype) and ask for a lower precision with precision=..., or "
            "choose plugin='ddp'"
        )
    for name, p in trained.items():
        if not p.is_contiguous():
            raise ValueError(
                f"model: got {name} of shape {tuple(p.shape)} with strides {p.stride()}; allowed with "
                f"plugin={plugin!r}: contiguous parameters. Call .contiguous() on it, or choose plugin='ddp'"
            )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
