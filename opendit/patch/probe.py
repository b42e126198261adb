"""Asks a module what it computes, instead of trusting its looks.

A user-local class can carry upstream's attribute names and yet compute something else: another chunk order,
a missing bias, a stopped gradient. So before an edit is planned, a small copy of the module, in fp64 on the
CPU with fresh random parameters, is run with its own forward and with the mixin's (reference kernels). They
must agree in every output and every gradient, in training and in evaluation mode. The model itself, its
parameters, its mode and the global random state are not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from opendit.patch.core import REFERENCE, Patched, patched_class

# Agreement of two fp64 evaluations of the same formula; anything wrong is many orders above it.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}

Inputs = Callable[[torch.dtype], tuple[Any, ...]]


class StandIn(nn.Module):
    """x → tanh(x·W): takes a sublayer's place, so that only the wiring around it is probed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.tanh(x @ self.weight)


def disagreement(
    module: nn.Module,
    mixin: type[Patched],
    inputs: Inputs,
    *,
    stand_ins: Mapping[str, nn.Module] | None = None,
    dtype: torch.dtype = torch.float64,
) -> str | None:
    """Why `mixin` must not be given to `module`, or None where both compute the same.

    Args:
        inputs: makes the positional arguments for a dtype; float tensors among them get gradients.
        stand_ins: children to replace in the copy, by name.
        dtype: what to compute in; float32 only for modules that can't run in float64.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        try:
            twin = _small_copy(module, stand_ins or {}, dtype)
        except Exception as error:
            return f"it could not be copied for the check ({type(error).__name__}: {error})"
        for training in (True, False):
            twin.train(training)
            try:
                expected = _run(twin, inputs, dtype)
            except Exception as error:
                return f"its own forward did not run on a small example ({type(error).__name__}: {error})"
            base = type(twin)
            twin.__class__ = patched_class(base, mixin, REFERENCE)
            try:
                actual = _run(twin, inputs, dtype)
            except Exception as error:
                return f"the fused forward does not run on it ({type(error).__name__}: {error})"
            finally:
                twin.__class__ = base
            worst = _difference(expected, actual)
            if worst is not None:
                return f"its forward computes something else than the fused one ({worst})"
    return None


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What two modules must share for one probe to speak for both: types, shapes, plain attributes."""
    rows: list[Any] = []
    for name, child in module.named_modules():
        attributes = {
            key: value if isinstance(value, (int, float, bool, str, tuple, type(None))) else repr(value)
            for key, value in child.__dict__.items()
            if not key.startswith("_") and key != "training"
        }
        rows.append((name, type(child), repr(sorted(attributes.items())), "forward" in child.__dict__))
    rows.extend((name, tuple(p.shape)) for name, p in module.named_parameters())
    rows.extend((name, tuple(b.shape)) for name, b in module.named_buffers())
    return tuple(rows)


def _small_copy(module: nn.Module, stand_ins: Mapping[str, nn.Module], dtype: torch.dtype) -> nn.Module:
    shell = copy.copy(module)
    shell.__dict__ = dict(module.__dict__)
    shell._modules = {**module._modules, **stand_ins}
    # The copy starts on the meta device: neither memory nor the model's own values are needed.
    buffers = {name: b.detach().to("cpu", copy=True) for name, b in shell.named_buffers()}
    twin = copy.deepcopy(shell, memo={id(p): _blank(p) for p in shell.parameters()})
    for child in twin.modules():
        for hooks in (
            child._forward_hooks,
            child._forward_pre_hooks,
            child._backward_hooks,
            child._backward_pre_hooks,
        ):
            hooks.clear()
    twin.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            # Of the order of trained weights: gates are far from zero, nothing saturates.
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.normal_(0.0, 1.0 / max(fan_in, 1) ** 0.5)
        for name, buffer in twin.named_buffers():
            buffer.copy_(buffers[name])
    return twin


def _blank(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="meta"))


def _run(module: nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    args = inputs(dtype)
    leaves = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    output = module(*args)
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    probe = sum((o * torch.randn_like(o)).sum() for o in outputs)
    wanted = leaves + list(module.parameters())
    grads = torch.autograd.grad(probe, wanted, allow_unused=True) if isinstance(probe, torch.Tensor) else ()
    return [o.detach() for o in outputs] + list(grads)


def _difference(expected: list[torch.Tensor | None], actual: list[torch.Tensor | None]) -> str | None:
    if len(expected) != len(actual):
        return f"{len(actual)} results instead of {len(expected)}"
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        what = "output" if index == 0 else f"gradient {index}"
        if (e is None) != (a is None):
            return f"{what} exists in one of them only"
        if e is None or a is None:
            continue
        if e.shape != a.shape or e.dtype != a.dtype:
            return f"{what}: {a.dtype} {tuple(a.shape)} instead of {e.dtype} {tuple(e.shape)}"
        scale = e.abs().max().clamp_min(1e-30)
        error = ((e - a).abs().max() / scale).item()
        if not error <= _TOLERANCE[e.dtype]:
            return f"{what} differs by {error:.1e} of its largest value"
    return None
