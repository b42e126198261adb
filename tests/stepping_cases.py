"""Cases over several processes for `test_precision`, `test_stepping` and `test_ema`.

Each check returns what it found wrong, so that the same checks show what is right and that mutants are noticed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import opendit
from opendit import ema, loss_scale, nonfinite, sharded_ema, stepping
from tests.comparing import build
from tests.tiny_models import TINY

KINDS = ("alone", "ddp", "sharded", "one process")
# Nothing averages gradients, so that processes train on one batch. "one process": FSDP2 over a mesh of one.
APART = ("alone", "one process")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-3),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}
STEPPED = [
    ("alone", "adamw"),
    ("alone", "fused"),
    ("alone", "sgd"),
    ("ddp", "adamw"),
    ("sharded", "adamw"),
    ("sharded", "fused"),
]
_DIT = TINY[0]


def cases(world: int) -> dict[str, Any]:
    if world == 4:
        return {
            "skip/sharded/adamw": functools.partial(skips_together, "sharded", "adamw"),
            "ema/sharded": functools.partial(averages, "sharded", world),
            "ema/hybrid": functools.partial(averages, "hybrid", world),
            "gradients/hybrid": functools.partial(gradients, "hybrid", world),
            "overflow/hybrid": functools.partial(overflow_on_one, "hybrid"),
        }
    found: dict[str, Any] = {}
    for kind, name in STEPPED:
        found[f"skip/{kind}/{name}"] = functools.partial(skips_together, kind, name)
    for kind in KINDS:
        found[f"overflow/{kind}"] = functools.partial(overflow_on_one, kind)
        found[f"gradients/{kind}"] = functools.partial(gradients, kind, world)
        found[f"ema/{kind}"] = functools.partial(averages, kind, world)
    found["gradients/replicas"] = functools.partial(gradients, "replicas", world)
    for case in (stop, snapshots, gathered_shards, apart, let_go):
        found[case.__name__] = case
    for name, mutant in MUTANTS.items():
        found[f"mutant/{name}"] = functools.partial(mutated, *mutant)
    return found


def made(kind: str, config: dict[str, Any], optimizer: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model as it is trained, and its optimizer; on every process the same."""
    model = build(_DIT).eval()  # no label drop: processes draw alike
    with mock.patch("opendit.patch.planner.disagreement", return_value=None):  # others test that
        return _made(model, kind, config, optimizer)


def _made(model: Any, kind: str, config: dict[str, Any], optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    if kind in ("alone", "ddp"):
        model, stepped = opendit.accelerate(model, config, optimizer=OPTIMIZERS[optimizer](model.parameters()))
        return (DistributedDataParallel(model) if kind == "ddp" else model), stepped
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    shards = {"hybrid": world // 2, "sharded": world}.get(kind, 1)
    mesh = init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicas", "shards"))
    if kind in ("sharded", "one process"):
        mesh = mesh["shards"]
    opendit.accelerate(model, config)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model, opendit.attach(model, OPTIMIZERS[optimizer](model.parameters()))


def samples(rank: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, 4, 6, 6, generator=generator)
    return x, torch.randint(0, 1000, (count,), generator=generator), torch.randint(0, 5, (count,), generator=generator)


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    return model(*samples(rank)).square().mean()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a skipped step must leave alone, on this process."""
    found = {f"parameter {n}": local(p).clone() for n, p in model.named_parameters()}
    for i, state in enumerate(optimizer.state.values()):
        found |= {f"state {i} {key}": local(v).clone() for key, v in state.items() if isinstance(v, torch.Tensor)}
    with contextlib.suppress(ValueError):
        for label, parts in ema.pieces(model).items():
            found |= {f"ema {label} {name}": piece.values.clone() for name, piece in parts.items()}
    return found


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    return [name for name in {**before, **after} if name not in same]


def skips_together(kind: str, optimizer: str) -> list[str]:
    """A NaN in one element of one gradient on the last process, in the second and fourth of five steps."""
    model, stepped = made(kind, {"skip_nonfinite": 3, "ema": [0.9, 0.5]}, optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(stepped, 1, gamma=0.5)
    opendit.schedule(schedule)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    wrong: list[str] = []
    for i in range(5):
        loss_of(model, 0 if kind in APART else rank).backward()
        before, rates = everything(model, stepped), schedule.get_last_lr()
        bad = i in (1, 3)
        if bad and rank == last:
            target = next(p for p in model.parameters() if p.grad is not None and local(p.grad).numel())
            local(target.grad).view(-1)[0] = float("nan") if i == 1 else float("inf")
        stepped.step()
        schedule.step()
        moved = changed(before, everything(model, stepped))
        if bad:
            wrong += [f"step {i}: {name} changed" for name in moved]
            wrong += [f"step {i}: the schedule went on"] * (schedule.get_last_lr() != rates)
        else:
            still = [n for n, p in model.named_parameters() if p.grad is not None and local(p.grad).any()]
            still = [n for n in still if f"parameter {n}" not in moved]
            wrong += [f"step {i}: {name} did not change" for name in still]
            wrong += [f"step {i}: the schedule stood still"] * (schedule.get_last_lr() == rates)
        stepped.zero_grad()
    counted = stepping.stepper_of(opendit.api.unwrap(model)).state()
    wrong += [f"counted {counted}"] * ((counted["taken"], counted["skipped"]) != (3, 2))
    return wrong


def overflow_on_one(kind: str) -> list[str]:
    """fp16: one process's gradients are beyond fp16, before and after good steps; then the scale fits."""
    model, stepped = made(kind, {"precision": "fp16", "ema": 0.9})
    stepper = stepping.stepper_of(opendit.api.unwrap(model))
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    wrong: list[str] = []
    expected = 2.0**16
    for i in range(4):
        loss = loss_of(model, 0 if kind in APART else rank)
        bad = i in (0, 2)
        (loss * 1e5 if bad and rank == last else loss).backward()
        before = everything(model, stepped)
        stepped.step()
        stepped.zero_grad()
        moved = changed(before, everything(model, stepped))
        wrong += [f"step {i}: {name} changed" for name in moved] if bad else []
        wrong += [f"step {i}: nothing changed"] if not bad and not moved else []
        expected = expected / 2 if bad else expected
        scale = stepper.state()["scale"]["value"]
        wrong += [f"step {i}: scale {scale}, not {expected}"] if scale != expected else []
    return wrong


def gradients(kind: str, world: int, precision: str = "fp16") -> tuple[float, float]:
    """Worst error over all gradients of two accumulated backwards with a small loss: (ours, torch's own fp16).

    Both against fp64. Without a scale, or with one that stays, they would be nothing like it.
    """
    small = 1e-4  # most gradients are below what fp16 has without a scale
    plain = build(_DIT).eval()
    ranks = range(1) if kind in APART else range(world)
    truth = build(_DIT, torch.float64).eval()
    for _ in range(2):
        for rank in ranks:
            x, t, y = samples(rank)
            (truth(x.double(), t, y).square().mean() * small / len(ranks)).backward()
            with torch.autocast("cpu", dtype=torch.float16):
                out = plain(x, t, y)
            (out.float().square().mean() * small / len(ranks) * 2.0**16).backward()
    model, _ = made(kind, {"precision": precision})
    for _ in range(2):
        (loss_of(model, 0 if kind in APART else dist.get_rank()) * small).backward()
    wanted = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
    theirs = {n: p.grad.double() / 2.0**16 for n, p in plain.named_parameters() if p.grad is not None}
    ours = {
        n.removeprefix("module."): whole(p.grad).double() for n, p in model.named_parameters() if p.grad is not None
    }
    assert ours.keys() == wanted.keys()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    norm = whole(norm).double()
    true_norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert abs(norm - true_norm) <= 1e-2 * true_norm, (norm, true_norm)
    return _worst(ours, wanted), _worst(theirs, wanted)


def _worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(((found[n] - w).norm() / w.norm()).item() for n, w in wanted.items())


def averages(kind: str, world: int) -> list[str]:
    """Five steps, one of them skipped: averages against their definition in fp64, in and out, gathered, and counted."""
    config = {"ema": opendit.EMA(decays=(0.7, 0.95), warmup=True, stds=(0.1,)), "skip_nonfinite": True}
    model, stepped = made(kind, config)
    unwrapped = opendit.api.unwrap(model)
    trained = {n: p for n, p in unwrapped.named_parameters() if p.requires_grad}
    wanted = {label: {n: whole(p).double() for n, p in trained.items()} for label in ("0.7", "0.95", "std0.1")}
    profiles = config["ema"].profiles()
    t = 0
    for i in range(5):
        loss_of(model, 0 if kind in APART else dist.get_rank()).backward()
        if i == 2 and dist.get_rank() == 0:
            local(next(iter(trained.values())).grad).view(-1)[0] = float("inf")
        stepped.step()
        stepped.zero_grad()
        if i == 2:
            continue
        t += 1
        for label, values in wanted.items():
            for n, value in values.items():
                weight = profiles[label].weight(t)
                values[n] = (1 - weight) * value + weight * whole(trained[n]).double()
    wrong: list[str] = []
    elements = sum(p.numel() for p in trained.values())
    for label, values in sharded(unwrapped).values.items():
        held = sum(v.numel() for v in values)
        storage = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}
        shares = {"hybrid": world // 2, "one process": 1}.get(kind, world)
        wrong += [f"{label}: {held} held of {elements}"] * (held > elements / shares + 48 * 6 * len(values))
        wrong += [f"{label}: {sum(storage.values())} bytes for {held}"] * (sum(storage.values()) != 4 * held)
    own = {n: local(p).clone() for n, p in unwrapped.named_parameters()}
    model(*samples(0))  # leaves what FSDP2 gathered, where it does
    for label, values in wanted.items():
        before = model(*samples(0)).detach()
        with contextlib.suppress(KeyError), opendit.ema_weights(model, label):
            inside = {n: whole(p).double() for n, p in unwrapped.named_parameters()}
            out = model(*samples(0)).detach()
            with pytest_raises(RuntimeError, "inside opendit.ema_weights"):
                stepped.step()
            raise KeyError
        wrong += [f"{label}: outputs inside are those outside"] * torch.equal(out, before)
        wrong += [f"{label}: outputs after are not those before"] * (not torch.equal(model(*samples(0)), before))
        sharded_ema.reshard(unwrapped)
        now = {n: local(p) for n, p in unwrapped.named_parameters()}
        wrong += [f"{label}: {n} is not back" for n in own if not torch.equal(own[n], now[n])]
        state = opendit.ema_state_dict(model, label)
        if dist.get_rank() != 0:
            wrong += ["a state dict away from process 0"] * bool(state)
            state = {}
        elif list(state) != list(unwrapped.state_dict()):
            wrong.append("keys differ")
        for n, value in values.items():
            for where, found in (("inside", inside[n]), ("gathered", state.get(n))):
                if found is not None and (found.double() - value).norm() > 1e-6 * value.norm():
                    wrong.append(f"{label}: {where}, {n} is not the EMA")
        fresh = build(_DIT)
        if state:
            fresh.load_state_dict(state)
    return wrong


def sharded(model: nn.Module) -> sharded_ema.ShardedEma:
    return stepping.stepper_of(model).ema


@contextlib.contextmanager
def pytest_raises(kind: type[Exception], says: str) -> Iterator[None]:
    said = "nothing"
    try:
        yield
    except kind as error:
        said = str(error)
    assert says in said


def stop() -> str:
    """Three in a row: what is said."""
    model, stepped = made("ddp", {"skip_nonfinite": 3})
    for i in range(3):
        loss_of(model, dist.get_rank()).backward()
        if dist.get_rank() == 1:
            model.module.blocks[1].mlp.fc1.weight.grad[0, 0] = float("nan")
        try:
            stepped.step()
        except opendit.NonFiniteGradients as error:
            return f"{i}: {error}"
        stepped.zero_grad()
    return "nothing was raised"


def snapshots() -> list[float]:
    """A synthesised average against the definition, from the files of all processes: relative error per parameter."""
    folder = [tempfile.mkdtemp(prefix="snapshots") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    path = str(folder[0])
    described = opendit.EMA(stds=(0.05, 0.15), snapshot_every=2, snapshots=path)
    errors: dict[str, float] = {}
    for kind in ("sharded", "ddp"):
        model, stepped = made(kind, {"ema": described})
        unwrapped = opendit.api.unwrap(model)
        weights = opendit.ema_profiles.Power(opendit.ema_profiles.gamma_of(0.1))
        wanted: dict[str, torch.Tensor] = {}
        for t in range(1, 33):
            loss_of(model, dist.get_rank()).backward()
            stepped.step()
            stepped.zero_grad()
            for n, p in unwrapped.named_parameters():
                if p.requires_grad:
                    value = whole(p).double()
                    wanted[n] = value if n not in wanted else wanted[n] + weights.weight(t) * (value - wanted[n])
        dist.barrier()
        found = opendit.posthoc_ema(path, std=0.1)
        assert found.keys() == wanted.keys()
        for n, w in wanted.items():
            error = ((found[n].double() - w).norm() / (w - whole(unwrapped.get_parameter(n)).double()).norm()).item()
            errors[f"{kind} {n}"] = error
        assert sorted(int(p.name) for p in Path(path).iterdir()) == list(range(2, 33, 2))
        dist.barrier()
    return list(errors.values())


def gathered_shards() -> list[str]:
    """What FSDP2 keeps gathered after a forward is not used for the averages, nor left over from them."""
    model, stepped = made("sharded", {"ema": 0.5})
    loss_of(model, dist.get_rank()).backward()
    stepped.step()
    with torch.no_grad():
        before = model(*samples(0))
        with opendit.ema_weights(model):
            inside = model(*samples(0))
        after = model(*samples(0))
    state = opendit.ema_state_dict(model)
    wrong = ["the EMA was not used"] * torch.equal(before, inside) + ["the EMA stayed"] * (
        not torch.equal(before, after)
    )
    if state:
        fresh = build(_DIT).eval()
        fresh.load_state_dict(state)
        wrong += ["not the EMA's output"] * (not torch.allclose(fresh(*samples(0)), inside, atol=1e-5))
    return wrong


def let_go() -> list[bool]:
    """Whether a model is gone once its user lets go of it, sharded as well."""
    gone = []
    for kind in ("alone", "sharded"):
        model, stepped = made(kind, {"precision": "fp16", "ema": 0.5})
        scheduler = opendit.schedule(torch.optim.lr_scheduler.StepLR(stepped, 1))
        loss_of(model, 0).backward()
        stepped.step()
        scheduler.step()
        watched = weakref.ref(model)
        del model, stepped, scheduler
        gc.collect()
        gone.append(watched() is None)
    return gone


def apart() -> str:
    """Processes that train models of their own have no common EMA."""
    model, stepped = made("alone", {"ema": 0.5})
    loss_of(model, dist.get_rank()).backward()
    stepped.step()
    try:
        opendit.ema_state_dict(model)
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


def _stale(self: Any, *args: Any, original: Any = sharded_ema.ShardedEma.update) -> None:
    if dist.get_rank() == 1:
        self.steps += 1
    else:
        original(self, *args)


def _careless(self: Any, found: Any = None, original: Any = sharded_ema.ShardedEma.update) -> None:
    original(self, None)


def _follows_skipped(self: Any, skipped: bool, original: Any = stepping.Stepper._conclude) -> None:
    if skipped and self.ema is not None:
        self.ema.update()
    original(self, skipped)


class _NoReduce:
    """torch.distributed without the agreement."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == "all_reduce" else getattr(dist, name)


def _set_without_divisor(self: Any, value: float) -> None:
    self.value = value
    for both in self._tensors.values():
        both.copy_(torch.tensor([value, 1 / value]))


# By name: (the check that must notice, what is replaced, by what).
MUTANTS: dict[str, tuple[Callable[[], Any], Any, str, Any]] = {
    "ema follows skipped steps": (
        functools.partial(skips_together, "ddp", "adamw"),
        stepping.Stepper,
        "_conclude",
        _follows_skipped,
    ),
    "ema not masked on the device": (
        functools.partial(skips_together, "alone", "fused"),
        sharded_ema.ShardedEma,
        "update",
        _careless,
    ),
    "one shard stale": (functools.partial(averages, "sharded", 2), sharded_ema.ShardedEma, "update", _stale),
    "skip decided per process": (functools.partial(skips_together, "ddp", "adamw"), nonfinite, "dist", _NoReduce()),
    "schedule goes on": (
        functools.partial(skips_together, "ddp", "adamw"),
        stepping.Stepper,
        "stands_still",
        lambda self: False,
    ),
    "scale stays on, ddp": (
        functools.partial(gradients, "ddp", 2),
        loss_scale,
        "_unscaled",
        lambda scale, gradient: gradient,
    ),
    "scale stays on, sharded": (
        functools.partial(gradients, "sharded", 2),
        loss_scale.LossScale,
        "_set",
        _set_without_divisor,
    ),
    "shards not let go of": (gathered_shards, sharded_ema, "gathers", lambda module: False),
}


def mutated(check: Callable[[], Any], where: Any, name: str, mutant: Any) -> list[str]:
    """What the check notices, on all processes."""
    noticed: list[str] = []
    with mock.patch.object(where, name, mutant):
        try:
            found = check()
            noticed = found if isinstance(found, list) else [f"error {found[0]}"] * (found[0] > 1.2 * found[1])
        except (AssertionError, RuntimeError) as error:
            noticed = [str(error)]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, noticed)
    return [problem for problems in said for problem in problems]
