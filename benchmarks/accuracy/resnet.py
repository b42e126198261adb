"""ResNet-56 for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2): 64 features and 10 logits of a 32×32 image.

Shortcuts have no parameters (option A): every second pixel, and zeros for the channels that are new. Keys are those of
akamaster/pytorch_resnet_cifar10, whose weights it reads; images are normalised with ImageNet's mean and deviation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.stride = 2 if inputs != width else 1
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            new = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new, new))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """`forward`: images [B, 3, 32, 32] in [−1, 1] → features [B, 64], logits [B, 10]."""

    def __init__(self, blocks: int = 9, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, classes)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = ((images + 1) / 2 - self.mean) / self.std
        x = torch.relu(self.bn1(self.conv1(x)))
        features = self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
        return features, self.linear(features)
