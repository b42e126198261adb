"""A small model and a sampler to test with: rectified flow with guidance, in a loop as users write it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.comparing import twin
from tests.tiny_models import randomise

LABELS = (0, 1, 3)


def flow(depth: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A DiT whose output changes as gently along t as a trained one's."""
    from examples.models.dit import DiT

    model = DiT(input_size=6, patch_size=2, hidden_size=48, depth=depth, num_heads=4, num_classes=5, learn_sigma=False)
    model = randomise(model).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.6)
    return twin(model)


@torch.no_grad()
def euler(
    model: nn.Module,
    times: Sequence[float],
    labels: Sequence[int] = LABELS,
    *,
    scale: float = 2.0,
    within: tuple[float, float] = (0.0, 1000.0),
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Samples of those labels; noise is decided by a sample's number. Guided while t is within the interval."""
    numbers = range(len(labels)) if numbers is None else numbers
    like = next(model.parameters())
    dtype, device = like.dtype, like.device
    noise = [torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in numbers]
    x = torch.stack(noise).to(device, torch.float32 if dtype == torch.bfloat16 else dtype)
    y = torch.tensor(labels, device=device)
    both = torch.cat([y, torch.full_like(y, 5)])
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        if within[0] <= t <= within[1]:
            cond, null = model(torch.cat([x, x]), torch.full((2 * len(x),), t, device=device), both).chunk(2)
            v = null + scale * (cond - null)
        else:
            v = model(x, torch.full((len(x),), t, device=device), y)
        x = x - (t - after) / 1000 * v
    return x
