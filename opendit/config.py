"""`BoosterConfig`: everything `accelerate` can be asked for, checked before anything is touched."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, cast

import torch
from torch.optim import Optimizer
from typing_extensions import TypeVar

from opendit.ema_profiles import EMA

# A factory is called last, with the parameters as they are once the model is in its final form. With a plugin it
# is called once before, on those that came in: see `opendit.accelerate`.
OptimizerFactory: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], Optimizer]

OptimizerT = TypeVar("OptimizerT", bound="Optimizer | OptimizerFactory | None", default=None)

DEFAULT_TIMEOUT = 600.0  # seconds; what torch gives NCCL

KERNEL_BACKENDS = ("auto", "triton", "reference")

# What each field may say; the first value is the default.
_CHOICES: dict[str, tuple[object, ...]] = {
    "precision": ("inherit", "bf16", "fp16", "fp32", "fp8"),
    "sequence_parallel": ("auto", "fastseq", "ulysses", "ring", "usp"),
    "fusion": ("auto", "block", "adaln"),
    "residual": ("inherit", "fp32", "bf16"),
    "activation_checkpointing": (False, True, "selective", "full"),
    "plugin": (None, "ddp", "zero1", "zero2", "zero3", "fsdp", "gemini"),
    "engine": ("torch", "colossalai"),
    "reduction": ("fp32", "bf16"),
    "weights": ("inherit", "bf16", "fp16"),
}

# After how many skipped steps in a row training stops, unless told otherwise: fp16's loss scale needs some 20 from its
# start to any height it can end at.
SKIPS_IN_A_ROW = 50

_RECIPES: dict[str, dict[str, Any]] = {
    "train": {"activation_checkpointing": "selective", "cuda_graphs": True},
    "sample": {"sampling": True, "weights": "bf16", "cuda_graphs": True},
}


@dataclass(frozen=True, kw_only=True)
class BoosterConfig(Generic[OptimizerT]):
    """What to accelerate with. Immutable; a mapping with the same keys is as good.

    Args:
        kernels: `"auto"` (Triton where it runs, else the reference), `"triton"`, `"reference"`, or a mapping
            from kernel names to backends, e.g. `{"layernorm": "apex"}`; kernels not named stay `"auto"`.
        attention: `"auto"` or the name of a backend of `opendit.attention`.
        fusion: `"block"`: a whole block is one autograd function with a hand-written backward; `"adaln"`: only its
            LayerNorm, modulation, gate and residual are fused, sublayers run as modules. `"auto"`: `"block"` where
            Triton and a low precision attention kernel run, `"adaln"` elsewhere.
        residual: dtype of the residual stream under autocast: `"inherit"` leaves it as the model has it (fp32 where
            position embeddings are), `"fp32"` and `"bf16"` cast it where the first block begins. Without autocast the
            model's own dtype stays. `"bf16"` is faster and smaller and rounds more. Between blocks only, where they are
            whole: in their middle the stream and its gradient are fp32. Over the gradients of 28 blocks of width 192,
            plain autocast is 4.2e-3 from fp32, `"inherit"` 3.8e-3, `"bf16"` 4.7e-3 (6.9e-3, were the middle rounded).
        compile: compile each transformer block with `torch.compile`, in place. Blocks of one shape share
            one compilation, so the first step comes much sooner than when the whole model is compiled.
        cuda_graphs: replay CUDA graphs of blocks that are fused as a whole, in training, where launches can be the
            limit (up to 2²⁶ elements of x [B, L, D]) and nobody holds what a replay would overwrite. Activations then
            stay allocated between steps. With `sp_size` > 1 blocks hold collectives, and graphs of these must be gone
            before the process group is destroyed, which would wait for them: they are made only for `"collectives"`,
            and then call `opendit.restore(model)`, or drop the model, first. With `sampling`: one graph of the model's
            whole forward for each input shape.
        sampling: the model samples and does not train: `opendit.sampling` and `opendit.calibrate` know it, its forward
            without gradients runs blocks that keep nothing for a backward, and a forward in training is an error.
        weights: with `sampling`, the dtype of parameters and floating buffers, which are replaced by rounded ones;
            there is no autocast then. Inputs are cast, the output comes back in the input's dtype. What came in is
            kept in host memory and given back by `restore`, to the bit.
        cfg_parallel: with `sampling`, pairs of processes share each batch: one computes the first half of its rows,
            the other the second, which with guidance are the conditional and the unconditional branch. Both get all
            of the output, by one all-gather a forward.
        optimizer: an optimizer built on the model's parameters, or a factory such as
            `functools.partial(torch.optim.AdamW, lr=1e-4)`; `accelerate` then returns `(model, optimizer)`.
        precision: `"inherit"`: the caller's autocast and parameter dtypes decide. `"bf16"`, `"fp16"`: the model's
            forward runs under autocast and returns fp32; parameters must be fp32. `"fp16"` scales the loss by itself:
            the plain loop stays, and gradients are true ones wherever the caller sees them. `"fp32"`: autocast is off
            in the forward. `"fp8"`: bf16, and inside whole blocks the wide products are of rows in 8 bits
            (docs/precision_and_ema.md); on Hopper GPUs and later, not timed there yet.
        skip_nonfinite: where a gradient is inf or NaN on any process, all skip that `optimizer.step()`: parameters,
            moments and EMA stay as they are, and so does a schedule given to `opendit.schedule`. A number: after so
            many in a row `opendit.NonFiniteGradients` is raised; `True`: 50; `None`: `True` where `precision` or `ema`
            is given, else `False`.
        plugin: the engine that the model is placed on, over all processes (docs/engines.md). `"ddp"`: torch's DDP;
            `accelerate` returns the wrapper. `"zero1"`, `"zero2"`: FSDP2, parameters gathered once per step. `"zero3"`
            or `"fsdp"`: FSDP2, freed after each block's forward. `"gemini"`: likewise, with parameters, gradients and
            optimizer states in host memory. `None`: the caller places the model.
        engine: where plugins come from: `"torch"`, or `"colossalai"`.
        reduction: in what gradients are averaged by a plugin: `"fp32"` (never less than the parameter's own dtype), or
            `"bf16"`, which halves the traffic and rounds.
        timeout: with a plugin, seconds after which a process that gives no sign of life, or does not join a
            collective, ends the others. It is torch's time-out too where `accelerate` sets up the process group; a
            later call in the same group changes the former only.
        sequence_parallel: the method that spreads a sequence over processes where `accelerate` is given `sp_size > 1`:
            `"fastseq"`, `"ulysses"`, `"ring"`, `"usp"`, or `"auto"`, the cheapest by `explain`'s numbers. Where blocks
            alternate between frames and tokens (Latte) there is one way, and only `"auto"` is allowed.
        regather_input: with `sp_size > 1` and the method `"fastseq"`: gather each layer's input again in the backward,
            where it is otherwise kept whole on every process: one more all-gather, for 1/sp_size of that memory.
        activation_checkpointing: what a block keeps for its backward. `False`: everything. `"selective"`: all that
            matrix products and attention gave, while results of passes over memory (normalised and modulated inputs,
            the GELU's output) are computed again inside passes of the backward; for blocks that are fused as a whole,
            others keep everything. `"full"` or `True`: the block's input only, its forward is computed again.
        ema: a decay such as 0.9999, several, or an `opendit.EMA`: averages in fp32, divided over the processes, kept
            by `optimizer.step()`. See `opendit.ema_weights` and `opendit.ema_state_dict`.

    Raises:
        ValueError: a value that is not allowed.
        TypeError: a value of the wrong type.
        NotImplementedError: an allowed value whose work is not done yet.
    """

    kernels: str | Mapping[str, str] = "auto"
    attention: str = "auto"
    compile: bool = False
    cuda_graphs: bool | Literal["collectives"] = False
    optimizer: OptimizerT = field(default=cast(Any, None))
    precision: str = "inherit"
    plugin: str | None = None
    engine: str = "torch"
    reduction: str = "fp32"
    timeout: float | None = None
    sequence_parallel: str = "auto"
    regather_input: bool = False
    fusion: str = "auto"
    residual: str = "inherit"
    activation_checkpointing: bool | str = False
    ema: float | Sequence[float] | EMA | None = None
    skip_nonfinite: bool | int | None = None
    sampling: bool = False
    weights: str = "inherit"
    cfg_parallel: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.kernels, Mapping):
            # A private copy: the caller's dict may change after this.
            object.__setattr__(self, "kernels", dict(self.kernels))
        elif not isinstance(self.kernels, str):
            raise TypeError(
                f"kernels: got {self.kernels!r}; allowed: one of {', '.join(KERNEL_BACKENDS)}, or a mapping from "
                "kernel names to backends"
            )
        elif self.kernels not in KERNEL_BACKENDS:
            raise ValueError(
                f"kernels: got {self.kernels!r}; allowed: {', '.join(KERNEL_BACKENDS)}, or a mapping from kernel "
                f"names to backends. {_closest(self.kernels, KERNEL_BACKENDS)}"
            )
        if not isinstance(self.attention, str):
            raise TypeError(f"attention: got {self.attention!r}; allowed: the name of an attention backend")
        for name in ("compile", "regather_input", "sampling", "cfg_parallel"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}; allowed: True or False")
        _check_allowed("cuda_graphs", self.cuda_graphs, (True, False, "collectives"))
        if self.optimizer is not None and not callable(self.optimizer) and not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"optimizer: got {type(self.optimizer).__name__}; allowed: a torch.optim.Optimizer, or a factory "
                "that makes one from the model's parameters, such as functools.partial(torch.optim.AdamW, lr=1e-4)"
            )
        object.__setattr__(self, "ema", EMA.of(self.ema))
        if self.cuda_graphs and (self.compile or (self.fusion == "adaln" and not self.sampling)):
            other = "compile=True" if self.compile else "fusion='adaln'"
            raise ValueError(
                f"cuda_graphs: got {self.cuda_graphs!r} with {other}; allowed: with blocks that are one function and "
                f"not compiled. Leave {other} out, or cuda_graphs"
            )
        if self.regather_input and self.sequence_parallel not in ("auto", "fastseq"):
            raise ValueError(
                f"regather_input: got True with sequence_parallel={self.sequence_parallel!r}, which gathers no input; "
                "allowed: with 'auto' or 'fastseq'. Leave one of them out"
            )
        for name, allowed in _CHOICES.items():
            _check_allowed(name, getattr(self, name), allowed)
        self._check_plugin()
        self._check_sampling()
        if self.precision == "fp8" and self.engine != "torch":
            raise ValueError("precision: got 'fp8' with engine='colossalai'; allowed: with engine='torch'. Take 'bf16'")
        if self.ema is not None and (self.engine, self.plugin) == ("colossalai", "gemini"):
            raise ValueError(
                "ema: got averages with ColossalAI's 'gemini', whose parameters are bf16 copies that hide small steps; "
                "allowed: with its other plugins, or with engine='torch'. Choose one of them, or leave ema out"
            )
        skip: object = self.skip_nonfinite
        if not (skip is None or (isinstance(skip, int) and (isinstance(skip, bool) or skip > 0))):
            raise ValueError(
                f"skip_nonfinite: got {skip!r}; allowed: True, False, None, or after how many steps in a row to stop"
            )
        if skip is False and self.precision == "fp16":
            raise ValueError(
                "skip_nonfinite: got False with precision='fp16'; allowed: True or a number. A loss scale finds its "
                "height by steps that are skipped"
            )

    def _check_plugin(self) -> None:
        if self.timeout is not None:
            if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool):
                raise TypeError(f"timeout: got {self.timeout!r}; allowed: seconds, or None for {DEFAULT_TIMEOUT}")
            if not 0 < self.timeout < float("inf"):
                raise ValueError(f"timeout: got {self.timeout!r}; allowed: seconds above 0")
        for name, default in (("engine", "torch"), ("reduction", "fp32"), ("timeout", None)):
            if self.plugin is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} without a plugin; allowed: with one. Name a plugin, or leave "
                    f"{name} out"
                )

    def _check_sampling(self) -> None:
        for name in ("weights", "cfg_parallel"):
            if not self.sampling and getattr(self, name) not in ("inherit", False):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} without sampling; allowed: with sampling=True, as in the "
                    f"recipe 'sample'. Add it, or leave {name} out"
                )
        if not self.sampling:
            return
        for name, off in (
            ("optimizer", None),
            ("ema", None),
            ("plugin", None),
            ("activation_checkpointing", False),
        ):
            if getattr(self, name) is not off:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with sampling, which trains nothing; allowed: {off!r}. Leave "
                    f"{name} out, or sampling"
                )
        if self.skip_nonfinite:
            raise ValueError(
                f"skip_nonfinite: got {self.skip_nonfinite!r} with sampling, which takes no step; allowed: None or "
                "False. Leave skip_nonfinite out, or sampling"
            )
        if self.precision == "fp8":
            raise ValueError(
                "precision: got 'fp8' with sampling=True, where no product is of rows in 8 bits; allowed: 'inherit' or "
                "another. Take weights='bf16'"
            )
        if self.weights != "inherit" and self.precision != "inherit":
            raise ValueError(
                f"weights: got {self.weights!r} with precision={self.precision!r}; allowed: one of them. Rounded "
                "weights need no autocast, and autocast rounds fp32 weights itself"
            )

    def skips_in_a_row(self) -> int | None:
        """After how many skipped steps in a row to stop; None: no step is skipped."""
        if self.sampling:
            return None
        if self.skip_nonfinite is None:
            return SKIPS_IN_A_ROW if self.precision != "inherit" or self.ema is not None else None
        if isinstance(self.skip_nonfinite, bool):
            return SKIPS_IN_A_ROW if self.skip_nonfinite else None
        return self.skip_nonfinite

    @classmethod
    def of(cls, source: BoosterConfig[Any] | Mapping[str, Any] | str | None) -> BoosterConfig[Any]:
        """The config that `source` stands for: itself, a mapping of fields, a recipe's name, or the defaults."""
        if source is None:
            return BoosterConfig()
        if isinstance(source, BoosterConfig):
            return source
        if isinstance(source, str):
            if source not in _RECIPES:
                raise ValueError(
                    f"booster_cfg: got {source!r}; allowed recipes: {', '.join(_RECIPES)}. {_closest(source, _RECIPES)}"
                )
            return BoosterConfig(**_RECIPES[source])
        if isinstance(source, Mapping):
            names = [f.name for f in dataclasses.fields(cls)]
            for key in source:
                if key not in names:
                    raise ValueError(
                        f"booster_cfg: unknown key {key!r}; allowed: {', '.join(names)}. {_closest(str(key), names)}"
                    )
            return BoosterConfig(**source)
        raise TypeError(
            f"booster_cfg: got {type(source).__name__}; allowed: a BoosterConfig, a mapping of its fields, "
            f"a recipe name ({', '.join(_RECIPES)}), or None"
        )


def _check_allowed(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _closest(given: str, allowed: Iterable[str]) -> str:
    match = difflib.get_close_matches(given, list(allowed), n=1)
    return f"Did you mean {match[0]!r}?" if match else "Choose one of the allowed values."
