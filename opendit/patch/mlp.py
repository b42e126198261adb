"""The transformer's MLP with what stands between its linears in one pass each way.

    x → fc2(GELU(fc1(x)))                                  fc1 D → F, fc2 F → D
    x → w3(SiLU(a) · b),  (a, b) the halves of w12(x)      w12 D → 2·F, w3 F → D

Shapes: x [B, L, D].
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import nn

from opendit.kernels.gelu import APPROXIMATIONS, gelu
from opendit.kernels.swiglu import swiglu
from opendit.patch.core import hooked
from opendit.patch.parts import MlpParts, Sublayer, off, plain_linear
from opendit.patch.planner import Planner, has, parameters_of_forward
from opendit.patch.probe import Inputs, own_attributes


class FusedMlp(Sublayer):
    """timm's Mlp, old and new."""

    uses = ("gelu",)
    fc1: nn.Linear
    act: nn.GELU
    fc2: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._inactive():
            return self._upstream("dropout, a norm or a hook inside", x)
        if x.dim() != 3:
            return self._upstream("its input is not [B, L, D]", x)
        return self.fc2(gelu(self.fc1(x), approximate=self.act.approximate, backend=self._kernel("gelu")))

    def _inactive(self) -> bool:
        """Whether all that may stand between the three parts does nothing."""
        between: tuple[Any, ...] = tuple(getattr(self, name, None) for name in ("drop1", "norm", "drop2", "drop"))
        return off(*between) and type(self.act) is nn.GELU and not hooked(self.act)

    def _parts(self) -> MlpParts | str:
        if not self._inactive():
            return "dropout, a norm or a hook inside"
        if not plain_linear(self.fc1, self.fc2):
            return "its linears are not torch's own, or something was put on them"
        return MlpParts(self.fc1, self.fc2, self.act.approximate == "tanh")


class FusedSwiGLU(Sublayer):
    """DINOv2's SwiGLUFFN, and those copied from it."""

    uses = ("swiglu",)
    w12: nn.Linear
    w3: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            return self._upstream("its input is not [B, L, D]", x)
        return self.w3(swiglu(self.w12(x), backend=self._kernel("swiglu")))

    def _parts(self) -> MlpParts | str:
        return "it is a gated one"


def plan_mlp(planner: Planner, name: str, mlp: Any) -> None:
    """Offers the mixin for a module built like timm's Mlp or DINOv2's SwiGLUFFN, or says why not."""
    if has(mlp, "w12.weight", "w3.weight"):
        _plan_swiglu(planner, name, mlp)
    elif not has(mlp, "fc1.weight", "act", "fc2.weight") or len(parameters_of_forward(mlp)) != 1:
        planner.keep(name, "it is not built like timm's Mlp (fc1, act, fc2)")
    elif type(mlp.act) is not nn.GELU or mlp.act.approximate not in APPROXIMATIONS:
        planner.keep(name, f"its activation is {mlp.act}, not torch's GELU")
    elif not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity | NoneType):
        planner.keep(name, "it normalises between its linears")
    elif own_attributes(mlp):
        planner.keep(name, f"its forward may read what it stores: {', '.join(own_attributes(mlp))}")
    else:
        planner.offer(name, mlp, FusedMlp, "GELU: one pass", tokens(mlp.fc1.weight.shape[1]), bypassed=(mlp.act,))


def _plan_swiglu(planner: Planner, name: str, mlp: Any) -> None:
    if set(dict(mlp.named_children())) != {"w12", "w3"} or len(parameters_of_forward(mlp)) != 1:
        planner.keep(name, "it is not built like DINOv2's SwiGLUFFN (w12 and w3, on tokens alone)")
    elif own_attributes(mlp):
        planner.keep(name, f"its forward may read what it stores: {', '.join(own_attributes(mlp))}")
    else:
        planner.offer(name, mlp, FusedSwiGLU, "SiLU(a) · b: one pass", tokens(mlp.w12.weight.shape[1]))


def tokens(width: int) -> Inputs:
    return lambda dtype: (torch.randn(2, 3, width, dtype=dtype),)
