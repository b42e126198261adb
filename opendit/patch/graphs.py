"""CUDA graphs of one block's forward and backward, replayed where it is safe, for models whose launches cost more than
their kernels.

A graph computes at fixed addresses: its inputs are copied there (x, c and the output's gradient), its results lie there
until the next replay. Someone may still be holding them then: an output that a hook kept, gradients that are being
accumulated, a second forward before the first one's backward. So before each replay the storages it would overwrite are
checked for other owners, and where there are any, the block runs as if there were no graphs. Nothing else is assumed
about the caller's loop.

Graphs of all blocks share one memory pool: what is temporary in one is reused by the next, since they replay in turn on
one stream.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger("opendit")

# Calls before the capture: kernels must be compiled and libraries have chosen theirs.
_WARM_UP = 2

_pools: dict[torch.device, Any] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}


class Static(NamedTuple):
    """One captured graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    extra: Any
    owners: list[int]

    def free(self) -> bool:
        """Whether nobody else holds what a replay would overwrite."""
        return [_owners(t) for t in self.outputs] == self.owners

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        # Aliases: the caller's references to them are what `free` counts.
        return [t.detach() for t in self.outputs]


def _owners(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _capture(inputs: Sequence[Tensor], compute: Callable[..., tuple[list[Tensor], Any]]) -> Static:
    """The graph of compute(*inputs) → (outputs, whatever else must stay where it is)."""
    device = inputs[0].device
    own = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    stream = _streams.setdefault(device, torch.cuda.Stream(device))
    pool = _pools.setdefault(device, torch.cuda.graph_pool_handle())
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs, extra = compute(*own)
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return Static(graph, own, outputs, extra, [_owners(t) for t in outputs])


class Lease:
    """Held by autograd's node from forward to backward: while it lives, the forward's results are needed.

    A backward gives it up, for the node itself lives as long as the caller's loss does.
    """

    def __init__(self, replay: int) -> None:
        self.replay = replay


class Block:
    """The graphs of one block at one shape."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.calls = 0
        self.addresses = [p.data_ptr() for p in parameters]
        self.forward: Static | None = None
        self.backward: dict[Any, Static] = {}
        self.lease: weakref.ref[Lease] | None = None
        self.replays = 0

    def ready(self, parameters: Sequence[Tensor]) -> bool:
        """Whether this call may be a replay, or the capture."""
        self.calls += 1
        if [p.data_ptr() for p in parameters] != self.addresses:
            # An engine moves the parameters; a graph of their old place is of no use.
            self.__init__(parameters)  # type: ignore[misc]
            return False
        if self.calls <= _WARM_UP or (self.lease is not None and self.lease() is not None):
            return False
        return self.forward is None or self.forward.free()


_blocks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def block(x: Tensor, c: Tensor, parameters: Sequence[Tensor], key: Any) -> Block | None:
    """The graphs to run this call with, or None where it must run without."""
    if (
        not x.is_cuda
        or torch.cuda.is_current_stream_capturing()
        or torch._C._autograd._top_saved_tensors_default_hooks(True)
        is not None  # activation checkpointing or offloading
    ):
        return None
    mine: dict[Any, Block] = _blocks.setdefault(parameters[0], {})
    key = (key, x.shape, x.dtype, c.shape, c.dtype, torch.cuda.current_stream(x.device).cuda_stream)
    if key not in mine:
        if len(mine) == 2:  # the shapes keep changing
            return None
        mine[key] = Block(parameters)
    found = mine[key]
    return found if found.ready(parameters) else None


def release(parameters: Sequence[Tensor]) -> None:
    """Forgets the graphs of blocks with these parameters, and gives their memory back."""
    for parameter in parameters:
        _blocks.pop(parameter, None)


def run_forward(
    graphs: Block, x: Tensor, c: Tensor, compute: Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]
) -> tuple[Tensor, list[Tensor], Lease]:
    """(out, [x, c, *saved] where the graph keeps them, the lease to hold until the backward is done)."""
    if graphs.forward is None:

        def whole(x: Tensor, c: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            out, saved = compute(x, c)
            return [out], saved

        graphs.forward = _capture([x, c], whole)
    (out,) = graphs.forward.replay([x, c])
    graphs.replays += 1
    lease = Lease(graphs.replays)
    graphs.lease = weakref.ref(lease)
    return out, [*graphs.forward.inputs, *graphs.forward.extra], lease


def run_backward(
    graphs: Block, replay: int, dout: Tensor, key: Any, compute: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """compute(dout) from a graph, or as it is where the last results are still in use.

    replay: of which forward. Raises `RuntimeError` where a later one has taken its place, which takes a second backward
    through the same forward.
    """
    if replay != graphs.replays:
        raise RuntimeError(
            "backward a second time through a block whose CUDA graph has run again since: its activations are gone. "
            "Call all backwards before the next forward, or accelerate with cuda_graphs=False"
        )
    static = graphs.backward.get(key)
    if static is None:

        def whole(dout: Tensor) -> tuple[list[Tensor], list[str]]:
            grads = compute(dout)
            return list(grads.values()), list(grads)

        static = graphs.backward[key] = _capture([dout], whole)
    elif not static.free():
        return compute(dout)
    return dict(zip(static.extra, static.replay([dout]), strict=True))
