"""ColossalAI's own engine: the real `Booster`, with TorchDDPPlugin, LowLevelZeroPlugin (stage 1 and 2) or GeminiPlugin.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from opendit import optim
from opendit.config import OptimizerFactory
from opendit.divided import Divided
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


def _use(device: torch.device) -> None:
    accelerator = colossalai().accelerator
    accelerator.set_accelerator(_cpu() if device.type == "cpu" else device.type)


class _Nothing:
    """Stands for a loss whose backward has been: `booster.backward` does what comes after it."""

    def backward(self, *args: object, **kwargs: object) -> None:
        pass


@dataclass(frozen=True)
class Share:
    """What this process steps of one parameter: elements [start, start + length), first in `owner`, then padding.

    `whole`: every process steps all of it.
    """

    owner: Tensor | None
    start: int
    length: int
    whole: bool = False


class _Group(MutableMapping[str, Any]):
    """One group of the user's optimizer, with the model's parameters in place of this process's shares."""

    def __init__(self, inner: dict[str, Any], params: list[nn.Parameter]):
        self._inner, self._params = inner, params

    def __getitem__(self, key: str) -> Any:
        return self._params if key == "params" else self._inner[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "params":
            raise ValueError("optimizer: parameters of a group can't be changed once the engine has divided them")
        self._inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self._inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return repr(dict(self))


class _State(MutableMapping[nn.Parameter, "dict[str, Any]"]):
    """The user's optimizer's state by the model's parameters, divided tensors as `Divided` on the same memory."""

    def __init__(self, inner: Optimizer, shares: Mapping[nn.Parameter, Share]):
        self._inner, self._shares = inner, shares

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Any]:
        share = self._shares[parameter]
        held = self._inner.state.get(share.owner, {}) if share.owner is not None else {}
        return {key: self._outward(value, parameter, share) for key, value in held.items()}

    def _outward(self, value: Any, parameter: nn.Parameter, share: Share) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if share.whole:
            return value.view(parameter.shape)
        return Divided(value.view(-1)[: share.length], share.start, parameter)

    def __setitem__(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        share = self._shares[parameter]
        if share.owner is not None:
            self._inner.state[share.owner] = {k: self._inward(v, share.owner, share) for k, v in state.items()}

    def _inward(self, value: Any, owner: Tensor, share: Share) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        mine = value.to_local() if isinstance(value, Divided) else _range(value, share)
        padded = torch.zeros_like(owner, dtype=value.dtype)
        padded.view(-1)[: share.length] = mine
        return padded

    def __delitem__(self, parameter: nn.Parameter) -> None:
        self._inner.state.pop(self._shares[parameter].owner, None)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (p for p, share in self._shares.items() if share.owner in self._inner.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._shares and self._shares[cast(nn.Parameter, parameter)].owner in self._inner.state


def _range(tensor: Tensor, share: Share) -> Tensor:
    return tensor.detach().reshape(-1)[share.start : share.start + share.length]


class DividedOptimizer(Optimizer):
    """The optimizer that `accelerate` returns where ColossalAI divides the steps among processes.

    `inner` is the user's own, which steps this process's share; its groups and those here are the same but for their
    parameters, so learning rate schedules built on either work. `state` is by the model's parameters.
    """

    @classmethod
    def around(cls, inner: Optimizer, gradients: _ZeroGradients | _GeminiGradients) -> DividedOptimizer:
        """Under the name of `inner`'s class, by which checkpoints know what kind of optimizer a state is for."""
        return cast(DividedOptimizer, type(type(inner).__name__, (cls,), {"__module__": __name__})(inner, gradients))

    def __init__(self, inner: Optimizer, gradients: _ZeroGradients | _GeminiGradients):
        self._divided = False
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": params}
            for group, params in zip(inner.param_groups, gradients.groups, strict=True)
        ]
        super().__init__(groups, inner.defaults)
        self._divided = True
        self.inner = inner
        self.gradients = gradients
        self.param_groups = [_Group(g, p) for g, p in zip(inner.param_groups, gradients.groups, strict=True)]  # type: ignore[misc]
        self.state = _State(inner, gradients.shares)  # type: ignore[assignment]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gradients.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.gradients.zero(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._divided:
            raise ValueError(
                "optimizer: groups can't be added once the engine has divided the parameters; add them before accelerate"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As the user's optimizer would give it in one process, gathered; every process makes this call."""
        return cast("dict[str, Any]", self.gradients.boosted.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a whole state, as `state_dict` gives it; each process keeps its share."""
        self.gradients.boosted.load_state_dict(state_dict)


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
            p.register_hook(self._on_gradient)

    def _share(self, parameter: nn.Parameter) -> Share:
        owner = self.boosted.get_working_to_master_map()[id(parameter)]
        start = min(dist.get_rank() * owner.numel(), parameter.numel())
        return Share(owner, start, min(owner.numel(), parameter.numel() - start))

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
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)  # type: ignore[attr-defined]

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
        parts[:] = side_by_side.split(len(parts[0]))
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
        assert share.owner is not None
        size, world = share.owner.numel(), dist.get_world_size()
        if self.stage == 2:
            mine = grad.to_local() if isinstance(grad, Divided) else _range(grad, share)
            return [nn.functional.pad(mine, (0, size - share.length)).clone()]
        return list(nn.functional.pad(grad.detach().reshape(-1), (0, size * world - grad.numel())).clone().split(size))

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


class _Outputs:
    """What a model gave, with their gradients, in a loss's place: ColossalAI runs the model's part of the backward."""

    def __init__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]):
        self.pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]

    def backward(self, *args: object, **kwargs: object) -> None:
        outputs, gradients = zip(*self.pairs, strict=True)
        torch.autograd.backward(outputs, gradients)


class _Apart(torch.autograd.Function):
    """Cuts the graph at the model's outputs; `run(gradients)` is the backward of what is before the cut."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[[Sequence[Tensor | None]], None], *outputs: Tensor) -> Any:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.enable_grad():
            ctx.run(gradients)
        return (None, None, *(None for _ in gradients))


class _GeminiGradients:
    """Runs Gemini's backward inside the plain one, and shows what it left in its chunks as `.grad`.

    A chunk is a flat range of several parameters, divided among processes, or whole on each where the model is small;
    after a backward it has the gradients, in bf16, until `step`.
    """

    def __init__(self, booster: Any, model: Any, boosted: Any, groups: list[list[nn.Parameter]]):
        self.booster, self.boosted, self.groups = booster, boosted, groups
        self.chunks = model.chunk_manager
        self.shares: dict[nn.Parameter, Share] = {}
        for number, parameter in boosted.id_to_real_params.items():
            _, start, length = boosted.get_offsets(number)
            owner = boosted.id_to_fake_params.get(number)
            whole = bool(self.chunks.get_chunk(parameter).keep_gathered)  # of models below 32 Mi parameters
            share = Share(owner, start, length, whole) if owner is not None else Share(None, 0, 0)
            self.shares[parameter] = share
        self._shown: dict[nn.Parameter, Tensor] = {}
        model.register_forward_pre_hook(lambda *_: self._adopt())
        model.register_forward_hook(self._cut)

    def _cut(self, model: nn.Module, args: object, output: Any) -> Any:
        leaves, tree = tree_flatten(output)
        inside = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not inside:
            return output
        anchor = torch.zeros((), requires_grad=True)
        run = functools.partial(self._backward, inside)
        outside = iter(_Apart.apply(anchor, run, *(leaf.detach() for leaf in inside)))  # type: ignore[no-untyped-call]
        mine = {id(leaf) for leaf in inside}
        return tree_unflatten([next(outside) if id(leaf) in mine else leaf for leaf in leaves], tree)

    def _backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        if self.chunks.accumulating_grads:
            # ColossalAI multiplies what is there by the processes and divides it again after its reduction, which is
            # right where each adds its part to a reduce-scatter; whole ones are added by every process.
            for chunk in self.boosted.chunk16_set:
                if chunk.keep_gathered:
                    chunk.grad_chunk.payload.div_(chunk.pg_size)
        self.booster.backward(_Outputs(outputs, gradients), self.boosted)
        family: list[Divided] = []
        for p, share in self.shares.items():
            mine = self._chunk(p)
            if share.whole:
                p.grad = mine.view(p.shape)
            else:
                family.append(Divided(mine, share.start, p, family))
                p.grad = family[-1]
            self._shown[p] = p.grad

    def _chunk(self, parameter: nn.Parameter) -> Tensor:
        """What this process has of the parameter's gradient, flat, where `step` reads it."""
        owner = self.shares[parameter].owner
        if owner is None:
            return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        begin, end = self.boosted.param_to_range[owner]
        return cast(Tensor, self.boosted.param_to_chunk16[owner].grad_chunk.payload[begin:end])

    def _adopt(self) -> None:
        """What was put into `.grad`, or taken away, since it was shown."""
        for p, shown in self._shown.items():
            if p.grad is None:
                self._chunk(p).zero_()
            elif p.grad is not shown:
                self._chunk(p).copy_(p.grad.to_local() if isinstance(p.grad, Divided) else _range(p.grad, self.shares[p]))
        self._shown.clear()

    def step(self) -> None:
        if not self.chunks.accumulating_grads:
            raise RuntimeError("optimizer: step was called before a backward; Gemini has no gradients then")
        self._adopt()
        self.boosted.step()

    def zero(self, set_to_none: bool) -> None:
        if self.chunks.accumulating_grads:  # of no step yet
            for p in self._shown:
                self._chunk(p).zero_()
        for p in self.shares:
            p.grad = None
        self._shown.clear()


class _Plugin:
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

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class DDP(_Plugin):
    plugin = "ddp"

    def promises(self, setup: Setup) -> list[str]:
        return [
            "ColossalAI's TorchDDPPlugin, which is torch's DDP; everything is whole on every process",
            f"gradients: averaged over the world in {'bf16' if setup.reduction == 'bf16' else 'their own dtype'}",
            "bytes per parameter of n bytes with AdamW: n (parameter) + n (gradient) + 2n (moments)",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        _use(setup.device)
        booster = colossalai().booster
        plugin = booster.plugin.TorchDDPPlugin(gradient_as_bucket_view=True)
        wrapper = booster.Booster(plugin=plugin).boost(model)[0].module
        if setup.reduction == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapper.register_comm_hook(None, bf16_compress_hook)
        if callable(optimizer):
            optimizer = optim.build(optimizer, model)
        return Placed(wrapper, optimizer, _lines(self.promises(setup)))

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        return cast("AbstractContextManager[None]", cast(Any, placed).no_sync())

    def undo(self, placed: nn.Module) -> nn.Module:
        return cast(nn.Module, placed.module)


class ZeRO(_Plugin):
    def __init__(self, stage: int):
        self.stage = stage
        self.plugin = f"zero{stage}"

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        super().check(model, optimizer, setup)
        _check_optimizer(self.plugin, model, optimizer)
        _check_parameters(self.plugin, model, (torch.float32, torch.float64))

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
        _use(setup.device)
        inner = optim.build(optimizer, model) if callable(optimizer) else optimizer
        assert inner is not None
        _check_kind(self.plugin, inner)
        groups = [[p for p in group["params"] if p.requires_grad] for group in inner.param_groups]
        plugin = colossalai().booster.plugin.LowLevelZeroPlugin(
            stage=self.stage,
            precision="fp32",  # converts nothing: its optimizer goes by the parameters' dtype
            cast_inputs=False,
            master_weights=False,  # it would copy what is fp32 already
            overlap_communication=setup.device.type == "cuda",
            communication_dtype=torch.bfloat16 if setup.reduction == "bf16" else None,
        )
        booster = colossalai().booster.Booster(plugin=plugin)
        _alike(model)
        _, boosted, *_ = booster.boost(model, inner)
        _gradients[model] = gradients = _ZeroGradients(booster, boosted, groups, self.stage)
        wrapper = DividedOptimizer.around(inner, gradients)
        # The model itself: ColossalAI's wrapper around it casts inputs, which nobody asked for, and nothing else.
        return Placed(model, wrapper, _lines(self.promises(setup)))

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        if self.stage == 2:
            return contextlib.nullcontext()  # whole gradients are nowhere kept, by promise
        return cast("AbstractContextManager[None]", _gradients[placed].boosted.no_sync())

    def undo(self, placed: nn.Module) -> nn.Module:
        raise _stays(self.plugin)


class Gemini(_Plugin):
    plugin = "gemini"
    moves_parameters = "Gemini gathers parameters into chunks that it frees"

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        super().check(model, optimizer, setup)
        _check_optimizer(self.plugin, model, optimizer)
        _check_parameters(self.plugin, model, (torch.float32, torch.bfloat16))
        if setup.precision != "bf16" and any(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad):
            raise ValueError(
                f"precision: got {setup.precision!r} with ColossalAI's 'gemini', which computes with bf16 parameters (fp32 "
                "masters are its optimizer's); allowed: 'bf16', or a model in bf16. Ask for it, or choose engine='torch'"
            )
        if setup.reduction != "bf16":
            raise ValueError(
                f"reduction: got {setup.reduction!r} with ColossalAI's 'gemini', which averages gradients in bf16; "
                "allowed: 'bf16'. Ask for it, or choose engine='torch'"
            )

    def promises(self, setup: Setup) -> list[str]:
        where = "on the host" if setup.device.type == "cuda" else "where the model is: there is no GPU to page from"
        return [
            "ColossalAI's GeminiPlugin, static placement: chunks of parameters, each process holds 1/N of each chunk "
            "(below 32 Mi parameters: all of it)",
            f"parameters, gradients and optimizer states are {where}; chunks are gathered where they are used",
            "all parameters, inputs and buffers are rounded to bf16, frozen ones too; fp32 masters; gradients in bf16",
            "bytes per parameter with HybridAdam over N processes: 16/N, and a few gathered chunks at a time",
            "the optimizer is a wrapper around yours, which it has as .inner; schedules may be built on either",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        _use(setup.device)
        _check_modules(model)
        inner = optim.build(optimizer, model) if callable(optimizer) else optimizer
        assert inner is not None
        allowed = importlib.import_module("colossalai.zero.gemini.gemini_optimizer")._AVAIL_OPTIM_LIST
        if type(inner) not in allowed:
            raise ValueError(
                f"optimizer: got {type(inner).__name__} with ColossalAI's 'gemini'; allowed: "
                f"{', '.join(sorted(cls.__name__ for cls in allowed))} of colossalai.nn.optimizer. Build one of them, "
                "HybridAdam for AdamW, or choose engine='torch'"
            )
        for group in inner.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        groups = [list(group["params"]) for group in inner.param_groups]
        _alike(model)
        on_gpu = setup.device.type == "cuda"
        plugin = colossalai().booster.plugin.GeminiPlugin(
            precision="bf16",
            enable_gradient_accumulation=True,
            offload_optim_frac=float(on_gpu),
            offload_param_frac=float(on_gpu),
            pin_memory=on_gpu,
            enable_async_reduce=on_gpu,
        )
        booster = colossalai().booster.Booster(plugin=plugin)
        placed, boosted, *_ = booster.boost(model, inner)
        wrapper = DividedOptimizer.around(inner, _GeminiGradients(booster, placed, boosted, groups))
        return Placed(placed, wrapper, _lines(self.promises(setup)))

    def undo(self, placed: nn.Module) -> nn.Module:
        raise _stays(self.plugin)


def _check_modules(model: nn.Module) -> None:
    """Gemini gathers a parameter when a torch function is called with it."""
    for name, module in model.named_modules():
        if getattr(type(module), "_opendit_fusion", "adaln") == "block":
            raise ValueError(
                f"fusion: {name} is one function with ColossalAI's 'gemini', which gathers parameters for torch's own "
                "functions only; allowed: fusion='adaln'. Ask for it, or choose engine='torch'"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"compile: {name} is compiled with ColossalAI's 'gemini', which gathers parameters as torch's functions "
                "are called; allowed: compile=False. Leave it out, or choose engine='torch'"
            )


_gradients: WeakKeyDictionary[nn.Module, _ZeroGradients] = WeakKeyDictionary()


def _stays(plugin: str) -> ValueError:
    return ValueError(
        f"model: it was placed by ColossalAI's {plugin!r}, which can't be undone; allowed: models that it did not "
        "divide. Save a checkpoint, and load it into a model that is built anew"
    )


def _lines(promises: list[str]) -> tuple[str, ...]:
    return (f"over {dist.get_world_size()} processes, {dist.get_backend()}", *promises)


def _alike(model: nn.Module) -> None:
    """Every process begins with rank 0's parameters and buffers, as with DDP."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)


def _check_optimizer(plugin: str, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None) -> None:
    if optimizer is None:
        raise ValueError(
            f"optimizer: got none with plugin={plugin!r}, which divides its steps; pass the optimizer, or a factory, "
            "or choose plugin='ddp'"
        )
    if not isinstance(optimizer, Optimizer):
        return
    _check_kind(plugin, optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if left:
        raise ValueError(
            f"optimizer: got one without {len(left)} trainable parameters, such as {left[0]}, with plugin={plugin!r}, "
            "which averages gradients of those it holds; allowed: one with all of them. Freeze the others "
            "(requires_grad_(False)), or choose plugin='ddp'"
        )
    if any(optimizer.state.get(p) for p in held):
        raise ValueError(
            f"optimizer: got one that has taken steps, with plugin={plugin!r}, which divides its state anew; call "
            "accelerate before the first step, and load_state_dict on what it returns"
        )


def _check_kind(plugin: str, optimizer: Optimizer) -> None:
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _SHAPED:
            raise ValueError(
                f"optimizer: got {cls.__name__} with plugin={plugin!r}, where it would see flat ranges of parameters; "
                "allowed: optimizers that step each element by itself, such as AdamW. Choose one, or plugin='ddp'"
            )


def _check_parameters(plugin: str, model: nn.Module, dtypes: tuple[torch.dtype, ...]) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {p.dtype for p in trained.values()}
    if len(found) > 1 or not found <= set(dtypes):
        raise ValueError(
            f"model: got trainable parameters in {_names(found)} with plugin={plugin!r}; allowed: all in one of "
            f"{_names(dtypes)}. Convert them with model.to(dtype) and give a lower precision as precision=..., or choose "
            "plugin='ddp'"
        )
    for name, p in trained.items():
        if not p.is_contiguous():
            raise ValueError(
                f"model: got {name} of shape {tuple(p.shape)} with strides {p.stride()}; allowed with "
                f"plugin={plugin!r}: contiguous parameters. Call .contiguous() on it, or choose plugin='ddp'"
            )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


ENGINES = (DDP(), ZeRO(1), ZeRO(2), Gemini())
