"""A tensor divided among processes as flat ranges: gradients and optimizer states of engines that divide so.

    whole tensor, n elements in row-major order     rank 0 │ rank 1 │ … │ rank r: [start, stop) │ …

To torch it looks like the whole tensor (shape, dtype, device), so that it can be a parameter's `.grad`; it holds this
process's elements. What is right range by range is done there (scaling, clamping, zeroing), a norm is one over all
processes, and anything else is an error: `torch.nn.utils.clip_grad_norm_` does what it says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from opendit.pieces import Piece

aten = torch.ops.aten

# Element by element and in place: this process's elements are all it takes.
_IN_PLACE = {
    *(aten.mul_, aten.div_, aten.zero_, aten.clamp_, aten.clamp_min_, aten.clamp_max_, aten.nan_to_num_),
    *(aten._foreach_mul_, aten._foreach_div_, aten._foreach_zero_, aten._foreach_clamp_min_, aten._foreach_clamp_max_),
}


class Divided(Tensor):
    """This process's elements [start, start + len(values)) of a tensor of `shape`.

    Args:
        values: [k], sharing memory with whoever divided it.
        start: where they begin in the whole tensor.
        like: the whole tensor's shape and device.
        family: those whose norms are asked for together, this one among them in the end; one all-reduce then serves
            all. They are divided among all processes.
    """

    local: Tensor
    start: int
    family: list[Divided]
    _norms: dict[tuple[float, torch.dtype], tuple[int, Tensor]]

    @staticmethod
    def __new__(cls, values: Tensor, start: int, like: Tensor, family: list[Divided] | None = None) -> Divided:
        whole: Divided = Tensor._make_wrapper_subclass(cls, like.shape, dtype=values.dtype, device=like.device)
        whole.local, whole.start, whole._norms = values.detach(), start, {}
        whole.family = family if family is not None else [whole]
        return whole

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        stop = self.start + self.local.numel()
        return f"Divided(shape={tuple(self.shape)}, [{self.start}:{stop}]={self.local})"

    def piece(self) -> Piece:
        """This process's piece; see `opendit.pieces`."""
        return Piece(tuple(self.shape), self.start, self.start + self.local.numel(), self.local)

    def to_local(self) -> Tensor:
        """This process's elements [k], in the memory that they lie in."""
        return self.local

    def full_tensor(self) -> Tensor:
        """The whole tensor, gathered; every process makes this call."""
        whole = torch.zeros(self.numel(), dtype=self.dtype, device=self.device)
        whole[self.start : self.start + self.local.numel()] = self.local.to(self.device)
        dist.all_reduce(whole)
        return whole.view(self.shape)

    def _norm(self, order: float, dtype: torch.dtype | None = None) -> Tensor:
        """(Σ |x|^order)^(1/order) over all processes, in fp32 at least."""
        dtype = dtype or torch.promote_types(self.dtype, torch.float32)
        key = float(order), dtype
        version, norm = self._norms.get(key, (-1, None))
        if norm is None or version != self.local._version:
            # Every process gets here for the same one, if it does the same things to its gradients.
            for member, found in zip(self.family, _norms(self.family, *key), strict=True):
                member._norms[key] = member.local._version, found
            norm = self._norms[key][1]
        return norm.to(self.device, copy=True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _IN_PLACE:
            func(*_locally(args), **_locally(kwargs))
            for changed in tree_leaves(args[0]):
                changed._norms.clear()  # torch counts no versions here
            return None if isinstance(args[0], (list, tuple)) else args[0]
        if packet in (aten.detach, aten.alias) and isinstance(args[0], Divided):
            return Divided(args[0].local, args[0].start, args[0])
        if packet is aten.linalg_vector_norm and args[2:3] in ((), (None,)) and not any(args[3:4]):
            order = args[1] if len(args) > 1 else 2
            if order > 0:
                return args[0]._norm(order, kwargs.get("dtype"))
        if packet is aten._foreach_norm and all(isinstance(t, Divided) for t in args[0]):
            order = args[1] if len(args) > 1 else 2
            return [t._norm(order, kwargs.get("dtype")) for t in args[0]]
        # Not a TypeError, which torch's operators turn into "unsupported operand".
        raise ValueError(
            f"grad: got {func} on a tensor that is divided over processes; allowed: norms of all of it "
            "(torch.nn.utils.clip_grad_norm_), scaling and clamping in place, zero_. Use .to_local() for this "
            "process's elements, .full_tensor() to gather it"
        )


def _norms(family: list[Divided], order: float, dtype: torch.dtype) -> list[Tensor]:
    """Each one's norm over all processes; one collective."""
    zero = torch.zeros((), dtype=dtype)
    found = [torch.linalg.vector_norm(d.local, order, dtype=dtype) if d.local.numel() else zero for d in family]
    norms = torch.stack([norm.to(family[0].device) for norm in found])
    if math.isinf(order):
        # The maximum over processes may drop a NaN, so these travel beside it.
        norms = torch.cat([norms, norms.isnan().to(norms.dtype)])
        dist.all_reduce(norms, dist.ReduceOp.MAX)
        norms, unknown = norms.chunk(2)
        norms = norms.masked_fill(unknown > 0, math.nan)
    else:
        norms.pow_(order)
        dist.all_reduce(norms)
        norms.pow_(1 / order)
    return list(norms.unbind())


def _locally(tree: Any) -> Any:
    """`tree` with this process's elements for what is divided, and numbers on the device that those are on."""
    devices = {leaf.local.device for leaf in tree_leaves(tree) if isinstance(leaf, Divided)}

    def local(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Divided):
            return tensor.local
        return tensor.to(next(iter(devices))) if tensor.dim() == 0 and len(devices) == 1 else tensor

    return tree_map_only(Tensor, local, tree)
