"""Blocks whose residual is reused: in some steps blocks a … b are not computed, x gets what they added before.

    R_s = x_b(s) − x_a(s)       what blocks a … b added in step s
    x ← x + R_l + n·(R_l − R_k)/(t_l − t_k),   n = order·(t_s − t_l)       l the last step computed, k that before

Which steps are computed is a schedule, fixed before the run: it depends on no sample, so that samples stay what they
are in whatever batch, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reuse:
    """Which blocks' residual is reused, and in which steps.

    Attributes:
        first, last: the numbers of the blocks between whose input and output the residual is taken.
        computed: for each step, whether they are computed.
        order: 0: the last residual as it is; 1: drawn on along the last two.
    """

    first: int
    last: int
    computed: tuple[bool, ...]
    order: int = 0


class Memory:
    """The residuals and slopes that blocks left, for each shape, at addresses that graphs may know."""

    def __init__(self) -> None:
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.shape, x.dtype, x.device)
        if key not in self.kept:
            with torch.inference_mode(False):
                self.kept[key] = (torch.zeros_like(x), torch.zeros_like(x))
        return self.kept[key]

    def tensors(self) -> list[Tensor]:
        return [tensor for pair in self.kept.values() for tensor in pair]

    def clear(self) -> None:
        """What is not finite would outlive a factor of zero."""
        for tensor in self.tensors():
            tensor.zero_()


class Residuals:
    """What of a run's steps is reused.

    Args:
        blocks: the model's, in order.
        observe: called with each step that is computed, and its residual.
    """

    def __init__(
        self,
        reuse: Reuse,
        blocks: Sequence[nn.Module],
        memory: Memory,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.reuse, self.memory, self.observe = reuse, memory, observe
        self.numbers = {id(block): i for i, block in enumerate(blocks)}
        self.computes = True  # this step
        self.factor: Tensor | None = None  # of the slope: where computed 1/(t_s − t_l), else t_s − t_l
        self.computed = self.reused = 0  # blocks so far
        self._entered: Tensor | None = None
        self._shape: torch.Size | None = None  # of the x whose residual there is
        self._step = 0
        self._last: int | None = None
        self._slopes = False

    def begin(self, s: int, times: Sequence[float], shape: torch.Size, device: torch.device) -> None:
        if s == 0:
            self._shape, self._last, self._slopes = None, None, False
            self.memory.clear()
        self._step = s
        fits = self._shape == shape and self._last is not None
        self.computes = self.reuse.computed[s] or not fits
        apart = times[s] - times[self._last] if fits and self._last is not None else 0.0
        if self.computes:
            factor = 1 / apart if apart else 0.0
            self._shape, self._last, self._slopes = shape, s, bool(factor)
        else:
            factor = apart if self._slopes else 0.0
        self.factor = torch.full((1,), factor, dtype=torch.float64, device=device)

    def end(self) -> None:
        spared = 0 if self.computes else self.reuse.last - self.reuse.first + 1
        self.computed += len(self.numbers) - spared
        self.reused += spared

    def key(self) -> tuple[object, ...]:
        return (self.reuse.first, self.reuse.last, self.reuse.order, self.computes)

    def within(self, block: object) -> bool:
        return self.reuse.first <= self.numbers.get(id(block), -1) <= self.reuse.last

    def before(self, block: object, x: Tensor) -> Tensor | None:
        """What `block` gives back for x where it is not computed."""
        first = self.numbers[id(block)] == self.reuse.first
        if self.computes:
            if first:
                self._entered = x
            return None
        if not first:
            return x
        last, slope = self.memory.of(x)
        if not self.reuse.order:
            return x + last
        return x + torch.addcmul(last, slope, cast(Tensor, self.factor).to(x.dtype))

    def after(self, block: object, out: Any) -> None:
        """`block` was computed."""
        if self.numbers[id(block)] != self.reuse.last:
            return
        x, self._entered = self._entered, None
        if x is None or not isinstance(out, Tensor) or out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(
                f"cache: what block {self.reuse.last} gives back is not of the shape and dtype that block "
                f"{self.reuse.first} is given, so no residual of theirs can be reused. Leave the cache out"
            )
        new = out - x
        last, slope = self.memory.of(x)
        if self.reuse.order:
            torch.mul(new - last, cast(Tensor, self.factor).to(x.dtype), out=slope)
        last.copy_(new)
        if self.observe is not None:
            self.observe(self._step, new)
