"""Root mean square norms, of torch and of users' own files: x / √(mean_D(x²) + eps) · weight.

A block's fused pass, or attention's, computes them, so all that an edit does to one is to say that it was looked at:
its class then tells, in copies and pickles too, that it computes this formula. Called by itself it runs its own
forward.

Those of Llama's descent compute in float32 whatever comes. In float64, where nothing is gained by fusing, they are
called: what is accelerated rounds where the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from opendit.kernels.rmsnorm_modulate import root_mean_square_norm
from opendit.patch.core import REFERENCE, Patched, hooked, patched_class
from opendit.patch.planner import Planner, parameters_of_forward
from opendit.patch.probe import disagreement, own_attributes

# What such norms store besides their weight; anything else might change what they compute, now or later.
_ATTRIBUTES = {"eps", "normalized_shape", "elementwise_affine"}


class RMSNorm(Patched):
    """One that computes the formula in any dtype."""

    weight: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, type(self)._opendit_base.forward(cast(nn.Module, self), x))


class SinglePrecisionRMSNorm(RMSNorm):
    """One that computes it in float32, float64 inputs too."""


class Formula(RMSNorm):
    """What it is compared with."""

    def forward(self, x: Tensor) -> Tensor:
        return root_mean_square_norm(x, self.weight, self.eps)


class NormStandIn(nn.Module):
    """Takes a norm's place where the wiring around it is probed: the formula, in float64 too."""

    def __init__(self, norm: Any, width: int) -> None:
        super().__init__()
        self.weight = None if norm.weight is None else nn.Parameter(torch.empty(width))
        self.eps = norm.eps
        self.__class__ = patched_class(NormStandIn, RMSNorm, REFERENCE)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return root_mean_square_norm(x, self.weight, self.eps)


def is_rms_norm(norm: object) -> bool:
    """Whether `norm` was found to compute the formula, and nothing was put on it since."""
    if not isinstance(norm, RMSNorm) or hooked(cast(nn.Module, norm)):
        return False
    made: type = type(norm)
    return norm._opendit_made is made


def must_be_called(norm: object, dtype: torch.dtype) -> bool:
    """Whether a norm of rows in `dtype` computes in less than the kernels' reference does."""
    return dtype == torch.float64 and isinstance(norm, SinglePrecisionRMSNorm)


def rms_norm(norm: Any, width: int) -> type[RMSNorm] | str:
    """What `norm`, over a last dimension of `width`, is; or why it is none."""
    parameters, weight = dict(norm.named_parameters()), getattr(norm, "weight", None)
    if (
        type(norm) is nn.LayerNorm
        or not isinstance(getattr(norm, "eps", None), float)
        or any(True for _ in norm.children())
        or any(True for _ in norm.buffers())
        or not set(parameters) <= {"weight"}
        or (weight is not None and weight.shape != (width,))
        or not set(own_attributes(norm)) <= _ATTRIBUTES
        or len(parameters_of_forward(norm)) != 1
    ):
        return "it is neither torch's LayerNorm nor a root mean square norm with eps and weight alone"

    def rows(dtype: torch.dtype) -> tuple[Tensor]:
        """So small that eps decides, and large."""
        return (torch.randn(2, 3, width, dtype=dtype) * torch.tensor([1e-3, 1.0, 30.0], dtype=dtype)[:, None],)

    if disagreement(norm, Formula, rows) is None:
        return RMSNorm
    return disagreement(norm, Formula, rows, dtype=torch.float32) or SinglePrecisionRMSNorm


def plan_rms_norms(planner: Planner, norms: Mapping[str, Any], width: int, where: str) -> Callable[[], None] | None:
    """For `norms` by name that are all root mean square norms: what plans them, to be computed by `where`.

    Else each that is none is kept, with the reason.
    """
    found = {
        name: "hooks or another forward are registered on it" if hooked(norm) else planner.once(rms_norm, norm, width)
        for name, norm in norms.items()
    }
    for name, kind in found.items():
        if isinstance(kind, str):
            planner.keep(name, kind)

    def plan() -> None:
        for name, kind in found.items():
            assert not isinstance(kind, str)
            planner.edit(name, kind, f"a root mean square norm, which {where} computes")

    return None if any(isinstance(kind, str) for kind in found.values()) else plan
