"""ColossalAI's Gemini: the real `Booster` with GeminiPlugin, which pages chunks of parameters and states to the host.

ColossalAI runs a backward with its hooks around, `booster.backward(loss, optimizer)`; users write `loss.backward()`. So
the graph is cut at the model's outputs:

    loss.backward() ── the loss's own part ── the cut: booster.backward(outputs and their gradients) ── the model's part
                                                       p.grad = a view of what is in ColossalAI's chunks

Everything is rounded to bf16, frozen parameters and inputs too; fp32 masters are the optimizer's. Bytes per parameter
with HybridAdam, N processes: 2/N parameter + 2/N gradient + 4/N master + 8/N moments, and a few gathered chunks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from opendit import optim
from opendit.config import OptimizerFactory
from opendit.divided import Divided
from opendit.divided_optimizer import DividedOptimizer, Share
from opendit.engines.colossalai_shared import (
    Plugin,
    alike,
    check_optimizer,
    check_parameters,
    colossalai,
    lines,
    stays,
    trained_groups,
    use,
)
from opendit.engines.engine import Placed, Setup


class _Outputs:
    """What a model gave, with their gradients, in a loss's place: ColossalAI runs the model's part of the backward."""

    def __init__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]):
        self.pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]

    def backward(self, *args: object, **kwargs: object) -> None:
        outputs, gradients = zip(*self.pairs, strict=True)
        torch.autograd.backward(outputs, gradients)


class _Apart(torch.autograd.Function):
    """Cuts the graph at the model's outputs; `run(gradients)` is the backward of what is before the cut."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[[Sequence[Tensor | None]], None], *outputs: Tensor) -> Any:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.enable_grad():
            ctx.run(gradients)
        return (None, None, *(None for _ in gradients))


class _GeminiGradients:
    """Runs Gemini's backward inside the plain one, and shows what it left in its chunks as `.grad`.

    A chunk is a flat range of several parameters, divided among processes, or whole on each where the model is small;
    after a backward it has the gradients, in bf16, until `step`.
    """

    def __init__(self, booster: Any, model: Any, boosted: Any, groups: list[list[nn.Parameter]]):
        self.booster, self.boosted, self.groups = booster, boosted, groups
        self.chunks = model.chunk_manager
        self.shares: dict[nn.Parameter, Share] = {}
        for number, parameter in boosted.id_to_real_params.items():
            _, start, length = boosted.get_offsets(number)
            owner = boosted.id_to_fake_params.get(number)
            whole = bool(self.chunks.get_chunk(parameter).keep_gathered)  # of models below 32 Mi parameters
            if owner is None:
                start = length = 0
            self.shares[parameter] = Share(owner, start, length, length, whole)
        self._shown: dict[nn.Parameter, Tensor] = {}
        model.register_forward_pre_hook(lambda *_: self._adopt())
        model.register_forward_hook(self._cut)

    def _cut(self, model: nn.Module, args: object, output: Any) -> Any:
        leaves, tree = tree_flatten(output)
        inside = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not inside:
            return output
        anchor = torch.zeros((), requires_grad=True)
        run = functools.partial(self._backward, inside)
        outside = iter(_Apart.apply(anchor, run, *(leaf.detach() for leaf in inside)))  # type: ignore[no-untyped-call]
        mine = {id(leaf) for leaf in inside}
        return tree_unflatten([next(outside) if id(leaf) in mine else leaf for leaf in leaves], tree)

    def _backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        if self.chunks.accumulating_grads:
            _even(self.boosted.chunk16_set)
        self.booster.backward(_Outputs(outputs, gradients), self.boosted)
        family: list[Divided] = []
        for p, share in self.shares.items():
            mine = self._chunk(p)
            if share.whole:
                p.grad = mine.view(p.shape)
            else:
                family.append(Divided(mine, share.start, p, family))
                p.grad = family[-1]
            self._shown[p] = p.grad

    def _chunk(self, parameter: nn.Parameter) -> Tensor:
        """What this process has of the parameter's gradient, flat, where `step` reads it."""
        owner = self.shares[parameter].owner
        if owner is None:
            return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        begin, end = self.boosted.param_to_range[owner]
        return cast(Tensor, self.boosted.param_to_chunk16[owner].grad_chunk.payload[begin:end])

    def _adopt(self) -> None:
        """What was put into `.grad`, or taken away, since it was shown."""
        for p, shown in self._shown.items():
            if p.grad is None:
                self._chunk(p).zero_()
            elif p.grad is not shown:
                self._chunk(p).copy_(self.shares[p].of(p.grad))
        self._shown.clear()

    def step(self) -> None:
        if not self.chunks.accumulating_grads:
            raise RuntimeError("optimizer: step was called before a backward; Gemini has no gradients then")
        self._adopt()
        self.boosted.step()

    def zero(self, set_to_none: bool) -> None:
        if self.chunks.accumulating_grads:  # of no step yet
            for p in self._shown:
                self._chunk(p).zero_()
        for p in self.shares:
            p.grad = None
        self._shown.clear()


def _even(chunks: Iterable[Any]) -> None:
    """Before gradients are added to whole chunks: ColossalAI 0.5.0 multiplies what is there by the number of processes.

    It divides by that after its reduction, which is right where each process adds its part to a reduce-scatter; where
    chunks are whole, every process adds all of it to an all-reduce.
    """
    for chunk in chunks:
        if chunk.keep_gathered:
            chunk.grad_chunk.payload.div_(chunk.pg_size)


# Parameters, frozen ones too, below which ColossalAI's chunks stay whole: its default.
_WHOLE_BELOW = 32 * 2**20


class Gemini(Plugin):
    plugin = "gemini"
    moves_parameters = "Gemini gathers parameters into chunks that it frees"

    def check(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> None:
        super().check(model, optimizer, setup)
        check_optimizer(self.plugin, model, optimizer)
        check_parameters(self.plugin, model, (torch.float32, torch.bfloat16))
        size = sum(p.numel() for p in model.parameters())
        if setup.device.type == "cpu" and size >= _WHOLE_BELOW:
            raise ValueError(
                f"plugin: got 'gemini' for a model of {size} parameters on cpu; allowed with ColossalAI there: below "
                f"{_WHOLE_BELOW}, for it divides larger ones on GPUs only. Move the model to a GPU, or choose "
                "plugin='zero2' or engine='torch'"
            )
        if setup.precision != "bf16" and any(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad):
            raise ValueError(
                f"precision: got {setup.precision!r} with ColossalAI's 'gemini', which computes with bf16 parameters "
                "(fp32 masters are its optimizer's); allowed: 'bf16', or a model in bf16. Ask for that, or choose "
                "engine='torch'"
            )
        if setup.reduction != "bf16":
            raise ValueError(
                f"reduction: got {setup.reduction!r} with ColossalAI's 'gemini', which averages gradients in bf16; "
                "allowed: 'bf16'. Ask for it, or choose engine='torch'"
            )

    def promises(self, setup: Setup) -> list[str]:
        where = "on the host" if setup.device.type == "cuda" else "where the model is: there is no GPU to page from"
        return [
            "ColossalAI's GeminiPlugin, static placement: chunks of parameters, each process holds 1/N of each chunk "
            "(below 32 Mi parameters: all of it)",
            f"parameters, gradients and optimizer states are {where}; chunks are gathered where they are used",
            "all parameters, inputs and buffers are rounded to bf16, frozen ones too; fp32 masters; gradients in bf16",
            "bytes per parameter with HybridAdam over N processes: 16/N, and a few gathered chunks at a time",
            "the optimizer is a wrapper around yours, which it has as .inner; schedules may be built on either",
        ]

    def place(self, model: nn.Module, optimizer: Optimizer | OptimizerFactory | None, setup: Setup) -> Placed:
        use(setup.device)
        _check_modules(model)
        inner = optim.build(optimizer, model) if callable(optimizer) else optimizer
        assert inner is not None
        allowed = importlib.import_module("colossalai.zero.gemini.gemini_optimizer")._AVAIL_OPTIM_LIST
        if type(inner) not in allowed:
            raise ValueError(
                f"optimizer: got {type(inner).__name__} with ColossalAI's 'gemini'; allowed: "
                f"{', '.join(sorted(cls.__name__ for cls in allowed))} of colossalai.nn.optimizer. Build one of them, "
                "HybridAdam for AdamW, or choose engine='torch'"
            )
        groups = trained_groups(inner)
        alike(model)
        on_gpu = setup.device.type == "cuda"
        plugin = colossalai().booster.plugin.GeminiPlugin(
            precision="bf16",
            enable_gradient_accumulation=True,
            offload_optim_frac=float(on_gpu),
            offload_param_frac=float(on_gpu),
            pin_memory=on_gpu,
            enable_async_reduce=on_gpu,
        )
        booster = colossalai().booster.Booster(plugin=plugin)
        placed, boosted, *_ = booster.boost(model, inner)
        wrapper = DividedOptimizer.around(inner, _GeminiGradients(booster, placed, boosted, groups))
        return Placed(placed, wrapper, lines(self.promises(setup)))

    def undo(self, placed: nn.Module) -> NoReturn:
        raise stays(self.plugin)


def _check_modules(model: nn.Module) -> None:
    """Gemini gathers a parameter when a torch function is called with it."""
    for name, module in model.named_modules():
        if getattr(type(module), "_opendit_fusion", "adaln") == "block":
            raise ValueError(
                f"fusion: {name} is one function with ColossalAI's 'gemini', which gathers parameters for torch's own "
                "functions only; allowed: fusion='adaln'. Ask for it, or choose engine='torch'"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"compile: {name} is compiled with ColossalAI's 'gemini', which gathers parameters as torch's "
                "functions are called; allowed: compile=False. Leave it out, or choose engine='torch'"
            )


ENGINES = (Gemini(),)
