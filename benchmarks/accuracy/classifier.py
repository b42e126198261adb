"""A small classifier, trained on the real data in the same script, that says whether samples are what was asked for.

    images [B, 3, H, W], clips [B, F, 3, H, W] → logits of each question, such as motion, colour and shape

Pairs of convolutions with BatchNorm, 2-d or 3-d, the first of each with stride 2 (in time from the second pair on),
then the maximum over all places, since what matters may be small, and one linear map for each question. Trained with
AdamW in one cycle; images are shifted by up to an eighth of their side, and flipped where that may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    def __init__(self, questions: Mapping[str, int], clips: bool, width: int, layers: int):
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if clips else (nn.Conv2d, nn.BatchNorm2d)
        widths = [3, *(width * 2**i for i in range(layers))]
        self.clips = clips

        def layer(i: int, inputs: int, outputs: int) -> nn.Module:
            stride: Any = (1 if i == 0 else 2, 2, 2) if clips else 2
            first, second = conv(inputs, outputs, 3, stride, 1), conv(outputs, outputs, 3, 1, 1)
            return nn.Sequential(first, norm(outputs), nn.ReLU(), second, norm(outputs), nn.ReLU())

        self.layers = nn.ModuleList(layer(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(widths)))
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], count) for name, count in questions.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.transpose(1, 2) if self.clips else x
        for layer in self.layers:
            x = layer(x)
        pooled = x.flatten(2).amax(2)
        return {name: head(pooled) for name, head in self.heads.items()}


def fit(
    inputs: Tensor,
    answers: Mapping[str, Tensor],
    questions: Mapping[str, int],
    *,
    steps: int,
    width: int = 32,
    layers: int = 4,
    batch: int = 64,
    lr: float = 5e-3,
    flip: bool = False,
    seed: int = 0,
) -> Classifier:
    """Trains one on `inputs` in [−1, 1] and their `answers` [N]. `questions`: how many answers each has."""
    torch.manual_seed(seed)
    device = inputs.device
    model = Classifier(questions, inputs.dim() == 5, width, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    reach = inputs.shape[-1] // 8
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (batch,), device=device)
        dx, dy = torch.randint(-reach, reach + 1, (2,)).tolist()
        x = inputs[chosen].roll((dy, dx), (-2, -1))
        if flip and torch.rand(()) < 0.5:
            x = x.flip(-1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = model(x)
        loss = sum(F.cross_entropy(found[name].float(), answers[name][chosen]) for name in questions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, inputs: Tensor, answers: Mapping[str, Tensor], batch: int = 256) -> dict[str, float]:
    """The share that is answered rightly, for each question, and "all" of them where there are several."""
    right: dict[str, list[Tensor]] = {name: [] for name in answers}
    for start in range(0, len(inputs), batch):
        found = model(inputs[start : start + batch])
        for name, values in answers.items():
            right[name].append(found[name].argmax(1) == values[start : start + batch])
    each = {name: torch.cat(parts) for name, parts in right.items()}
    if len(each) > 1:
        each["all"] = torch.stack(list(each.values())).all(0)
    return {name: values.double().mean().item() for name, values in each.items()}
