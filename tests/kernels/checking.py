"""The one comparison that every kernel test uses, and the mutants must fail.

A case is drawn from a spec's declared inputs, run through the public function and through the reference in float64,
and compared in values and in every gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opendit.kernels.spec import KernelSpec

# Relative to the float64 result, in the norm. float32 arithmetic with one rounding of the result to the named dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """Inputs of one call. dtype is the residual stream's, mod_dtype everything else's."""

    B: int
    L: int
    D: int
    dtype: torch.dtype = torch.float32
    mod_dtype: torch.dtype = torch.float32
    optional: Sequence[str] = ()
    layout: str = "dense"  # see _tokens
    needs: Sequence[str] | None = None  # inputs that require gradients; None: all
    seed: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.B}x{self.L}x{self.D}", str(self.dtype)[6:], str(self.mod_dtype)[6:], self.layout]
        return "-".join([*parts, *self.optional, *(self.needs or ())])


def _tokens(shape: tuple[int, ...], layout: str, **options: Any) -> Tensor:
    B, L, D = shape
    if layout == "transposed":
        return torch.randn(L, B, D, **options).transpose(0, 1)
    if layout == "sliced":
        return torch.randn(B, L + 2, 2 * D, **options)[:, 1 : L + 1, D:]
    if layout == "columns":  # the last dimension is not dense
        return torch.randn(B, D, L, **options).transpose(1, 2)
    if layout == "expanded":
        return torch.randn(1, L, D, **options).expand(B, L, D)
    return torch.randn(B, L, D, **options)


def make_inputs(spec: KernelSpec, case: Case, device: torch.device) -> dict[str, Tensor]:
    """Random inputs, leaf tensors; the [B, D] ones are chunks of one tensor, as adaLN makes them.

    x, q and k are in the residual stream's dtype, everything else in the other one.
    """
    generator = torch.Generator(device).manual_seed(case.seed)
    options: dict[str, Any] = {"device": device, "generator": generator}
    per_sample = [name for name, shape in spec.inputs.items() if shape == "BD"]
    rows = 1 if case.layout == "expanded" else case.B
    modulation = torch.randn(rows, (len(per_sample) + 1) * case.D, dtype=case.mod_dtype, **options)
    inputs: dict[str, Tensor] = {}
    for name, shape in spec.inputs.items():
        dtype = case.dtype if name in ("x", "q", "k") else case.mod_dtype
        sizes = spec.shape(name, case.B, case.L, case.D)
        if shape in ("BLD", "BL2D", "BLHK"):
            tokens = _tokens((*sizes[:2], math.prod(sizes[2:])), case.layout, dtype=dtype, **options)
            inputs[name] = tokens.unflatten(2, sizes[2:])
        elif shape == "BD":
            chunk = modulation.chunk(len(per_sample) + 1, 1)[per_sample.index(name)]
            inputs[name] = chunk.expand(sizes)
        elif name in case.optional:
            inputs[name] = torch.randn(sizes, dtype=dtype, **options)
    needs = inputs if case.needs is None else case.needs
    return {name: t.detach().requires_grad_(name in needs and name not in spec.constants) for name, t in inputs.items()}


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(
    outputs: tuple[Tensor, ...], inputs: dict[str, Tensor], incoming: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Gradients of the outputs that have an incoming one, by input name; none where nothing needs any."""
    used = [(o, g) for o, g in zip(outputs, incoming, strict=True) if g is not None and o.requires_grad]
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    if not wanted or not used:
        return {}
    found = torch.autograd.grad([o for o, _ in used], list(wanted.values()), [g for _, g in used], allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact; NaN counts as infinite.

    The norm is taken as at least 0.01 per element: a result that is 0 in exact arithmetic has no relative error.
    """
    difference = (actual.double() - exact).norm().item()
    floor = 1e-2 * max(exact.numel(), 1) ** 0.5
    error = difference / max(exact.norm().item(), floor)
    return error if error == error else float("inf")


def check(spec: KernelSpec, case: Case, device: torch.device, unused: Sequence[str] = (), **kwargs: Any) -> None:
    """Assert that outputs and gradients have the right dtype and shape and agree with the float64 reference.

    unused: names of outputs that the loss does not use. kwargs go to the kernel; ``fn`` replaces the function run.
    """
    fn = kwargs.pop("fn", spec.fn)
    inputs = make_inputs(spec, case, device)
    exact_inputs = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in inputs.items()}
    outputs = as_tuple(fn(**inputs, **case.kwargs, **{"backend": "triton", **kwargs}))
    options = {k: v for k, v in case.kwargs.items() if k not in ("backend", "out_dtype")}
    exact_outputs = as_tuple(spec.reference(**exact_inputs, **options))

    generator = torch.Generator(device).manual_seed(case.seed + 1)
    incoming: list[Tensor | None] = []
    for name, output in zip(spec.outputs, outputs, strict=True):
        sizes = (*output.shape[:2], math.prod(output.shape[2:]))
        grad = _tokens(sizes, case.layout, dtype=output.dtype, device=device, generator=generator)
        incoming.append(None if name in unused else grad.unflatten(2, output.shape[2:]))
    grads = gradients(outputs, inputs, incoming)
    exact_grads = gradients(exact_outputs, exact_inputs, [None if g is None else g.double() for g in incoming])

    problems = []
    for name, output, exact in zip(spec.outputs, outputs, exact_outputs, strict=True):
        assert output.shape == exact.shape, (name, output.shape)
        problems += _compare(name, output, exact.detach(), output.dtype)
    for name, exact_grad in exact_grads.items():
        grad = grads[name]
        if exact_grad is None:
            assert grad is None or not grad.any(), f"d_{name} should be absent"
            continue
        assert grad is not None, f"d_{name} is missing"
        assert grad.shape == inputs[name].shape, (name, grad.shape)
        assert grad.dtype == inputs[name].dtype, (name, grad.dtype)
        problems += _compare(f"d_{name}", grad, exact_grad, case_dtype(case, grad.dtype))
    assert not problems, f"{spec.name} {case}: " + "; ".join(problems)


def case_dtype(case: Case, own: torch.dtype) -> torch.dtype:
    """The coarsest dtype that went into a gradient: incoming gradients and saved outputs are rounded too."""
    return max((case.dtype, case.mod_dtype, own), key=TOLERANCE.__getitem__)


def _compare(name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> list[str]:
    error = relative_error(actual, exact)
    return [] if error <= TOLERANCE[dtype] else [f"{name} is off by {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"]
