"""Engines with something broken in them, for `test_mutants`: errors of training, which must be seen."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from opendit.engines import ddp, fsdp
from tests.engines import behaving
from tests.engines.training import case


def cases(world: int) -> dict[str, Any]:
    if world != 2:
        return {}
    found = {f"mutant/{name}": functools.partial(_with, *mutant) for name, mutant in MUTANTS.items()}
    found["mutant/gathers outlive inference"] = gathers_outlive_inference
    found["mutant/gathers outlive the step"] = gathers_outlive_the_step
    found["mutant/frozen rounded"] = frozen_rounded
    found["mutant/embeddings rounded"] = embeddings_rounded
    found["mutant/own values"] = own_values
    return found


def _with(target: Any, name: str, broken: Any, plugin: str, sp: int) -> float:
    with mock.patch.object(target, name, broken):
        try:
            return _error(case(plugin, "dit", sp))
        except AssertionError:  # gradients or moments are missing
            return math.inf


def _error(errors: dict[str, Any]) -> float:
    return max(errors[what][0] for what in ("gradients", "parameters", "moments"))


def _data_parallel_only(kind: str) -> Any:
    """The mesh of processes with one's own sequence rank."""
    from opendit.fastseq.mesh import groups

    return groups(2).mesh["dp"], "mutant"


class _DataParallelDDP(nn.parallel.DistributedDataParallel):
    def __init__(self, model: nn.Module, **options: Any) -> None:
        from opendit.fastseq.mesh import groups

        super().__init__(model, process_group=groups(2).dp, **options)


class _SummingDDP(nn.parallel.DistributedDataParallel):
    """Averages in every backward of an accumulation what was summed already."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.register_comm_hook(None, _sum)


def _sum(state, bucket):  # annotations that are strings are not understood there
    work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda future: future.value()[0])


@contextlib.contextmanager
def _never_on_again(self: Any, model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield


def _nothing(*args: Any, **options: Any) -> None: ...


MUTANTS: dict[str, tuple[Any, str, Any, str, int]] = {
    "mean over the wrong group": (fsdp, "_mesh", _data_parallel_only, "zero3", 2),
    "mean over the wrong group, ddp": (ddp, "DistributedDataParallel", _DataParallelDDP, "ddp", 2),
    "synced twice": (ddp, "DistributedDataParallel", _SummingDDP, "ddp", 1),
    "never synced": (fsdp.FSDP, "_adding_up", _never_on_again, "zero1", 1),
    "old parameters": (fsdp.optim, "rebind", _nothing, "zero2", 1),
}


def gathers_outlive_inference() -> float:
    with mock.patch.object(fsdp, "_free", _nothing):
        return behaving.written_between("zero2")


def gathers_outlive_the_step() -> float:
    with mock.patch.object(fsdp, "_free", _nothing):
        return _error(behaving.inference("zero2")["trained"])


def frozen_rounded() -> float:
    """The position embeddings are divided and gathered in bf16."""
    with (
        mock.patch.object(fsdp, "_left_whole", return_value=set()),
        mock.patch.object(fsdp, "_policy", functools.partial(_lower_everywhere, fsdp._policy)),
    ):
        return behaving.bf16_gathers("zero2")[0]


def embeddings_rounded() -> float:
    with mock.patch.object(fsdp, "_policy", functools.partial(_lower_everywhere, fsdp._policy)):
        return behaving.bf16_gathers("zero2")[0]


def _lower_everywhere(policy: Any, unit: Any, setup: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def own_values() -> float:
    with mock.patch.object(fsdp, "_as_first_process_has", _nothing):
        return max(error for error, _ in behaving.different_seeds())
