"""fp16's loss scale S, always a power of two: how it grows and falls, and how parameters' gradients lose it again.

    backward      dout·S enters the model (opendit/patch/precision.py), every gradient inside is S times its own
    a parameter   its gradient is fp32 before it is accumulated, and is divided by S there, which is exact:
                      plain, DDP     a hook on the parameter, before accumulation and before DDP's all-reduce
                      FSDP2          the divisor of its reduce-scatter: processes·S
    a step        overflow anywhere: S ← S/2.  2000 steps without: S ← 2·S.  As torch.amp.GradScaler's

So `parameter.grad` holds true gradients whenever the caller sees it, whatever was accumulated or clipped.

A parameter's whole gradient is divided. What reaches it other than through the model's forward (a penalty on weights in
the loss, a sublayer that is called by itself) was not multiplied, and would come out S times too small. FSDP2 has to
reduce in fp32, as it does by default; in fp16 the division would lose what the scale saved.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from opendit.patch.precision import SCALES
from opendit.sharded_ema import gathers

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
# Far beyond any use, and far from fp32's ends.
SMALLEST, LARGEST = 2.0**-32, 2.0**32


class LossScale:
    """S of one model, and its hooks.

    `settle` is called before S is used: what a step on the device came to may still be unknown here.
    """

    def __init__(self, model: nn.Module, settle: Callable[[], None] = lambda: None) -> None:
        self.value, self.good_steps = INITIAL, 0
        self._settle = settle
        self._tensors: dict[torch.device, Tensor] = {}
        self._hooked: dict[int, Any] = {}
        # Weakly, as everything here: `SCALES` must not keep the model.
        self._sharded = [weakref.ref(m) for m in model.modules() if gathers(m)]
        divided = {id(p) for p in model.parameters() if hasattr(p, "device_mesh")}
        this = weakref.ref(self)
        for p in model.parameters():
            if p.requires_grad and id(p) not in divided:
                self._hooked[id(p)] = cast(Any, p).register_hook(lambda gradient: _unscaled(this(), gradient))
        self.known = {*divided, *self._hooked}
        SCALES[id(model)] = self
        self._forget = weakref.finalize(model, SCALES.pop, id(model), None)
        self._set(self.value)

    def current(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(S, 1/S) as fp32 scalars on `device`, in memory that stays where it is."""
        self._settle()
        if device not in self._tensors:
            self._tensors[device] = torch.tensor([self.value, 1 / self.value], device=device)
        both = self._tensors[device]
        return both[0], both[1]

    def update(self, overflowed: bool) -> None:
        """After a step: what `torch.amp.GradScaler` does."""
        if overflowed:
            self.good_steps = 0
            self._set(max(self.value * BACKOFF, SMALLEST))
        elif self.good_steps + 1 == INTERVAL:
            self.good_steps = 0
            self._set(min(self.value * GROWTH, LARGEST))
        else:
            self.good_steps += 1

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        self.good_steps = int(state["good_steps"])
        self._set(float(state["value"]))

    def remove(self) -> None:
        """Takes every hook off. What was sharded keeps its divisor, set to the mean over the processes."""
        self._forget()
        for hook in self._hooked.values():
            hook.remove()
        self._set(1.0)

    def _set(self, value: float) -> None:
        self.value = value
        for both in self._tensors.values():
            both.copy_(torch.tensor([value, 1 / value]))
        for sharded in self._sharded:
            module: Any = sharded()
            if module is None:
                continue
            processes, shards = _processes(module)
            # A sum, and the division after it: gloo can't multiply on the way. Where there is nothing to scatter, torch
            # divides in place of that, and would do so again after the sum.
            module.set_force_sum_reduction_for_comms(shards > 1)
            module.set_gradient_divide_factor(processes * value)


def _unscaled(scale: LossScale | None, gradient: Tensor) -> Tensor:
    return gradient if scale is None else gradient * scale.current(gradient.device)[1].to(gradient.dtype)


def _processes(module: Any) -> tuple[int, int]:
    """Over how many processes gradients of `module`'s own parameters are averaged; over how many of them divided."""
    for p in module.parameters():
        if hasattr(p, "device_mesh"):
            mesh = p.device_mesh
            shards = math.prod(mesh.size(i) for i, placement in enumerate(p.placements) if placement.is_shard())
            return int(mesh.size()), shards
    return 1, 1
