"""One training step of DiT or Latte, in each of the ways that are compared.

A step: noise the latents, forward, the learned-sigma hybrid loss, backward, AdamW, EMA of every trained weight. Step i
draws the same latents, noise, timesteps, labels and label drops whatever the variant, so losses are comparable one by
one. Nothing in a step waits for the device.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import opendit
from examples.diffusion.gaussian import GaussianDiffusion
from examples.models.dit import DIT_MODELS, DiT
from examples.models.latte import Latte
from opendit.patch import core

LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999


@dataclass(frozen=True)
class Variant:
    """How a model is trained.

    booster: what `opendit.accelerate` is given, None for the model as it is. autocast: bf16, over fp32 weights.
    bf16_weights: forward and backward in a bf16 copy of fp32 master weights, without autocast. tf32: in fp32 matrix
    products. plain_update: AdamW and EMA as facebookresearch/DiT's script has them, parameter by parameter.
    """

    booster: Any = None
    compiled: bool = False
    autocast: bool = True
    bf16_weights: bool = False
    tf32: bool = False
    plain_update: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether ratios may refer to it: what a user gets from torch.compile alone."""
        return self.compiled and self.booster is None

    def same(self, other: Variant) -> bool:
        """Whether both train in the same way, however the booster's configuration is spelt."""

        def told(v: Variant) -> tuple[Any, ...]:
            booster = None if v.booster is None else opendit.BoosterConfig.of(v.booster)
            return booster, v.compiled, v.autocast, v.bf16_weights, v.tf32, v.plain_update

        return told(self) == told(other)


FP32 = Variant(autocast=False)
AUTOCAST = Variant()
BF16_WEIGHTS = Variant(autocast=False, bf16_weights=True)

VARIANTS: dict[str, Variant] = {
    "as published": Variant(autocast=False, tf32=True, plain_update=True),
    "eager": AUTOCAST,
    "torch.compile": Variant(compiled=True),
    "torch.compile bf16 weights": Variant(compiled=True, autocast=False, bf16_weights=True),
    "opendit": Variant(booster="train"),
    "opendit compiled": Variant(booster="train", compiled=True),
}
# What the recipe is made of, each ingredient on top of those before it; then what may be added to it.
LADDER: dict[str, Variant] = {
    "adaln only": Variant(booster={"fusion": "adaln"}),
    "+ whole block": Variant(booster={}),
    "+ selective": Variant(booster={"activation_checkpointing": "selective"}),
    "+ CUDA graphs": Variant(booster={"activation_checkpointing": "selective", "cuda_graphs": True}),
    "+ bf16 residual": Variant(
        booster={"activation_checkpointing": "selective", "cuda_graphs": True, "residual": "bf16"}
    ),
    "whole block, bf16 residual": Variant(booster={"residual": "bf16"}),
}
_FP8: dict[str, Any] = {
    "activation_checkpointing": "selective",
    "cuda_graphs": True,
    "precision": "fp8",
    "skip_nonfinite": False,  # no variant looks at its gradients
}
# Asked for by name only: another arithmetic, on GPUs that have it.
OPT_IN: dict[str, Variant] = {
    "opendit fp8": Variant(booster=_FP8),
    "opendit fp8, bf16 residual": Variant(booster=_FP8 | {"residual": "bf16"}),
}


def make_model(name: str, image_size: int, device: torch.device) -> DiT:
    """The model by its published name, in training mode; "smoke" is a tiny one. Always the same weights."""
    torch.manual_seed(0)
    with device:
        if name == "smoke":
            model = DiT(input_size=image_size // 8, hidden_size=32, depth=3, num_heads=2, num_classes=10)
        else:
            model = DiT(**DIT_MODELS[name], input_size=image_size // 8)
    open_gates(model)
    return model.train()


@torch.no_grad()
def open_gates(model: nn.Module) -> None:
    """Gates that are zero would hide whatever is wrong behind them."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.normal_(0, 0.02)


class Training:
    """A model with its optimizer and EMA. `step(i)` trains once and returns the loss, still on the device."""

    def __init__(self, model: DiT | Latte, variant: Variant, batch: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.tf32
        self.variant, self.module = variant, model
        self.device = model.pos_embed.device
        self.resize(batch)
        self.generator = torch.Generator(self.device)
        self.diffusion = GaussianDiffusion().to(self.device)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trainable), list(trainable.values())
        self.masters = self.parameters
        if variant.bf16_weights:
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
            model.bfloat16()
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        self.ema = [p.detach().clone() for p in self.masters]
        plain = variant.plain_update
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=LEARNING_RATE,
            weight_decay=0.0,
            fused=None if plain or self.device.type == "cpu" else True,
            foreach=False if plain else None,
        )
        if variant.booster is not None:
            opendit.accelerate(model, variant.booster, optimizer=self.optimizer)
            check_accelerated(model)
        self.forward: Callable[..., Tensor] = compiled(model) if variant.compiled else model

    def resize(self, batch: int) -> None:
        """Steps from now on have `batch` samples."""
        self.batch = batch
        self.shape = (batch, *self.module.sample_shape)

    def loss(self, i: int) -> Tensor:
        self.generator.manual_seed(i)
        torch.manual_seed(i)  # the label drops'
        options: dict[str, Any] = {"device": self.device, "generator": self.generator}
        x = torch.randn(self.shape, **options)
        noise = torch.randn(self.shape, **options)
        t = torch.randint(self.diffusion.steps, (self.batch,), **options)
        y = torch.randint(self.module.num_classes, (self.batch,), **options)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.autocast):
            return self.diffusion.loss(self._model, x, y, t=t, noise=noise)

    def _model(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward(x.bfloat16() if self.variant.bf16_weights else x, t, y)

    def backward(self, i: int) -> Tensor:
        """The gradients of step i, in `parameters`."""
        loss = self.loss(i)
        for p in self.parameters:
            p.grad = None
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        masters = [p.detach() for p in self.masters]
        if self.variant.bf16_weights:
            torch._foreach_copy_([p.grad for p in self.masters], [p.grad for p in self.parameters])
            for p in self.parameters:
                p.grad = None
        self.optimizer.step()
        if self.variant.bf16_weights:
            torch._foreach_copy_([p.detach() for p in self.parameters], masters)
        if self.variant.plain_update:
            for e, p in zip(self.ema, masters, strict=True):
                e.mul_(EMA_DECAY).add_(p, alpha=1 - EMA_DECAY)
        else:
            torch._foreach_lerp_(self.ema, masters, 1 - EMA_DECAY)

    def step(self, i: int) -> Tensor:
        loss = self.backward(i)
        self.update()
        return loss

    def notes(self) -> list[str]:
        """Where opendit did less than it was asked for, and why."""
        return sorted({what for _, what in core.notes(self.module)})


def compiled(model: nn.Module) -> Any:
    import torch._inductor.config  # seconds, which what does not compile can spare

    # Compiled code must draw the same label drops as eager code, or losses could not be compared.
    torch._inductor.config.fallback_random = True
    return torch.compile(model)


def check_accelerated(model: DiT | Latte) -> None:
    """Raises if a block was left as it was, for then something else would be measured."""
    plan = core.plan_of(model)
    missing = {f"blocks.{i}" for i in range(len(model.blocks))} - {edit.fqn for edit in plan.edits}
    if missing:
        raise RuntimeError(f"not accelerated: {sorted(missing)}; {[k for k in plan.kept if k.fqn in missing][:1]}")


def clean_up() -> None:
    """Gives back what the last variant held; the caller has dropped it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
