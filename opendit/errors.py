"""How far tensors are from what they should be."""

from __future__ import annotations

from torch import Tensor

Tensors = dict[str, Tensor]


def relative_errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ by name; infinite where one is missing or not finite.

    Tensors that are zero but for rounding (no softmax sees a constant on every key) are held against 1e-6 of the
    largest; those that are zero on both sides say nothing and are left out.
    """
    norms = {name: e.norm().item() for name, e in expected.items()}
    floor = 1e-6 * max(norms.values(), default=0.0)
    errors: dict[str, float] = {}
    for name in {**expected, **found}:
        if name not in expected or name not in found or found[name].shape != expected[name].shape:
            errors[name] = float("inf")
            continue
        difference = (found[name].to(expected[name].device) - expected[name]).norm().item()
        if norms[name] == 0 and difference == 0:
            continue
        error = difference / max(norms[name], floor, 1e-300)
        errors[name] = error if error == error else float("inf")
    return errors


def where_it_moves(steps: Tensors, gradients: Tensors) -> Tensors:
    """`steps` without the elements whose gradient is nothing but rounding: Adam makes whole steps of those."""
    largest = max((g.abs().max().item() for g in gradients.values() if g.numel()), default=0.0)
    kept = {name: gradients[name].abs() > 1e-9 * largest for name in steps if name in gradients}
    return {name: step * kept[name].to(step.device) if name in kept else step for name, step in steps.items()}
