"""What the ranks of `test_colossalai` run, all in one start of processes, for ColossalAI takes seconds to import."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import opendit
from opendit.engines import colossalai as adapter
from opendit.engines import colossalai_gemini as gemini_adapter
from opendit.pieces import piece_of
from tests.comparing import Results, worst
from tests.engines.training import adamw, compare, expected, named, tiny_of, train, twin, whole
from tests.fastseq import parity

ZERO = ("zero1", "zero2")


def cases(world: int) -> dict[str, Any]:
    if world == 4:
        return {f"parity/{plugin}/dit/2": functools.partial(alike, plugin, "dit", 2) for plugin in ZERO}
    found: dict[str, Any] = {}
    for plugin in ("ddp", *ZERO):
        found |= {
            f"parity/{plugin}/{name}/{sp}": functools.partial(alike, plugin, name, sp) for name, sp in parities(plugin)
        }
        found[f"started/{plugin}"] = functools.partial(started, plugin)
        found[f"explain/{plugin}"] = functools.partial(explained, plugin)
    for plugin in ZERO:
        found[f"loops/{plugin}"] = functools.partial(odd_loops, plugin)
        found[f"state/{plugin}"] = functools.partial(states, plugin)
        found[f"pieces/{plugin}"] = functools.partial(pieces, plugin)
        found[f"seeds/{plugin}"] = functools.partial(different_seeds, plugin)
        found[f"bf16 reduction/{plugin}"] = functools.partial(reduced_in_bf16, plugin)
    found["refusals"] = refusals
    found["restore"] = restored
    found["classes"] = classes_untouched
    for plugin in ZERO:
        found[f"let go/{plugin}"] = functools.partial(let_go, plugin)
        found[f"nan/{plugin}"] = functools.partial(not_a_number, plugin)
    found["gemini"] = gemini
    found["gemini sp"] = functools.partial(gemini, 2)
    found |= {f"mutant/{name}": functools.partial(broken, *mutant) for name, mutant in MUTANTS.items()}
    found["mutant/gemini accumulates wholes"] = gemini_broken
    return found


def parities(plugin: str) -> list[tuple[str, int]]:
    """(model, sp_size)."""
    return [("dit", 1), ("dit", 2), *([("diffusers", 2)] if plugin == "zero2" else [])]


def on(plugin: str, name: str = "dit", sp: int = 1, **config: Any) -> tuple[nn.Module, Any, Any, Any]:
    """(model, optimizer, scheduler, the optimizer that was given); the scheduler is built on that, before."""
    model = twin(tiny_of(name)[1])
    given, scheduler = adamw(model)
    cfg = {"plugin": plugin, "engine": "colossalai", "kernels": "reference", **config}
    model, optimizer = opendit.accelerate(model, cfg, optimizer=given, sp_size=sp)
    return model, optimizer, scheduler, given


def alike(plugin: str, name: str, sp: int, **config: Any) -> dict[str, Any]:
    """Errors of a model trained on ColossalAI, against the model trained alone."""
    model, optimizer, scheduler, given = on(plugin, name, sp, **config)
    share, dp = opendit.data_parallel_rank(model), opendit.data_parallel_size(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    errors = {
        "held": held == {id(p) for p in model.parameters() if p.requires_grad},
        "rate": optimizer.param_groups[1]["lr"] == 3e-3,
        "given": given is (optimizer if plugin == "ddp" else optimizer.inner),
        "kind": type(optimizer).__name__,
    }
    return errors | compare(train(model, optimizer, scheduler, tiny_of(name)[0], [share]), expected(name, dp), share)


def odd_loops(plugin: str) -> dict[str, tuple[float, str]]:
    """What else loops do with gradients, each against the same done to the plain model."""
    return {loop.__name__: _both(plugin, loop) for loop in LOOPS}


def _both(plugin: str, loop: Callable[[nn.Module, Any, Callable[[int], None]], None]) -> tuple[float, str]:
    """Every process has the same inputs: the mean over them is what one has alone."""
    results = []
    for distributed in (True, False):
        if distributed:
            model, optimizer, _, _ = on(plugin)
        else:
            model = twin(tiny_of("dit")[1])
            optimizer, _ = adamw(model)
        loop(model, optimizer, functools.partial(_backward, model))
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return worst(*results)


def _backward(model: nn.Module, micro: int) -> None:
    parity.step(model, tiny_of("dit")[0], 0, micro, 1.0)


def zeroed_by_the_model(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    for i in range(3):
        backward(i)
        optimizer.step()
        model.zero_grad()


def zeroed_in_place(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    for i in range(3):
        backward(i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False) if i else model.zero_grad(set_to_none=False)
    optimizer.step()  # moments alone


def never_zeroed(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    for i in range(3):
        backward(i)
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()


def skipped(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    for i in range(4):
        backward(i)
        if i != 1:
            optimizer.step()
        optimizer.zero_grad()


def replaced(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    for i in range(2):
        backward(i)
        for p in model.parameters():
            if p.grad is not None:
                p.grad = 0.3 * whole(p.grad)
        backward(i + 7)
        for p in model.parameters():
            if p.grad is not None:
                p.grad = 0.3 * whole(p.grad)
        optimizer.step()
        optimizer.zero_grad()


def dropped(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    """Some parameters stand still in one step."""
    for i in range(3):
        backward(i)
        for number, p in enumerate(model.parameters()):
            if i == 1 and number % 3 == 0:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()


def by_closure(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        backward(3)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf"))
        return 1.5

    assert [optimizer.step(closure) for _ in range(2)] == [1.5, 1.5]


def failed_halfway(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    """A backward that raises; the loop goes on after zero_grad."""

    def fail(gradient: torch.Tensor) -> None:
        raise ArithmeticError

    backward(0)
    optimizer.step()
    optimizer.zero_grad()
    hook = next(p for p in model.parameters() if p.requires_grad).register_hook(fail)
    with contextlib.suppress(ArithmeticError):
        backward(1)
    hook.remove()
    optimizer.zero_grad()
    backward(2)
    optimizer.step()


def looked_at_twice(model: nn.Module, optimizer: Any, backward: Callable[[int], None]) -> None:
    """Norms change as gradients do; `autograd.grad` in between leaves `.grad` alone."""
    backward(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = nn.utils.get_total_norm([p.grad for p in parameters])
    nn.utils.clip_grad_norm_(parameters, 0.5)
    after = nn.utils.get_total_norm([p.grad for p in parameters])
    assert before > 1
    assert abs(after - 0.5) < 1e-4
    (x, t, y), _ = tiny_of("dit")[0].inputs(torch.float64, torch.device("cpu"))
    torch.autograd.grad(model(x, t, y).sum(), parameters)
    assert nn.utils.get_total_norm([p.grad for p in parameters]) == after
    optimizer.step()


LOOPS = (
    *(zeroed_by_the_model, zeroed_in_place, never_zeroed, skipped, replaced, dropped, by_closure, failed_halfway),
    looked_at_twice,
)


def started(plugin: str) -> tuple[float, str]:
    """The optimizer has taken steps before `accelerate`."""
    model, alone = (twin(tiny_of("dit")[1]) for _ in range(2))
    optimizer, alone_optimizer = adamw(model)[0], adamw(alone)[0]
    for m, o in ((model, optimizer), (alone, alone_optimizer)):
        _backward(m, 0)
        o.step()
        o.zero_grad()
    model, optimizer = opendit.accelerate(model, {"plugin": plugin, "engine": "colossalai"}, optimizer=optimizer)
    for m, o in ((model, optimizer), (alone, alone_optimizer)):
        _backward(m, 1)
        o.step()
    return worst({name: p.detach() for name, p in named(model).items()}, _values(alone))


def _values(model: nn.Module) -> Results:
    return {name: p.detach() for name, p in model.named_parameters()}


def states(plugin: str) -> dict[str, Any]:
    """`state_dict` is the plain optimizer's; it, and `state`, can be written into another."""
    model, optimizer, _, _ = on(plugin)
    alone = twin(tiny_of("dit")[1])
    reference, _ = adamw(alone)
    for m, o in ((model, optimizer), (alone, reference)):
        _backward(m, 0)
        o.step()
        o.zero_grad()
    moments = {
        f"{name}/{key}": (whole(optimizer.state[p][key]), reference.state[q][key])
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True)
        for key in ("exp_avg", "exp_avg_sq")
        if p.requires_grad
    }
    found: dict[str, Any] = {
        "moments": worst({n: a for n, (a, _) in moments.items()}, {n: b for n, (_, b) in moments.items()}),
        "len": len(optimizer.state) == len(reference.state),
    }
    gathered = optimizer.state_dict()
    outcomes = []
    for by in ("state_dict", "whole tensors", "pieces"):
        other, other_optimizer, _, _ = on(plugin)
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        if by == "state_dict":
            other_optimizer.load_state_dict(gathered)
        else:
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                if p.requires_grad:
                    state = {k: v.clone() if v.dim() == 0 else v for k, v in optimizer.state[q].items()}
                    other_optimizer.state[p] = state if by == "pieces" else {k: whole(v) for k, v in state.items()}
        _backward(other, 1)
        other_optimizer.step()
        outcomes.append(_values(other))
    _backward(model, 1)
    optimizer.step()
    same = [all(torch.equal(o[n], p) for n, p in _values(model).items()) for o in outcomes]
    return found | {"same": same, "kept": {k: v for k, v in gathered["param_groups"][1].items() if k == "betas"}}


def pieces(plugin: str) -> bool:
    """Pieces of gradients and moments are each tensor, once."""
    model, optimizer, _, _ = on(plugin)
    _backward(model, 0)
    optimizer.step()
    complete = []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        found = {"exp_avg": optimizer.state[p]["exp_avg"], **({"grad": p.grad} if plugin == "zero2" else {})}
        for tensor in found.values():
            piece = piece_of(tensor)
            flat = torch.zeros(p.numel(), dtype=p.dtype)
            times = torch.zeros(p.numel())
            flat[piece.start : piece.stop] = piece.values
            times[piece.start : piece.stop] += 1
            dist.all_reduce(flat)
            dist.all_reduce(times)
            complete.append(bool((times == 1).all()) and torch.equal(flat.view(p.shape), whole(tensor)))
    return all(complete)


def different_seeds(plugin: str) -> float:
    """Processes that begin with different values train rank 0's."""
    model = twin(tiny_of("dit")[1])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(dist.get_rank())
    make = functools.partial(torch.optim.SGD, lr=0.1)
    model, _ = opendit.accelerate(model, {"plugin": plugin, "engine": "colossalai"}, optimizer=make)
    return worst(_values(model), _values(tiny_of("dit")[1]))[0]


def reduced_in_bf16(plugin: str) -> tuple[float, str]:
    model, _, _, _ = on(plugin, reduction="bf16")
    alone = twin(tiny_of("dit")[1])
    for m in (model, alone):
        _backward(m, 0)
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return worst(found, {name: p.grad for name, p in alone.named_parameters() if p.grad is not None})


def explained(plugin: str) -> str:
    out = io.StringIO()
    before = twin(tiny_of("dit")[1])
    opendit.explain(before, {"plugin": plugin, "engine": "colossalai"}, file=out)
    kept = on(plugin)
    opendit.explain(kept[0], file=out)
    return out.getvalue()


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _place(optimizer: Any = None, model: nn.Module | None = None, **config: Any) -> Any:
    model = twin(tiny_of("dit")[1]) if model is None else model
    given = optimizer(model) if optimizer is not None else None
    try:
        return opendit.accelerate(model, {"engine": "colossalai", **config}, optimizer=given)
    finally:
        if given is None or not isinstance(given, torch.optim.Optimizer):
            opendit.accelerate(model)  # a refusal has left it as it was


def refusals() -> dict[str, str]:
    every = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    some = lambda model: torch.optim.SGD(list(model.parameters())[:3], lr=0.1)  # noqa: E731
    shaped = lambda model: functools.partial(torch.optim.Adafactor, lr=0.1)  # noqa: E731
    frozen = lambda model: torch.optim.SGD([{"params": [model.pos_embed]}, {"params": model.blocks.parameters()}])  # noqa: E731
    found = {
        "none": _message(lambda: _place(plugin="zero1")),
        "some": _message(lambda: _place(some, plugin="zero2")),
        "shaped": _message(lambda: _place(shaped, plugin="zero2")),
        "bf16": _message(lambda: _place(every, twin(tiny_of("dit")[1]).bfloat16(), plugin="zero1")),
        "zero3": _message(lambda: _place(every, plugin="zero3")),
        "gemini fp32": _message(lambda: _place(every, twin(tiny_of("dit")[1]).float(), plugin="gemini")),
        "gemini reduction": _message(lambda: _place(every, twin(tiny_of("dit")[1]).bfloat16(), plugin="gemini")),
        "gemini optimizer": _message(
            lambda: _place(every, twin(tiny_of("dit")[1]).bfloat16(), plugin="gemini", reduction="bf16")
        ),
        "frozen": _message(lambda: _place(frozen, _frozen_but_blocks(), plugin="zero1")),
    }
    model, optimizer, _, _ = on("zero1")
    with opendit.no_sync(model):
        _backward(model, 0)
        found["step inside"] = _message(optimizer.step)
    found["step after"] = _message(optimizer.step)
    found["copied"] = _message(lambda: copy.deepcopy(optimizer))
    optimizer.zero_grad()
    found["group"] = _message(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}))
    found["params"] = _message(lambda: optimizer.param_groups[0].update(params=[]))
    return found


def _frozen_but_blocks() -> nn.Module:
    model = twin(tiny_of("dit")[1])
    model.requires_grad_(False)
    model.blocks.requires_grad_(True)
    return model


def restored() -> dict[str, Any]:
    model, _, _, _ = on("ddp")
    back = opendit.restore(model)
    zero, _optimizer, _, _ = on("zero2")
    return {"ddp": type(back).__name__, "zero2": _message(lambda: opendit.restore(zero))}


def let_go(plugin: str) -> bool:
    """Whether a model is gone once its user lets go of it."""
    model, optimizer, scheduler, given = on(plugin)
    _backward(model, 0)
    with opendit.no_sync(model):
        pass
    optimizer.step()
    optimizer.zero_grad()
    watched = weakref.ref(model)
    del model, optimizer, scheduler, given
    gc.collect()
    return watched() is None


def not_a_number(plugin: str) -> list[str]:
    """A NaN in one process's part, each in turn: all skip, and a schedule on the user's own optimizer stands still."""
    model, optimizer, scheduler, _ = on(plugin, skip_nonfinite=True)
    assert opendit.schedule(scheduler) is scheduler
    wrong = []
    for bad in range(dist.get_world_size()):
        _backward(model, bad)
        before, rates = _values(model), scheduler.get_last_lr()
        if dist.get_rank() == bad or plugin == "zero1":
            p = next(p for p in model.parameters() if p.requires_grad)
            (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).view(-1)[0] = float("nan")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        wrong += [f"{bad}: {n} changed" for n, v in _values(model).items() if not torch.equal(v, before[n])]
        wrong += [f"{bad}: the schedule went on"] * (scheduler.get_last_lr() != rates)
    return wrong


def classes_untouched() -> bool:
    """No class of ColossalAI's is changed by placing a model and training it."""
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.booster import Booster
    from colossalai.zero import LowLevelZeroOptimizer
    from colossalai.zero.low_level.bookkeeping import BucketStore, GradientStore, TensorBucket

    classes = (Booster, CpuAccelerator, LowLevelZeroOptimizer, BucketStore, GradientStore, TensorBucket, torch.Tensor)
    before = [dict(vars(cls)) for cls in classes]
    model, optimizer, _, _ = on("zero2")
    _backward(model, 0)
    optimizer.step()
    return before == [dict(vars(cls)) for cls in classes]


# Gemini's optimizers are compiled for GPUs; this one has what it asks of them.
class PlainAdam(torch.optim.AdamW):
    def step(self, closure: Any = None, div_scale: float = -1) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad.to(p.dtype)
        return super().step()


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
    from colossalai.zero.gemini import gemini_optimizer

    with mock.patch.object(gemini_optimizer, "_AVAIL_OPTIM_LIST", {PlainAdam}):
        yield


def gemini(sp: int = 1) -> dict[str, Any]:
    """A model below 32 Mi parameters, so that chunks stay whole; bf16, against fp32 alone; then what loops do."""
    make = functools.partial(PlainAdam, lr=1e-3)
    model, alone = twin(tiny_of("dit")[1]).bfloat16(), twin(tiny_of("dit")[1]).bfloat16().float()
    cfg = {"plugin": "gemini", "engine": "colossalai", "reduction": "bf16"}
    with _allowed():
        placed, optimizer = opendit.accelerate(model, cfg, optimizer=make, sp_size=sp)
    share, dp = opendit.data_parallel_rank(placed), opendit.data_parallel_size(placed)
    reference = make(alone.parameters())
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        losses = [_loss(placed, share, 10 * step + micro, 1.0) for micro in range(2)]
        expected = [_loss(alone, s, 10 * step + micro, 1 / dp) for s in range(dp) for micro in range(2)]
        found["losses"].append(max(abs(a / b - 1) for a, b in zip(losses, expected[2 * share :], strict=False)))
        if step == 1:  # a step that is not taken
            optimizer.zero_grad()
            reference.zero_grad()
            continue
        if step == 2:  # clipped twice, once by hand
            for p in (*model.parameters(), *alone.parameters()):
                if p.grad is not None:
                    p.grad = 0.5 * p.grad
        norms = [float(nn.utils.clip_grad_norm_(m.parameters(), 0.05)) for m in (placed, alone)]
        found["norms"].append(abs(norms[0] / norms[1] - 1))
        pairs = [
            (p.grad.float(), q.grad)
            for p, q in zip(model.parameters(), alone.parameters(), strict=True)
            if q.grad is not None
        ]
        found["gradients"].append(apart(pairs))
        for group in reference.param_groups:
            group["lr"] = 1e-3 / (1 + len(found["norms"]) - 1)
        optimizer.step()
        reference.step()
        scheduler.step()
        # Each of them is a way to say it.
        optimizer.zero_grad() if step else placed.zero_grad()
        reference.zero_grad()
    weights = placed.state_dict(only_rank_0=False)
    found["parameters"] = apart([(weights[name].float(), q.detach()) for name, q in alone.named_parameters()])
    found["moments"] = apart(
        [
            (optimizer.state[p]["exp_avg"], reference.state[q]["exp_avg"])
            for p, q in zip(model.parameters(), alone.parameters(), strict=True)
            if q.requires_grad
        ]
    )
    found["rate"] = optimizer.param_groups[0]["lr"] == 1e-3 / 4
    found["without backward"] = _message(optimizer.step)
    return found


def apart(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of all tensors together: those whose gradient is rounding alone are far apart by themselves."""
    return float(sum((a - b).square().sum() for a, b in pairs) ** 0.5 / sum(b.square().sum() for _, b in pairs) ** 0.5)


def _loss(model: nn.Module, share: int, micro: int, scale: float) -> float:
    opendit.fastseq.seed.set_everywhere(1000 * share + micro)
    (x, t, y), _ = tiny_of("dit")[0].inputs(torch.float32, torch.device("cpu"))
    loss = (model(x + torch.randn(x.shape), t, y).float() - torch.randn(1)).square().mean()
    (0.5 * scale * loss).backward()
    return loss.item()


def _nothing(*args: Any, **options: Any) -> None: ...


MUTANTS: dict[str, tuple[Any, str, Any, str]] = {
    "never averaged": (
        adapter._ZeroGradients,
        "_after_backward",
        lambda self: setattr(self, "_running", False),
        "zero1",
    ),
    "gradients not shown": (adapter._ZeroGradients, "_show", _nothing, "zero2"),
    "clipping does not reach the store": (
        *(adapter._ZeroGradients, "_view"),
        lambda self, p, parts: torch.cat(parts)[: p.numel()].view(p.shape).clone() if parts else None,
        "zero1",
    ),
    "edits are not adopted": (adapter._ZeroGradients, "_adopt", _nothing, "zero2"),
}


def broken(target: Any, name: str, instead: Any, plugin: str) -> float:
    """The worst error that the comparisons see."""
    with mock.patch.object(target, name, instead):
        try:
            if name == "_adopt":
                return _both(plugin, replaced)[0]
            errors = alike(plugin, "dit", 1)
        except (AssertionError, ZeroDivisionError, KeyError, RuntimeError):
            return float("inf")
    return max(errors[what][0] for what in ("gradients", "parameters", "moments"))


def gemini_broken() -> float:
    with mock.patch.object(gemini_adapter, "_even", _nothing):
        return max(gemini()["gradients"])
