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
import weakref
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
from opendit.engines.colossalai_shared import (
    Plugin,
    alike,
    check_kind,
    check_optimizer,
    check_parameters,
    colossalai,
    lines,
    stays,
    trained_groups,
    use,
)
from opendit.engines.ddp import check_reduction
from opendit.engines.engine import Placed, Setup


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
        check_kind(self.plugin, inner)
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


ENGINES = (DDP(), ZeRO(1), ZeRO(2))
