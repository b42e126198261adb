"""Which process shares a sequence with which: dp × sp meshes, sp innermost, their groups explicit.

Rank r of the world is sequence rank r mod sp of group r // sp, so that neighbours (of one node, with torchrun) share a
sequence. With `ring` > 1 the sp processes are laid out ring × ulysses, ulysses innermost.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How many processes other launchers started, which are not meant to train apart.
_LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")


@dataclass(frozen=True)
class Groups:
    """This process's place in the mesh, and the groups it communicates in.

    `sp` is all that share its sequence, in a group that is never the world's; `ulysses` and `ring` are rows and columns
    of it; `dp` holds the processes with its sequence rank.
    """

    mesh: DeviceMesh
    sp: ProcessGroup
    dp: ProcessGroup
    ulysses: ProcessGroup | None  # None: a row or column of one process
    ring: ProcessGroup | None
    rank: int
    size: int
    dp_rank: int
    dp_size: int

    def axis(self, name: str) -> ProcessGroup:
        """The group called `name`: "sp", "dp", "ulysses" or "ring"."""
        group: ProcessGroup | None = getattr(self, name)
        assert group is not None, f"{name} is one process; there is nobody to talk to"
        return group


# One entry per layout; meshes of a default group that is gone are dropped with it.
_built: dict[tuple[int, int], Groups] = {}
_built_for: list[object] = []


def ensure_world(
    device: torch.device, asked: str = "sp_size: got more than 1", *, alone: bool = False, timeout: float | None = None
) -> bool:
    """Sets the default process group up from torchrun's environment if there is none; whether it did.

    Args:
        device: this process's, where there are GPUs; without an index it is torchrun's LOCAL_RANK.
        asked: what needs the group, to begin a message with.
        alone: without torchrun's environment, a world of this process alone will do.
        timeout: of collectives, in seconds; torch's own if not given.

    Raises `ValueError` where there is neither a group nor such an environment.
    """
    field = asked.split(":")[0]
    if not dist.is_available():
        raise ValueError(f"{field}: this torch was built without torch.distributed; leave {field} out")
    if dist.is_initialized():
        return False
    missing = [name for name in _TORCHRUN if name not in os.environ]
    others = [name for name in _LAUNCHED if int(os.environ.get(name, "1")) > 1]
    if missing and (others or not alone):
        started = f"; {others[0]} says that there are several processes" if others else ""
        raise ValueError(
            f"{asked}, but there is no process group and no torchrun environment (missing: "
            f"{', '.join(missing)}){started}; start with `torchrun --nproc-per-node=N script.py`, call "
            f"torch.distributed.init_process_group first, or leave {field} out"
        )
    options: dict[str, Any] = {} if timeout is None else {"timeout": datetime.timedelta(seconds=timeout)}
    if missing:
        options |= {"store": cast(Any, dist).HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.is_available():
        # NCCL, and objects sent through it, go by the current device.
        mine = device.type == "cuda" and device.index is not None
        torch.cuda.set_device(device if mine else int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", **options)
    else:
        dist.init_process_group("gloo", **options)
    return True


def device_type() -> str:
    """Where the default group's meshes are: "cuda" where there are GPUs and it has a backend for them."""
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend_config() else "cpu"


def check_size(sp_size: int) -> None:
    """Raises `ValueError` where `sp_size` does not divide the number of processes."""
    world = dist.get_world_size()
    if world % sp_size:
        allowed = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"sp_size: got {sp_size}, but there are {world} processes; allowed: a divisor of that: {allowed}"
        )


def groups(sp_size: int, ring: int = 1) -> Groups:
    """The groups of the mesh dp × (ring × ulysses) over the world, where ring · ulysses = sp_size.

    The first call for a layout makes process groups: every process of the world must make it, in the same order.
    """
    if not dist.is_initialized():
        raise ValueError(
            f"sp_size: a model with sp_size={sp_size} was called without a process group; call accelerate in this "
            "process, or torch.distributed.init_process_group"
        )
    world = dist.group.WORLD
    if _built_for[:1] != [world]:
        _built.clear()
        _built_for[:] = [world]
    key = (sp_size, ring)
    if key not in _built:
        _built[key] = _build(sp_size, ring)
    return _built[key]


def _build(sp_size: int, ring: int) -> Groups:
    from torch.distributed.device_mesh import init_device_mesh

    kind = device_type()
    if ring == 1:
        check_size(sp_size)
        dp_size = dist.get_world_size() // sp_size
        mesh = init_device_mesh(kind, (dp_size, sp_size), mesh_dim_names=("dp", "sp"))
        sp, dp = mesh.get_group("sp"), mesh.get_group("dp")
        if dp_size == 1:
            # The mesh takes the world's group, which averages gradients: all-to-alls would queue behind them.
            sp = cast("ProcessGroup", dist.new_group(timeout=_timeout(kind)))
        rank = dist.get_rank()
        return Groups(mesh, sp, dp, sp, None, rank % sp_size, sp_size, rank // sp_size, dp_size)
    place = groups(sp_size)
    if ring == sp_size:
        return replace(place, ulysses=None, ring=place.sp)
    names = ("dp_outer", "ring", "ulysses")
    inner = init_device_mesh(kind, (place.dp_size, ring, sp_size // ring), mesh_dim_names=names)
    return replace(place, ulysses=inner.get_group("ulysses"), ring=inner.get_group("ring"))


def _timeout(kind: str) -> datetime.timedelta | None:
    """The world's own, where it tells."""
    backend = cast(Any, dist.group.WORLD)._get_backend(torch.device(kind))
    found: datetime.timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return found
