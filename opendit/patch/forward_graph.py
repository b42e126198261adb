"""CUDA graphs of a model's whole forward, one for each shape of its inputs: a step is one launch.

A graph reads its inputs where they were copied to, and the parameters where they are; what it gives is copied out at
once, so callers may keep it. Graphs of one model share the memory of their temporaries: one is replayed at a time.

Where a graph would not do what the forward does, the forward runs: hooks, gradients, random numbers of training,
collectives inside. The reason is for `explain`.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from opendit.patch.core import hooked

# At how many inputs' shapes a model is captured; beyond that they are taken to keep changing.
SHAPES = 16
# Of how many inputs' shapes without a graph calls are counted.
_COUNTED = 64
# Calls before the capture: kernels must be compiled and libraries have chosen theirs.
_WARM_UP = 1


def unfit(model: nn.Module, leaves: Sequence[Any]) -> str | None:
    """Why this call must not be a graph, as far as can be seen before."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    where = {t.device.type for t in tensors}
    if where != {"cuda"}:
        return f"its inputs are on {', '.join(sorted(where)) or 'no device'}"
    if torch.is_grad_enabled():
        return "gradients are enabled; sample under torch.no_grad() or torch.inference_mode()"
    if model.training:
        return "it is in training mode; call model.eval()"
    if torch.is_autocast_enabled("cuda"):
        return "it is called under autocast, which bf16 weights can do without"
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a graph"
    if any(hooked(module) for module in model.modules() if module is not model):
        return "hooks, or forwards put on instances, would not run in it"
    return None


def opaque(out: Any) -> str | None:
    """The type of what in an output may hold tensors that can't be seen: an object that pytree doesn't know."""
    known = (Tensor, int, float, complex, str, type(None))
    return next((type(leaf).__name__ for leaf in tree_leaves(out) if not isinstance(leaf, known)), None)


class _Graph:
    """One captured forward."""

    def __init__(self, inputs: Sequence[Tensor], compute: Callable[[Sequence[Tensor]], Any], pool: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in inputs]
            self.graph, out = capture(lambda: compute(self.inputs), pool, inputs[0].device)
        self.outputs, self.spec = tree_flatten(out)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tree_unflatten([o.clone() if isinstance(o, Tensor) else o for o in self.outputs], self.spec)


def capture(compute: Callable[[], Any], pool: Any, device: torch.device) -> tuple[Any, Any]:
    """(the graph of `compute`, what that returned, whose memory the graph writes)."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        compute()  # libraries take their workspaces for this stream
        torch.cuda.synchronize(device)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            returned = compute()
        except Exception:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, returned


def stream_of(x: Tensor) -> int:
    """The current stream of its device, by number; all of a CPU's is one."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


class Graphs:
    """A model's."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.graphs: dict[Any, _Graph] = {}
        self.calls: dict[Any, int] = {}
        self.addresses: list[int] = []
        self.failed: str | None = None
        self.stream: Any = None  # that they are replayed on
        self.replays = 0

    def run(
        self,
        model: nn.Module,
        key: Any,
        inputs: Sequence[Tensor],
        compute: Callable[[Sequence[Tensor]], Any],
        state: Sequence[Tensor] = (),
    ) -> tuple[Any, str | None]:
        """(compute(inputs), by a graph where there is one or can be; why there is none).

        key: all that decides what is computed, besides the inputs' shapes and dtypes. state: what compute reads and
        writes, from call to call; a capture runs it once more.
        """
        stream = stream_of(inputs[0])
        self.stream = stream if self.stream is None else self.stream
        if stream != self.stream:
            return compute(inputs), "it is called on another stream than before, which could overtake"
        key = (key, *((t.shape, t.dtype, t.device) for t in inputs))
        addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
        if addresses != self.addresses:  # someone moved them; graphs would read what was there
            self.graphs, self.calls, self.addresses = {}, {}, addresses
        if key not in self.graphs:
            if self.failed is not None:
                return compute(inputs), self.failed
            if len(self.graphs) >= SHAPES:
                return compute(inputs), f"{SHAPES} shapes of inputs have graphs already"
            if self.calls.get(key, 0) < _WARM_UP:
                return self._warm_up(key, inputs, compute)
            del self.calls[key]
            self.pool = self.pool or new_pool()
            before = [t.clone() for t in state]
            try:
                self.graphs[key] = _Graph(inputs, compute, self.pool)
            except Exception as error:  # of any kind: what the model's own code does is not ours
                self.failed = f"its capture failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            if self.failed is not None:
                return compute(inputs), self.failed
        self.replays += 1
        return self.graphs[key](inputs), None

    def _warm_up(
        self, key: Any, inputs: Sequence[Tensor], compute: Callable[[Sequence[Tensor]], Any]
    ) -> tuple[Any, str | None]:
        out = compute(inputs)
        if (kind := opaque(out)) is not None:  # not counted, so it is never captured
            return out, f"it gives {kind}, a container that pytree doesn't know, whose tensors can't be copied out"
        self.calls[key] = self.calls.get(key, 0) + 1
        if len(self.calls) > _COUNTED:
            del self.calls[next(iter(self.calls))]
        return out, None
