"""Asks a module what it computes, instead of trusting its looks.

A user-local class can carry upstream's attribute names and yet compute something else: another chunk order,
a missing bias, a stopped gradient. So before an edit is planned, a small copy of the module, in fp64 on the
CPU with fresh random parameters, is run with its own forward and with the mixin's (reference kernels). They
must agree in every output and every gradient, in training and in evaluation mode. The model itself, its
parameters, its mode and the global random state are not touched.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from opendit.doubles import keeping_doubles
from opendit.patch.core import REFERENCE, Patched, patched_class

# Agreement of two fp64 evaluations of the same formula; anything wrong is many orders above it.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
# Under autocast, dtypes are what is compared; values scatter by bf16's rounding.
_AUTOCAST_TOLERANCE = 0.3
# Some gradients are zero but for rounding (a bias on every key moves no softmax). A tensor is judged by its largest
# value, or by this part of the largest value of all, where that is more.
_FLOOR, _AUTOCAST_FLOOR = 1e-4, 0.1

Inputs = Callable[[torch.dtype], tuple[Any, ...]]


class StandIn(nn.Module):
    """x → tanh(x·W): takes a sublayer's place, so that only the wiring around it is probed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: torch.Tensor, **options: object) -> torch.Tensor:
        for name, value in options.items():
            if value is not None and value is not False:
                raise TypeError(f"the sublayer is given {name}, which the fused forward does not pass on")
        return torch.tanh(x @ self.weight)


def disagreement(
    module: nn.Module,
    mixin: type[Patched],
    inputs: Inputs | Sequence[Inputs],
    *,
    stand_ins: Mapping[str, nn.Module] | None = None,
    dtype: torch.dtype = torch.float64,
    keep_doubles: bool = False,
) -> str | None:
    """Why `mixin` must not be given to `module`, or None where both compute the same.

    Args:
        inputs: makes the positional arguments for a dtype, and after them, in a dict, those by name; float tensors
            among the positional ones get gradients. Several are tried in turn, such as a short and a longer sequence.
        stand_ins: children to replace in the copy, by name.
        dtype: what to compute in; float32 only for modules that can't run in float64.
        keep_doubles: for a module known to compute in fp32 at least: its own casts to fp32 leave fp64 as it is.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    examples = [inputs] if callable(inputs) else list(inputs)
    with _neutral():
        try:
            twin = _small_copy(module, stand_ins or {}, dtype)
        except Exception as error:
            return f"it could not be copied for the check ({type(error).__name__}: {error})"
        with keeping_doubles(keep_doubles):
            for training, example in itertools.product((True, False), examples):
                twin.train(training)
                reason = _compare(twin, mixin, example, dtype, autocast=False)
                if reason is not None:
                    return reason
        return _compare(twin.float(), mixin, examples[0], torch.float32, autocast=True)


def reads_low_precision(sublayer: nn.Module, *widths: int) -> bool:
    """Whether `sublayer` [B, L, width] → … is the same under autocast for an input in autocast's dtype.

    So it is where a Linear comes first, for that casts its input. A sublayer that switches autocast off, or begins
    with something that autocast runs in fp32, must be given what upstream gives it. Several widths are those of
    several inputs.
    """
    with _neutral(), torch.no_grad():
        try:
            twin = _small_copy(sublayer, {}, torch.float32).eval()
            xs = [torch.randn(2, 3, width) for width in widths]
            with torch.autocast("cpu", torch.bfloat16):
                full, low = _outputs(twin(*xs)), _outputs(twin(*(x.bfloat16() for x in xs)))
            return all(f.dtype == o.dtype and torch.equal(f, o) for f, o in zip(full, low, strict=True))
        except Exception:
            return False


def separable(module: nn.Module, shape: torch.Size, dims: Sequence[int], *others: torch.Size) -> bool:
    """Whether `module` gives, for a part of an input of `shape` along each of `dims`, that part of its output for all.

    So does what works token by token (or head by head): a part of the tokens is all it needs. `others`: the shapes of
    further inputs, which are cut along with the first.
    """
    with _neutral(), torch.no_grad():
        try:
            twin = _small_copy(module, {}, torch.float64)
            xs = [torch.randn(each, dtype=torch.float64) for each in (shape, *others)]
            for dim, training in itertools.product(dims, (False, True)):
                twin.train(training)
                whole = twin(*xs)
                cuts = ([x.narrow(dim, begin, n) for x in xs] for begin, n in ((0, 2), (2, shape[dim] - 2)))
                parts = torch.cat([twin(*cut) for cut in cuts], dim)
                if parts.shape != whole.shape or not torch.allclose(parts, whole, 1e-9, 1e-9):
                    return False
            return True
        except Exception:
            return False


_one_at_a_time = threading.RLock()  # threads share the random state


@contextmanager
def _neutral() -> Iterator[None]:
    """A fixed random state and none of the caller's modes; everything is as it was afterwards."""
    with (
        _one_at_a_time,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        _uncompiled(),
    ):
        _seed(0)
        yield


def _uncompiled() -> AbstractContextManager[object]:
    """What a model's author put under `torch.compile` runs as it is written, for compiling takes minutes."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _seed(seed: int) -> None:
    # Not torch.manual_seed: that reseeds the GPUs too, on every rank alike.
    torch.default_generator.manual_seed(seed)


def _compare(
    twin: nn.Module, mixin: type[Patched], inputs: Inputs, dtype: torch.dtype, *, autocast: bool
) -> str | None:
    try:
        expected = _run(twin, inputs, dtype, autocast)
    except Exception as error:
        where = " under autocast" if autocast else ""
        return f"its own forward did not run on a small example{where} ({type(error).__name__}: {error})"
    base = type(twin)
    twin.__class__ = patched_class(base, mixin, REFERENCE)
    try:
        actual = _run(twin, inputs, dtype, autocast)
    except Exception as error:
        return f"the fused forward does not run on it ({type(error).__name__}: {error})"
    finally:
        twin.__class__ = base
    tolerance, floor = (_AUTOCAST_TOLERANCE, _AUTOCAST_FLOOR) if autocast else (_TOLERANCE[dtype], _FLOOR)
    worst = _difference(expected, actual, tolerance, floor)
    return worst and f"its forward computes something else than the fused one ({worst})"


_INTERNALS = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}  # that of Module.compile


def own_attributes(module: nn.Module) -> dict[str, object]:
    """What is stored on the instance besides parameters, buffers, children and a replaced forward."""
    return {key: value for key, value in module.__dict__.items() if key not in _INTERNALS and key != "forward"}


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What two modules must share for one probe to speak for both: types, shapes, attributes, the same buffers."""
    rows: list[Any] = []
    for name, child in module.named_modules():
        attributes = repr(sorted((key, _said(value)) for key, value in own_attributes(child).items()))
        rows.append((name, type(child), attributes, child.__dict__.get("forward")))
    rows.extend((name, tuple(p.shape)) for name, p in module.named_parameters())
    rows.extend((name, id(b)) for name, b in module.named_buffers())
    return tuple(rows)


def _said(value: object) -> str:
    """`repr`, without the address of an object that has nothing but its class (diffusers' attention processors)."""
    if type(value).__repr__ is object.__repr__ and getattr(value, "__dict__", None) == {}:
        return f"{type(value).__module__}.{type(value).__qualname__} {id(type(value))}"
    return repr(value)


def _small_copy(module: nn.Module, stand_ins: Mapping[str, nn.Module], dtype: torch.dtype) -> nn.Module:
    shell = copy.copy(module)
    shell.__dict__ = dict(module.__dict__)
    shell._modules = {**module._modules, **stand_ins}
    # The copy starts on the meta device: neither memory nor the model's own values are needed. Hooks, which may hold
    # anything, are not copied. Buffers that have no values yet get some.
    buffers = {name: b.detach().to("cpu", copy=True) if not b.is_meta else _any(b) for name, b in shell.named_buffers()}
    memo: dict[int, Any] = {id(p): _blank(p) for p in shell.parameters()}
    for child in shell.modules():
        for hooks in _hooks(child):
            memo[id(hooks)] = OrderedDict()
    twin = copy.deepcopy(shell, memo=memo)
    twin.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            # Of the order of trained weights: gates are far from zero, nothing saturates.
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.normal_(0.0, 1.0 / max(fan_in, 1) ** 0.5)
        for name, buffer in twin.named_buffers():
            buffer.copy_(buffers[name])
    return twin


def _any(buffer: torch.Tensor) -> torch.Tensor:
    like = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return like.normal_() if buffer.is_floating_point() else like


def _hooks(module: nn.Module) -> list[Any]:
    return [value for key, value in module.__dict__.items() if key.endswith("_hooks")]


def _blank(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="meta"))


def _run(module: nn.Module, inputs: Inputs, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor | None]:
    """Outputs, then the gradients of the inputs and of the parameters."""
    _seed(1)
    args = inputs(dtype)
    args, named = (args[:-1], args[-1]) if isinstance(args[-1], dict) else (args, {})
    leaves = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = _outputs(module(*args, **named))
    cotangents = [torch.randn(o.shape, dtype=o.dtype) for o in outputs]
    wanted = leaves + list(module.parameters())
    grads = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return [*(o.detach() for o in outputs), *grads]


def _outputs(output: Any) -> list[torch.Tensor]:
    """What a module returned, one tensor or several; None among several is left out."""
    return [output] if isinstance(output, torch.Tensor) else [o for o in output if o is not None]


def _difference(
    expected: list[torch.Tensor | None], actual: list[torch.Tensor | None], tolerance: float, floor: float
) -> str | None:
    if len(expected) != len(actual):
        return f"{len(actual)} results instead of {len(expected)}"
    least = floor * max(e.abs().max().item() for e in expected if e is not None and e.numel())
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        what = "output" if index == 0 else f"gradient {index}"
        if (e is None) != (a is None):
            return f"{what} exists in one of them only"
        if e is None or a is None:
            continue
        if e.shape != a.shape or e.dtype != a.dtype:
            return f"{what}: {a.dtype} {tuple(a.shape)} instead of {e.dtype} {tuple(e.shape)}"
        error = ((e - a).abs().max().item()) / max(e.abs().max().item(), least)
        if not error <= tolerance:
            return f"{what} differs by {error:.1e} of its largest value"
    return None
