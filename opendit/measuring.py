"""What `verify` runs: a model alone on the whole batch, and spread over processes; each to gradients and a step."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from opendit.doubles import keeping_doubles
from opendit.errors import Tensors
from opendit.everyone import gathered, several


@dataclass
class Task:
    """What is computed: see `verify`."""

    batch: Sequence[Any] | Mapping[str, Any]
    loss: Callable[..., Tensor] | None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None
    ema: Callable[[nn.Module, nn.Module], object] | None
    seed: int
    keep_doubles: bool = True  # in fp64, the models' own casts to fp32 do nothing

    def items(self) -> list[tuple[Any, Any]]:
        return list(self.batch.items()) if isinstance(self.batch, Mapping) else list(enumerate(self.batch))

    def check(self, shares: int) -> None:
        """Raises `ValueError` where the batch can't be cut, or is not the same on every process."""
        sizes = {value.shape[0] for _, value in self.items() if isinstance(value, Tensor) and value.dim()}
        if len(sizes) != 1 or next(iter(sizes)) % shares:
            raise ValueError(
                f"batch: its tensors have first dimensions {sorted(sizes)}; allowed: one same number, divisible by the "
                f"{shares} data-parallel groups"
            )
        everyone = gathered(self.hash())
        if len(set(everyone)) > 1:
            raise ValueError("batch: it differs between processes; allowed: the same global batch on every one")

    def share(self, index: int, shares: int, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of one share, floating tensors in `dtype`."""
        cut: dict[Any, Any] = {}
        for key, value in self.items():
            if isinstance(value, Tensor) and value.dim():
                part = value.shape[0] // shares
                value = value[index * part : (index + 1) * part]
                value = value.to(dtype) if value.is_floating_point() else value
            cut[key] = value
        return ([], cut) if isinstance(self.batch, Mapping) else (list(cut.values()), {})

    def hash(self) -> str:
        digest = hashlib.sha256()
        for key, value in self.items():
            digest.update(repr(key).encode())
            if isinstance(value, Tensor):
                digest.update(repr(value.detach().double().cpu().reshape(-1).tolist()).encode())
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()


@dataclass
class Run:
    """What came out: tensors by name, of each kind."""

    output: Tensors = field(default_factory=dict)
    loss: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    parameters: Tensors = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def tensors(self, what: str) -> Tensors:
        found: Tensors = getattr(self, what)
        return found


def reference_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy in fp64 in training mode, as rank 0 has it, in which no parameter is all zero."""
    twin = copy.deepcopy(model).double().train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if several():
                dist.broadcast(tensor.data, 0)
        for parameter in twin.parameters():
            if parameter.requires_grad and not parameter.any():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return twin


def fresh_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype)


def lower_residual(first: nn.Module) -> None:
    """Gives a plain model a bf16 residual stream from its `first` block on."""
    first.register_forward_pre_hook(_first_in_bfloat16, with_kwargs=True)


def _first_in_bfloat16(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0].bfloat16(), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: kwargs[name].bfloat16()}


def tolerant(model: nn.Module) -> nn.Module:
    """A copy whose layers take floating inputs of any dtype: models that hard-code fp32 somewhere run in fp64."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(_cast_to_weight)
    return twin


def _cast_to_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = cast(Tensor, module.weight).dtype
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def alone(model: nn.Module, task: Task, shares: int, autocast: torch.dtype | None = None) -> Run:
    """The plain model on every share in turn, each with its own random state; gradients averaged."""
    run = Run()
    states: list[Tensor] = []
    for index in range(shares):
        _one_share(model, task, index, shares, run, autocast, states)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= shares
    _finish(model, task, run)
    return run


def together(model: nn.Module, task: Task, share: int, shares: int, autocast: torch.dtype | None = None) -> Run:
    """The accelerated model on this process's share; gradients averaged over the world, as DDP does."""
    run = Run()
    states: list[Tensor] = []
    said: str | None = None
    try:
        _one_share(model, task, share, shares, run, autocast, states)
    except ValueError as error:
        said = str(error)
    problems = [problem for problem in gathered(said) if problem is not None]
    if problems:
        # The comparison of inputs stops every process alike; of anything else the others must hear, to stop too.
        return Run(problems=list(dict.fromkeys(problems)))
    if several():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        for tensors in (run.output, run.loss):
            for other in gathered({name: value.cpu() for name, value in tensors.items()}):
                tensors.update(other)
        _check_states(states, share, shares, run)
    _finish(model, task, run)
    return run


def _check_states(states: list[Tensor], share: int, shares: int, run: Run) -> None:
    """Generators after the loss: equal within a group, different across groups, if anything was drawn."""
    before, after = (state.tolist() for state in states)
    everyone = gathered((share, hashlib.sha256(bytes(after)).hexdigest(), before != after))
    for group in range(shares):
        if len({state for index, state, _ in everyone if index == group}) > 1:
            run.problems.append(f"processes of data-parallel group {group} drew different random numbers")
    leaders = {index: state for index, state, _ in everyone}
    if any(drawn for *_, drawn in everyone) and len(set(leaders.values())) < shares:
        run.problems.append("several data-parallel groups drew the same random numbers: the loss seeds them alike")


def _one_share(
    model: nn.Module,
    task: Task,
    index: int,
    shares: int,
    run: Run,
    autocast: torch.dtype | None,
    states: list[Tensor],
) -> None:
    from opendit.fastseq.seed import set_everywhere

    parameter = next(model.parameters())
    args, kwargs = task.share(index, shares, parameter.dtype)
    device = parameter.device
    with (
        _random_state_kept(device),
        keeping_doubles(task.keep_doubles and parameter.dtype == torch.float64),
        torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        set_everywhere(task.seed * shares + index)
        states.append(_state(device))
        seen: list[Tensor] = []
        handle = model.register_forward_hook(lambda module, inputs, output: seen.append(_tensor_of(output)))
        try:
            if task.loss is not None:
                loss = task.loss(model, *args, **kwargs)
            else:
                loss = (_tensor_of(model(*args, **kwargs)).double() ** 2).mean()
        finally:
            handle.remove()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"loss: it returned {type(loss).__name__}; allowed: a tensor with one element")
        states.append(_state(device))
        loss.backward()  # type: ignore[no-untyped-call]
    for i, output in enumerate(seen):
        run.output[f"output {i} of share {index}"] = output.detach().double()
    run.loss[f"loss of share {index}"] = loss.detach().double().reshape(1)


def _finish(model: nn.Module, task: Task, run: Run) -> None:
    """Gradients, then one optimizer step, then the EMA."""
    named = dict(model.named_parameters())
    run.gradients = {name: p.grad.detach().double().clone() for name, p in named.items() if p.grad is not None}
    average = copy.deepcopy(model) if task.ema is not None else None
    before = {name: p.detach().double().clone() for name, p in named.items()}
    make = task.optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    make([p for p in model.parameters() if p.requires_grad]).step()
    # As steps, not as values: beside a parameter's own size a wrong step could hide.
    run.parameters = {name: p.detach().double() - before[name] for name, p in named.items() if p.grad is not None}
    if average is not None and task.ema is not None:
        task.ema(average, model)
        moved = {name: p.detach().double() - before[name] for name, p in average.named_parameters()}
        run.ema = {name: step for name, step in moved.items() if name in run.parameters}
        stale = [name for name, step in run.ema.items() if not step.any() and run.parameters[name].any()]
        if stale:
            run.problems.append(f"the EMA did not follow {len(stale)} parameters that moved, such as {stale[0]}")


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    first = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", None)
    if not isinstance(first, Tensor):
        raise TypeError(
            f"model: it returned {type(output).__name__}; allowed: a tensor, a tuple, or .sample; pass loss"
        )
    return first


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
