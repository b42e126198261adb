"""ColossalAI's engine: the real `Booster`, with TorchDDPPlugin or LowLevelZeroPlugin (stage 1 and 2).

ColossalAI wants `booster.backward(loss, optimizer)` where users write `loss.backward()`. What that call does beyond the
backward itself is done when the backward is over:

    loss.backward() ── first gradient: .grad of every parameter is put away ── … ── engine's callback:
                       booster.backward(nothing left to do)    ColossalAI reduces its buckets into its stores
                       p.grad = a view of its store            whole (stage 1), or this process's part (`Divided`)

so clipping and whatever else is done to `.grad` in place reaches the store that `step` reads. None of ColossalAI's
classes is changed; on CPUs it is given an accelerator through its public `set_accelerator`.

Bytes per parameter of n bytes, AdamW, N processes: stage 1 n + n (gradient) + 2n/N, stage 2 n + 3n/N.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit import optim
from opendit.config import OptimizerFactory
from opendit.divided import Divided
from opendit.divided_optimizer import DividedOptimizer, Share
from opendit.engines.ddp import check_reduction
from opendit.engines.engine import Placed, Setup

logger = logging.getLogger("opendit")

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


class _Nothing:
    """Stands for a loss whose backward has been: `booster.backward` does what comes after it."""

    def backward(self, *args: object, **kwargs: object) -> None:
        pass


class _ZeroGradients:
    """Keeps `.grad` of parameters and ColossalAI's gradient stores one thing, whatever the plain loop does.

    A store has one parameter's gradient in equal parts, one per process, the last one padded: all of them with stage 1,
    this process's with stage 2.
    """

    def __init__(self, booster: Any, boosted: Any, groups: list[list[nn.Parameter]], stage: int):
        self.booster, self.boosted, self.groups, self.stage = booster, boosted, groups, stage
        self.params = [(i, p) for i, group in enumerate(groups) for p in group]
        self.shares = {p: self._share(p) for _, p in self.params}
        self._shown: dict[nn.Parameter, Tensor | None] = {}
        self._running = self._local = False
        for _, p in self.params:
            p.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def _share(self, parameter: nn.Parameter) -> Share:
        owner = self.boosted.get_working_to_master_map()[id(parameter)]
        size, n = owner.numel(), parameter.numel()
        start = min(dist.get_rank() * size, n)
        return Share(owner, start, min(size, n - start), size)

    def _parts(self, group: int, parameter: nn.Parameter) -> list[Tensor]:
        store = self.boosted.pid_to_grad_store[id(parameter)]
        return cast("list[Tensor]", store.get_partitioned_gradients_by_param_id(group, id(parameter)))

    def _on_gradient(self, gradient: Tensor) -> None:
        """The first of a backward: nothing has been added to any `.grad` yet."""
        if not self._running:
            self._running = True
            if not self._local:
                self._adopt()
                for _, p in self.params:
                    p.grad = None
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._running = False
        self._local = not self.boosted.require_grad_sync
        if not self._local:
            self.booster.backward(_Nothing(), self.boosted)
            self._show()

    def _show(self) -> None:
        self._family: list[Divided] = []
        for group, p in self.params:
            p.grad = self._shown[p] = self._view(p, self._parts(group, p))

    def _view(self, parameter: nn.Parameter, parts: list[Tensor]) -> Tensor | None:
        if not parts:
            return None
        share, shown = self.shares[parameter], self._shown.get(parameter)
        if self.stage == 2:
            self._family.append(Divided(parts[0][: share.length], share.start, parameter, self._family))
            return self._family[-1]
        if shown is not None and shown.data_ptr() == parts[0].data_ptr():
            return shown  # ColossalAI added to it
        # Its parts lie in a bucket, those of one process together; side by side they are a gradient.
        side_by_side = torch.cat(parts)
        parts[:] = torch.split(side_by_side, len(parts[0]))
        return side_by_side[: parameter.numel()].view(parameter.shape)

    def _adopt(self) -> None:
        """What was put into `.grad`, or taken away, since it was shown."""
        if all(p.grad is self._shown.get(p) for _, p in self.params):
            return
        parts = {p: self._parts(i, p) if p.grad is self._shown.get(p) else self._divide(p) for i, p in self.params}
        self.boosted.zero_grad_stores()
        for group, p in self.params:
            for part in parts[p]:
                store = self.boosted.pid_to_grad_store[id(p)]
                store.append_gradients_by_param_id(part, group, id(p))
        self._show()

    def _divide(self, parameter: nn.Parameter) -> list[Tensor]:
        """`.grad` as the store has it."""
        grad, share = parameter.grad, self.shares[parameter]
        if grad is None:
            return []
        if self.stage == 2:
            return [nn.functional.pad(share.of(grad), (0, share.size - share.length)).clone()]
        padding = share.size * dist.get_world_size() - grad.numel()
        everything = nn.functional.pad(grad.detach().reshape(-1), (0, padding)).clone()
        return list(torch.split(everything, share.size))

    def step(self) -> None:
        if self._local or not self.boosted.require_grad_sync:
            raise RuntimeError(
                "optimizer: step was called while gradients are not averaged yet; run the last micro-batch's forward "
                "and backward, and step, outside of opendit.no_sync"
            )
        self._adopt()
        self.boosted.step()

    def zero(self, set_to_none: bool) -> None:
        self._running = self._local = False
        if set_to_none:
            self.boosted.zero_grad()
            self._shown.clear()
            return
        self.boosted.zero_bucket_stores()
        for _, p in self.params:
            if p.grad is not None:
                p.grad.zero_()


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


class DDP(Plugin):
    plugin = "ddp"

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        check_reduction(setup)
        super().check(model, optimizer, setup)

    def promises(self, setup: Setup) -> list[str]:
        return [
            "ColossalAI's TorchDDPPlugin, which is torch's DDP; everything is whole on every process",
            f"gradients: averaged over the world in {'bf16' if setup.reduction == 'bf16' else 'their own dtype'}",
            "bytes per parameter of n bytes with AdamW: n (parameter) + n (gradient) + 2n (moments)",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        use(setup.device)
        booster = colossalai().booster
        plugin = booster.plugin.TorchDDPPlugin(gradient_as_bucket_view=True)
        wrapper = booster.Booster(plugin=plugin).boost(model)[0].module
        if setup.reduction == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapper.register_comm_hook(None, bf16_compress_hook)
        if callable(optimizer):
            optimizer = optim.build(optimizer, model)
        return Placed(wrapper, optimizer, lines(self.promises(setup)))

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        return cast("AbstractContextManager[None]", cast(Any, placed).no_sync())

    def undo(self, placed: nn.Module) -> nn.Module:
        return cast(nn.Module, placed.module)


class ZeRO(Plugin):
    def __init__(self, stage: int):
        self.stage = stage
        self.plugin = f"zero{stage}"

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        super().check(model, optimizer, setup)
        check_optimizer(self.plugin, model, optimizer)
        check_parameters(self.plugin, model, (torch.float32, torch.float64))

    def promises(self, setup: Setup) -> list[str]:
        gradient = "n (gradient)" if self.stage == 1 else "n/N (gradient)"
        return [
            f"ColossalAI's LowLevelZeroPlugin, stage {self.stage}: every process steps 1/N of each parameter",
            f"gradients: averaged over the world in {'bf16' if setup.reduction == 'bf16' else 'their own dtype'}, "
            + ("whole on every process" if self.stage == 1 else "each process keeps its part (opendit.divided)"),
            f"bytes per parameter of n bytes with AdamW over N processes: n (parameter) + {gradient} + 2n/N (moments)",
            "the optimizer is a wrapper around yours, which it has as .inner; schedules may be built on either",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        use(setup.device)
        inner = optim.build(optimizer, model) if callable(optimizer) else optimizer
        assert inner is not None
        _check_kind(self.plugin, inner)
        groups = trained_groups(inner)
        plugin = colossalai().booster.plugin.LowLevelZeroPlugin(
            stage=self.stage,
            precision="fp32",  # converts nothing: its optimizer goes by the parameters' dtype
            cast_inputs=False,
            master_weights=False,  # it would copy what is fp32 already
            overlap_communication=setup.device.type == "cuda",
            communication_dtype=torch.bfloat16 if setup.reduction == "bf16" else None,
        )
        booster = colossalai().booster.Booster(plugin=plugin)
        alike(model)
        _, boosted, *_ = booster.boost(model, inner)
        gradients = _ZeroGradients(booster, boosted, groups, self.stage)
        _gradients[model] = weakref.ref(gradients)
        wrapper = DividedOptimizer.around(inner, gradients)
        # The model itself: ColossalAI's wrapper around it casts inputs, which nobody asked for, and nothing else.
        return Placed(model, wrapper, lines(self.promises(setup)))

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        if self.stage == 2:
            return contextlib.nullcontext()  # whole gradients are nowhere kept, by promise
        gradients = _gradients[placed]()
        if gradients is None:
            raise ValueError("optimizer: the wrapper that accelerate returned is gone; keep it, and step with it")
        return cast("AbstractContextManager[None]", gradients.boosted.no_sync())

    def undo(self, placed: nn.Module) -> nn.Module:
        raise stays(self.plugin)


# The wrapper has them, and they have the parameters.
_gradients: WeakKeyDictionary[nn.Module, weakref.ref[_ZeroGradients]] = WeakKeyDictionary()


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
    _check_kind(plugin, optimizer)
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


def _check_kind(plugin: str, optimizer: Optimizer) -> None:
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


ENGINES = (DDP(), ZeRO(1), ZeRO(2))
