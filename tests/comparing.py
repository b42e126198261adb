"""Runs a model forward and backward, and compares two runs tensor by tensor."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from opendit.doubles import keeping_doubles
from tests.tiny_models import Tiny, randomise

Results = dict[str, torch.Tensor]


def build(tiny: Tiny, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """A randomised model. Upstream's timestep embedder runs in fp32 only, so its sinusoid is cast by a hook."""
    model = randomise(tiny.build()).to(device, dtype)
    if hasattr(model, "t_embedder"):
        model.t_embedder.mlp.register_forward_pre_hook(_cast_to_weights)
    return model


def exactly(tiny: Tiny, dtype: torch.dtype = torch.float64) -> AbstractContextManager[Any]:
    """A context in which fp64 is computed in fp64, also by models that round to fp32 on the way."""
    return keeping_doubles(tiny.rounds and dtype == torch.float64)


def _cast_to_weights(mlp: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].to(mlp[0].weight.dtype),)


def run(model: nn.Module, tiny: Tiny, *, train: bool = True, autocast: torch.dtype | None = None) -> Results:
    """The output, the gradient of the input, and the gradient of every parameter, by name."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    args, kwargs = tiny.inputs(parameter.dtype, parameter.device)
    args[0].requires_grad_()
    model.train(train)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    with exactly(tiny, parameter.dtype):
        with torch.autocast(parameter.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            out = tiny.output(model(*args, **kwargs))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device, out.dtype)
        (out * weights).sum().backward()
    results = {"output": out.detach(), "input": args[0].grad}
    for name, p in model.named_parameters():
        if p.grad is not None:
            results[name] = p.grad
    return {name: value.detach().double().cpu().clone() for name, value in results.items()}


# Gradients that are zero in exact arithmetic (softmax does not see a constant added to every key), so that
# only rounding is left of them: they are measured against the gradient of the weight beside them.
NULL_GRADIENTS = ("to_k.bias", "add_k_proj.bias", "k_norm.bias", "norm_k.bias")
# What makes the text's queries in SD3's last block, whose answers nobody reads: zeros, and nothing but zeros will do.
UNREAD = ("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")


def relative_errors(actual: Results, expected: Results) -> dict[str, float]:
    """‖a − e‖ / ‖e‖ per tensor. Fails where the two do not hold the same tensors, or there are none."""
    assert actual.keys() == expected.keys()
    assert len(expected) >= 10
    errors = {}
    for name, e in expected.items():
        assert actual[name].shape == e.shape, name
        assert torch.isfinite(actual[name]).all(), name
        if name.endswith(UNREAD) and not e.any():
            errors[name] = float("inf") if actual[name].any() else 0.0
            continue
        beside = name.replace(".bias", ".weight") if name.endswith(NULL_GRADIENTS) else name
        scale = expected[beside].norm()
        assert scale > 0, f"{name} is zero: the comparison would say nothing"
        errors[name] = ((actual[name] - e).norm() / scale).item()
    return errors


def worst(actual: Results, expected: Results) -> tuple[float, str]:
    errors = relative_errors(actual, expected)
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
