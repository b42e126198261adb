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
        inputs: the tensor arguments in order, each with its shape spelled as in `shape`; "?" marks an optional.
        outputs: names of the outputs, in order.
        backward_moves: the [B, L, D] tensors that a backward must read or write once each: inputs, outputs, and
            "d_" before the name of either for its gradient. The forward moves all inputs and all outputs.
        usual: the optional inputs that models give it, and that the benchmark therefore does.
        constants: inputs that have no gradient.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    upstream: Callable[..., Any]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    backward_moves: tuple[str, ...]
    usual: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    def optional(self) -> list[str]:
        """The names of the inputs that may be left out."""
        return [name for name, spelled in self.inputs.items() if spelled.endswith("?")]

    def shape(self, name: str, batch: int, length: int, hidden: int) -> tuple[int, ...]:
        """The shape of an input for B, L and D. Heads are about 72 wide, an even number; two or more from D = 9 on."""
        heads = max(hidden // 72, 1 + (hidden > 8))
        head = 2 * max(hidden // heads // 2, 1)
        return {
            "BLD": (batch, length, hidden),
            "BL2D": (batch, length, 2 * hidden),
            "BLHK": (batch, length, heads, head),
            "BD": (batch, hidden),
            "LK": (length, head),
            "D": (hidden,),
            "K": (head,),
        }[self.inputs[name].removesuffix("?")]


def discover() -> dict[str, KernelSpec]:
    """Every ``SPEC`` of this package's modules, by kernel name. Imports them, and so triton where it is installed."""
    import opendit.kernels as package

    specs: dict[str, KernelSpec] = {}
    for info in pkgutil.iter_modules(package.__path__):
        spec = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "SPEC", None)
        if isinstance(spec, KernelSpec):
            specs[spec.name] = spec
    return specs
