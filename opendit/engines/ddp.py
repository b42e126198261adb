"""torch's DistributedDataParallel over all dp × sp processes: everything is whole everywhere, gradients are averaged.

Bytes per parameter of n bytes (fp32: 4), AdamW: n parameter, n gradient (which lies in DDP's buckets), 2n moments.

Static graph stays off: with it a first backward inside `no_sync` fails an assertion of torch's reducer, and it would
spare nothing here, where every trainable parameter takes part in every step and none is searched for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from opendit import optim
from opendit.config import OptimizerFactory
from opendit.engines.engine import Placed, Setup


class DDP:
    source, plugin = "torch", "ddp"
    moves_parameters = None

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "plugin: got 'ddp' for a model without trainable parameters; leave plugin out for sampling"
            )
        check_reduction(setup)

    def promises(self, setup: Setup) -> list[str]:
        return [
            "torch's DistributedDataParallel; parameters, gradients and optimizer states are whole on every process",
            f"gradients: averaged over the world in {'bf16' if setup.reduction == 'bf16' else 'their own dtype'}; they "
            "lie in DDP's buckets",
            "bytes per parameter of n bytes with AdamW: n (parameter) + n (gradient) + 2n (moments)",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        on_gpu = setup.device.type == "cuda"
        wrapper = DistributedDataParallel(
            model,
            device_ids=[setup.device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
        if setup.reduction == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapper.register_comm_hook(None, bf16_compress_hook)
        if callable(optimizer):
            optimizer = optim.build(optimizer, model)
        lines = (f"over {dist.get_world_size()} processes, {dist.get_backend()}", *self.promises(setup))
        return Placed(wrapper, optimizer, lines)

    def stepped(self, placed: nn.Module) -> None:
        pass

    def no_sync(self, placed: nn.Module) -> AbstractContextManager[None]:
        return cast("AbstractContextManager[None]", cast(DistributedDataParallel, placed).no_sync())

    def undo(self, placed: nn.Module) -> nn.Module:
        return cast(nn.Module, cast(DistributedDataParallel, placed).module)


def check_reduction(setup: Setup) -> None:
    """DDP's bf16 hook divides on the way, which gloo can't."""
    if setup.reduction == "bf16" and setup.device.type == "cpu":
        raise ValueError(
            "reduction: got 'bf16' with plugin='ddp' for a model on cpu; allowed: on GPUs. Leave reduction out, or "
            "choose plugin='zero2'"
        )


ENGINES = (DDP(),)
