"""What a kernel file declares about itself, so that one test suite and one benchmark serve every kernel.

A kernel file ends in ``SPEC = KernelSpec(...)``. ``discover()`` finds those files by itself: there is no list to
keep, and adding a kernel touches no other file.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: the function users call, its specification, and how to feed and count both.

    Attributes:
        name: the public function's name, which is also the file's.
        fn: the public function.
        reference: the same computation in plain differentiable torch; the specification.
        upstream: the formula as unaccelerated models write it, in the inputs' own dtypes. It is what a speed-up
            is measured against, and what bounds the error that half precision may show.
        inputs: the tensor arguments in order, each with its shape spelled "BLD", "BD" or "D"; "?" marks an optional.
        outputs: names of the outputs, in order.
        backward_moves: the [B, L, D] tensors that a backward must read or write once each: inputs, outputs, and
            "d_" before the name of either for its gradient. The forward moves all inputs and all outputs.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    upstream: Callable[..., Any]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    backward_moves: tuple[str, ...]


def discover() -> dict[str, KernelSpec]:
    """Every ``SPEC`` of this package's modules, by kernel name. Imports them, and so triton where it is installed."""
    import opendit.kernels as package

    specs: dict[str, KernelSpec] = {}
    for info in pkgutil.iter_modules(package.__path__):
        spec = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "SPEC", None)
        if isinstance(spec, KernelSpec):
            specs[spec.name] = spec
    return specs
