"""The model inside what was put around it, and where it is."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, torch.compile and ColossalAI's Gemini."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers) or type(model).__name__ == "GeminiDDP":  # ColossalAI may not be there
            model = cast(nn.Module, model.module)
        elif isinstance(model, torch.jit.ScriptModule):  # its _modules are none of Python's
            return model
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner  # torch.compile's wrapper
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter is; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
