"""CUDA graphs of one block's forward and backward, replayed where it is safe, for models whose launches cost more than
their kernels.

A graph computes at fixed addresses: its inputs are copied there (x, c and the output's gradient), its results lie there
until the next replay. Someone may still need them then: an output that a hook kept, gradients that are being
accumulated, a second forward before the first one's backward. So before each replay that is found out, and where it is
so the block runs as if there were no graphs. Nothing is assumed about the caller's loop.

What a replay may overwrite:

    results       out, or the gradients: memory of this graph alone. Other owners of their storages are counted.
    activations   kept from forward to backward, in the forward graphs' pool. Autograd's node holds a lease meanwhile.
    temporaries   in a pool that graphs share. In the forward graphs' pool they may lie where a graph that was captured
                  *later* has its activations, so a forward is replayed only while no later one has a lease out.

Graphs of different streams share nothing. What another stream still reads of a result (`record_stream`) is not found
out.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Calls before the capture: kernels must be compiled and libraries have chosen theirs.
_WARM_UP = 2
# At how many shapes a block is captured; beyond that they are taken to keep changing.
_SHAPES = 2


logger = logging.getLogger("opendit")


class CaptureFailed(RuntimeError):
    """No graph could be made; the block is to be run without."""


class Lease:
    """Held by autograd's node from forward to backward: while it lives, the forward's activations are needed.

    A backward gives it up, for the node itself lives as long as the caller's loss does.
    """

    def __init__(self, replay: int) -> None:
        self.replay = replay


class _Device:
    """What the graphs of one device and stream share: a side stream, a pool for each direction, the leases in order of
    capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graphs: dict[str, weakref.WeakSet[Any]] = {"forward": weakref.WeakSet(), "backward": weakref.WeakSet()}
        self.pools: dict[str, Any] = {}
        self.leases: list[weakref.ref[Lease] | None] = []
        self.replays = 0  # of forwards

    def capture(self, direction: str, compute: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of `compute`, and what that returned, whose memory the graph writes."""
        if not self.graphs[direction]:  # a pool goes with its last graph
            self.pools[direction] = torch.cuda.graph_pool_handle()
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pools[direction], capture_error_mode="thread_local")
            try:
                returned = compute()
                graph.capture_end()
            except Exception as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                logger.warning("CUDA graph not captured, the block runs without: %s", error)
                raise CaptureFailed from error
        caller.wait_stream(self.stream)
        self.graphs[direction].add(graph)
        return graph, returned

    def later_lease(self, order: int) -> bool:
        """Whether a graph captured at `order` or later has one out."""
        return any(lease is not None and lease() is not None for lease in self.leases[order:])


_devices: dict[tuple[torch.device, int], _Device] = {}


def _owners(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class _Results:
    """Memory that a graph writes its results to; handed out as aliases, whose number is known from the storages."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.alone = {name: _owners(t) for name, t in tensors.items()}

    def free(self) -> bool:
        return all(_owners(t) == self.alone[name] for name, t in self.tensors.items())

    def aliases(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in self.tensors.items()}


class _Forward:
    def __init__(self, device: _Device, x: Tensor, c: Tensor, compute: Callable[..., list[Tensor]]) -> None:
        self.x, self.c = torch.empty_like(x).contiguous(), torch.empty_like(c).contiguous()
        self.results = _Results({"out": torch.empty_like(self.x)})
        out = self.results.tensors["out"]
        self.graph, self.activations = device.capture("forward", lambda: compute(self.x, self.c, out))


class _Backward:
    def __init__(self, device: _Device, dout: Tensor, likes: dict[str, Tensor], compute: Callable[..., Any]) -> None:
        self.dout = torch.empty_like(dout).contiguous()
        self.results = _Results({name: torch.empty_like(t) for name, t in likes.items()})
        self.graph, _ = device.capture("backward", lambda: compute(self.dout, self.results.tensors))


class Block:
    """The graphs of one block at one shape."""

    def __init__(self, parameters: Sequence[Tensor], stream: int) -> None:
        device = parameters[0].device
        if (device, stream) not in _devices:
            _devices[device, stream] = _Device(device)
        self.device = _devices[device, stream]
        self.failed = False
        self.addresses = [p.data_ptr() for p in parameters]
        self.calls = 0
        self.replays = 0
        self.order = -1
        self.forward: _Forward | None = None
        self.backward: dict[Any, _Backward] = {}
        self.warm: dict[Any, int] = {}

    def at_home(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters are where the graphs read them; an engine may move them, before the backward too."""
        return [p.data_ptr() for p in parameters] == self.addresses

    def ready(self) -> bool:
        """Whether this call may be a replay, or the capture."""
        self.calls += 1
        if self.failed:
            return False
        if self.forward is None:
            return self.calls > _WARM_UP
        return not self.device.later_lease(self.order) and self.forward.results.free()

    def run_forward(
        self, x: Tensor, c: Tensor, compute: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    ) -> tuple[Tensor, list[Tensor], Lease]:
        """(out, [x, c, *activations] where the graph keeps them, the lease to hold until the backward is done).

        compute(x, c, out) writes out and returns the activations.
        """
        if self.forward is None:
            self.failed = True
            self.forward = _Forward(self.device, x, c, compute)
            self.failed = False
            self.order = len(self.device.leases)
            self.device.leases.append(None)
        self.forward.x.copy_(x)
        self.forward.c.copy_(c)
        self.forward.graph.replay()
        self.replays += 1
        self.device.replays += 1
        lease = Lease(self.replays)
        self.device.leases[self.order] = weakref.ref(lease)
        out = self.forward.results.aliases()["out"]
        return out, [self.forward.x, self.forward.c, *self.forward.activations], lease

    def run_backward(
        self,
        replay: int,
        since: int | None,
        dout: Tensor,
        parameters: Sequence[Tensor],
        likes: dict[str, Tensor],
        compute: Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """compute(dout, memory for its results), from a graph, or as it is where the last results are still in use.

        Args:
            replay: of which forward. since: how many forwards had been replayed when its lease was given up, if it was.
            likes: the wanted gradients' names, and tensors of their shapes and dtypes.

        Raises:
            RuntimeError: later forwards may have taken its place: a second backward through the same forward.
        """
        if replay != self.replays or (since is not None and since != self.device.replays):
            raise RuntimeError(
                "backward a second time through a block after CUDA graphs have run again: its activations may be "
                "gone. Call all backwards before the next forward, or accelerate with cuda_graphs=False"
            )
        if not self.at_home(parameters):
            return compute(dout, {})
        key = (tuple(likes), dout.dtype)
        static = self.backward.get(key)
        if static is None:
            self.warm[key] = self.warm.get(key, 0) + 1
            if self.failed or self.warm[key] <= _WARM_UP:
                return compute(dout, {})
            try:
                static = self.backward[key] = _Backward(self.device, dout, likes, compute)
            except CaptureFailed:
                self.failed = True
                return compute(dout, {})
        elif not static.results.free():
            return compute(dout, {})
        static.dout.copy_(dout)
        static.graph.replay()
        return static.results.aliases()


_blocks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _stream(x: Tensor) -> int | None:
    """The stream to replay on; None where graphs are out of place."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None  # activation checkpointing or offloading is at work
    return torch.cuda.current_stream(x.device).cuda_stream


def block(x: Tensor, c: Tensor, parameters: Sequence[Tensor], key: Any) -> Block | None:
    """The graphs to run this call with, or None where it must run without."""
    stream = _stream(x)
    if stream is None:
        return None
    mine: dict[Any, Block] = _blocks.setdefault(parameters[0], {})
    key = (key, x.shape, x.dtype, c.shape, c.dtype, stream)
    if key not in mine and len(mine) == _SHAPES:
        return None
    if key not in mine or not mine[key].at_home(parameters):
        mine[key] = Block(parameters, stream)  # where parameters keep moving, it never gets warm
    return mine[key] if mine[key].ready() else None


def release(parameters: Sequence[Tensor]) -> None:
    """Forgets the graphs of blocks with these parameters, and so gives their memory back."""
    for parameter in parameters:
        _blocks.pop(parameter, None)
