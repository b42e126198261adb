"""The Inception-v3 of FID (TensorFlow's inception-2015-12-05), from a local safetensors file.

The file's keys are torchvision's module names without BatchNorm scales, which are all 1:

    Conv2d_1a_3x3.conv.weight   fp16 or fp32 [out, in, kh, kw], and so on for every convolution below
    Conv2d_1a_3x3.bn.bias, .bn.running_mean, .bn.running_var    fp32 [out]
    fc.weight, fc.bias          optional, [1008, 2048] and [1008]: the logits that the Inception Score needs

It differs from torchvision's network in three places: average pools leave the padding out of the mean, the last block
pools its maximum, and images are resized to 299 × 299 as TensorFlow 1 did, without half-pixel centres: output pixel i
lies at i · size / 299. Input is (x − 128) / 128 for x in 0 … 255; features are the 2048 means of the last map.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class Mixed6a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(288, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], 1)


class Mixed6(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width, 1), Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width, 1), Conv(width, width, **column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, **row), Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class Mixed7a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), padding=(3, 0)), Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class Mixed7(nn.Module):
    def __init__(self, inputs: int, pool_maximum: bool):
        super().__init__()
        self.pool_maximum = pool_maximum
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.pool_maximum else average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    def __init__(self, logits: bool = False):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a, self.Mixed_6b = Mixed6a(), Mixed6(128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = Mixed6(160), Mixed6(160), Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b, self.Mixed_7c = Mixed7(1280, pool_maximum=False), Mixed7(2048, pool_maximum=True)
        self.fc = nn.Linear(2048, 1008) if logits else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, H, W] → features [B, 2048] and logits [B, 1008], or None without `fc`."""
        x = (resize_like_tensorflow(images.float(), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return features, self.fc(features) if self.fc else None


def resize_like_tensorflow(x: Tensor, size: int) -> Tensor:
    """Bilinear, output pixel i taken at i · input / size, the last row and column repeated."""

    def along(x: Tensor, dim: int) -> Tensor:
        length = x.shape[dim]
        place = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = place.floor().long()
        weight = (place - low).view(-1, *(1,) * (x.ndim - 1 - dim))
        return x.index_select(dim, low).lerp(x.index_select(dim, (low + 1).clamp(max=length - 1)), weight)

    return along(along(x, 2), 3)


def load_inception(path: Path) -> Inception:
    """Raises ValueError where the file has other layers."""
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    model = Inception(logits="fc.weight" in weights)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith(("bn.weight", "num_batches_tracked"))]
    if missing or unexpected:
        raise ValueError(
            f"features: {path} is not in the layout of FID's Inception network: "
            f"{len(missing)} tensors are missing, {len(unexpected)} unknown, such as {(missing + unexpected)[0]}"
        )
    return model.eval().requires_grad_(False)
