"""Cases for `test_elastic`: one start of four processes, in which smaller worlds are made and left again."""

from __future__ import annotations

import copy
import datetime
import functools
import itertools
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import opendit
from opendit.checkpoint import division, together
from tests.checkpoint.running import differences
from tests.tiny_models import UserDiT, randomise

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]  # data parallel × sequence parallel
ENGINES = ["ddp", "zero2", "zero3"]
CONFIGS = [(dp, sp, engine) for (dp, sp), engine in itertools.product(LAYOUTS, ENGINES)]
HYBRID = (4, 1, "hybrid")  # two replicas of two shards

# Each way of dividing into each other, sizes up and down, with and without sequences that are shared.
SOME = list(
    itertools.product(
        [(1, 1, "ddp"), (2, 2, "zero2"), (4, 1, "zero3"), HYBRID],
        [(4, 1, "ddp"), (2, 2, "zero3"), (1, 2, "zero2"), (1, 1, "zero3")],
    )
)
ALL = list(itertools.product([*CONFIGS, HYBRID], repeat=2))


def cases(world: int) -> dict[str, Any]:
    return {"some": functools.partial(told, SOME)}


class World:
    """The first `size` of the four processes as a world of their own; the others wait at the end."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self.number = folder, rank, 0

    def enter(self, size: int) -> bool:
        self.number += 1
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank < size:
            store = dist.FileStore(str(self.folder / f"store{self.number}"), size)
            limit = datetime.timedelta(seconds=600)  # others wait this long
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=size, timeout=limit)
        return self.rank < size


class Run:
    """A sharded or replicated model, its optimizer and averaged weights, that have seen a step."""

    def __init__(self, config: tuple[int, int, str], seed: int):
        _, sp, engine = config
        self.config = config
        # Odd sizes: rows do not divide by the number of processes, some shards are empty.
        model = randomise(UserDiT(size=4, dim=18, heads=3, depth=1, classes=3), seed).double()
        model.t_embedder.mlp.register_forward_pre_hook(lambda m, args: (args[0].double(),))
        opendit.accelerate(model, sp_size=sp)
        self.ema = _on(copy.deepcopy(model), engine)
        self.model = _on(model, engine)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3 * (seed + 1))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.sampler = opendit.ResumableSampler(
            24, 4, seed=5, rank=opendit.data_parallel_rank(model), ranks=opendit.data_parallel_size(model)
        )

    def train(self, steps: int) -> float:
        """The last step's loss, over all processes."""
        self.model.eval()  # no label drop: it would draw from torch
        loss = torch.tensor(0.0)
        done = self.sampler.position // 4
        for step, _ in zip(range(done, done + steps), self.sampler.over(self.sampler), strict=False):
            ids = self.sampler.ids
            noise = opendit.noise((4, 4, 4), 0, step, ids, dtype=torch.float64)
            t = opendit.timesteps(1000, 0, step, ids)
            loss = self.model(noise, t, t % 3).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            if step == done + steps - 1:
                break
        loss = loss.detach()
        dist.all_reduce(loss)
        return loss.item() / dist.get_world_size()

    @torch.no_grad()
    def look(self) -> None:
        """A forward without a backward, after which FSDP2 keeps what it gathered: states must be of the shards."""
        for module in (self.model.eval(), self.ema.eval()):
            module(torch.ones(1, 4, 4, 4, dtype=torch.float64), torch.tensor([1]), torch.tensor([1]))

    def parts(self) -> dict[str, Any]:
        return {"ema": self.ema, "scheduler": self.scheduler, "sampler": self.sampler}

    def facts(self) -> dict[str, Any]:
        """The state gathered: whole tensors, on every process."""
        target = opendit.api.unwrap(self.model)
        names = {id(p): n for n, p in target.named_parameters()}
        found: dict[str, Any] = {f"model {n}": _whole(v) for n, v in target.state_dict().items()}
        found |= {f"ema {n}": _whole(v) for n, v in opendit.api.unwrap(self.ema).state_dict().items()}
        for p, state in self.optimizer.state.items():
            found |= {f"optimizer {names[id(p)]} {k}": _whole(v) for k, v in state.items()}
        found["lr"] = self.optimizer.param_groups[0]["lr"]
        found["scheduler"] = str(sorted(self.scheduler.state_dict().items()))
        found["position"] = self.sampler.position
        return found


def _on(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (2, 2) if engine == "hybrid" else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=engine != "zero2")
    return fully_shard(model, mesh=mesh, reshard_after_forward=engine != "zero2")


def _whole(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """{"saved → loaded": what differed} of this rank, and how long reading and writing took."""
    rank = dist.get_rank()
    division._WORTH_DIVIDING = 8  # tensors are tiny here
    folders: list[Any] = [tempfile.mkdtemp(prefix="elastic") if rank == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    world = World(folder, rank)
    found: dict[str, Any] = {}
    for saved in dict.fromkeys(s for s, _ in pairs):
        if world.enter(saved[0] * saved[1]):
            run = Run(saved, 0)
            run.train(2)
            run.look()
            opendit.seed(3, opendit.api.unwrap(run.model))
            opendit.save(folder / _name(saved), run.model, run.optimizer, step=2, **run.parts())
            facts = run.facts()
            next_loss = run.train(1)
            if rank == 0:
                torch.save((facts, next_loss), folder / f"{_name(saved)}.facts")
            dist.barrier()
    for loaded in dict.fromkeys(target for _, target in pairs):
        if not world.enter(loaded[0] * loaded[1]):
            continue
        run = Run(loaded, 1)
        for saved in [s for s, target in pairs if target == loaded]:
            what = f"{_name(saved)} → {_name(loaded)}"
            run.look()
            opendit.load(folder / _name(saved), run.model, run.optimizer, **run.parts())
            expected, next_loss = torch.load(folder / f"{_name(saved)}.facts", weights_only=False)
            found[what] = differences(run.facts(), expected)
            # All processes of a group draw alike, different groups do not.
            drawn = together.everyones(torch.rand(1).item())
            groups = {r // loaded[1]: drawn[r] for r in range(len(drawn))}
            if saved[:2] != loaded[:2] and any(drawn[r] != groups[r // loaded[1]] for r in range(len(drawn))):
                found[what].append("random states differ in a group")
            if len(set(groups.values())) < len(groups):
                found[what].append("random states are equal in different groups")
            # It goes on with the same samples, noise and timesteps.
            loss = run.train(1)
            if abs(loss - next_loss) > 1e-12 * next_loss:
                found[what].append(f"the next loss is {loss}, not {next_loss}")
    world.enter(4)
    return found


def _name(config: tuple[int, int, str]) -> str:
    return f"dp{config[0]}sp{config[1]}{config[2]}"


def told(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """`_pairs`, or how it failed: in a world of some of the processes, so that the others can't be told otherwise."""
    try:
        return _pairs(pairs)
    except Exception:
        print(traceback.format_exc(), flush=True)
        os._exit(1)
