"""`StepCache`: which steps of a sampler's run reuse the residual of their middle blocks, and what that cost.

The formula is in `opendit/patch/reuse.py`; `opendit/calibrating.py` makes schedules.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

ORDERS = (0, 1)


@dataclass(frozen=True)
class StepCache:
    """A schedule of steps that reuse their middle blocks' residual, and what it cost when it was calibrated.

    Attributes:
        timesteps: of the runs that it is for.
        computed: for each, whether all blocks are computed.
        first, last: the numbers of the first and the last block that may be left out.
        blocks: how many the model has.
        order: 0: residuals are reused as they are; 1: drawn on along the last two.
        psnr: in dB, of the cached calibration samples to the uncached, all together; worst_psnr: of the worst one.
            None where it was not measured.
        asked: the budget, in words.
    """

    timesteps: tuple[float, ...]
    computed: tuple[bool, ...]
    first: int
    last: int
    blocks: int
    order: int = 0
    psnr: float | None = None
    worst_psnr: float | None = None
    asked: str = "nothing"

    def __post_init__(self) -> None:
        for name in ("timesteps", "computed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.computed or len(self.computed) != len(self.timesteps) or not self.computed[0]:
            raise ValueError(
                f"computed: got {self.computed} for {len(self.timesteps)} timesteps; allowed: one value for each, the "
                "first of them True"
            )
        if not 0 <= self.first <= self.last < self.blocks:
            raise ValueError(
                f"first, last: got {self.first} and {self.last} of {self.blocks} blocks; allowed: numbers of blocks, "
                "in order"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order: got {self.order!r}; allowed: 0 or 1")

    @property
    def blocks_computed(self) -> int:
        """Of a whole run."""
        return len(self.computed) * self.blocks - self.blocks_reused

    @property
    def blocks_reused(self) -> int:
        return (len(self.computed) - sum(self.computed)) * (self.last - self.first + 1)

    def report(self) -> str:
        """What was gained and what was lost, in words."""
        total, left = self.blocks_computed + self.blocks_reused, f"{self.first} to {self.last}"
        gained = (
            f"{sum(self.computed)} of {len(self.computed)} steps compute all {self.blocks} blocks, in the others "
            f"blocks {left} reuse their residual (order {self.order}): {self.blocks_computed} of {total} blocks are "
            f"computed, {total / self.blocks_computed:.2f} times fewer"
        )
        if self.psnr is None or self.worst_psnr is None:
            return f"{gained}; what was lost was not measured"
        return (
            f"{gained}; lost: PSNR {self.psnr:.1f} dB, {self.worst_psnr:.1f} of the worst sample; asked: {self.asked}"
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StepCache:
        """What `to_json` wrote. Raises `ValueError` for anything else."""
        found = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or not found.keys() <= names:
            raise ValueError(f"cache: got JSON of a {type(found).__name__}; allowed: what StepCache.to_json writes")
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"cache: it is not what StepCache.to_json writes: {error}") from error
