"""From a model and a config to a plan. Nothing here changes a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from opendit import attention
from opendit.config import BoosterConfig
from opendit.ema_profiles import EMA
from opendit.fastseq import choice as fastseq_choice
from opendit.fastseq import in_block, joint, methods
from opendit.fastseq.mesh import device_type
from opendit.kernels import backend as kernel_backend
from opendit.kernels import fp8, spec
from opendit.patch.adaln import BLOCK_KERNELS, FusedAdaLN
from opendit.patch.alternating import plan_alternating, video_shape
from opendit.patch.core import Choices, Edit, Plan, Sampling
from opendit.patch.generic import generic, plan_division
from opendit.patch.norms import plan_norms
from opendit.patch.planner import Planner
from opendit.patch.precision import plan_precision
from opendit.patch.registry import GENERIC, Alternating, Family, Joint, Spread, named, resolve
from opendit.patch.sampled import plan_sampling
from opendit.patch.spread import ComparesModelInputs
from opendit.patch.spreading import (
    attention_shape,
    only_together,
    only_whole,
    plan_joint,
    plan_spread,
    put_around,
)
from opendit.stepping import Stepping
from opendit.wrapping import device_of


def plan_for(model: nn.Module, cfg: BoosterConfig, sp_size: int = 1, name: str | None = None) -> Plan:
    """What `accelerate(model, cfg, sp_size=sp_size, family=name)` would do. Raises `ValueError` where it could do
    nothing, unless that was asked for with "generic".

    With `sp_size` > 1 every process calls it: link speeds are measured together.
    """
    family = resolve(model) if name is None else named(name, model)
    if family is GENERIC:
        family = generic(model)
    choices = choose(cfg, model)
    planner = Planner()
    family.plan(model, planner)
    if not planner.edits and family.name != GENERIC.name:
        reasons = "; ".join(f"{kept.fqn}: {kept.why}" for kept in planner.kept[:6])
        if any("forward" in module.__dict__ for module in model.modules()):
            reasons += ". Forwards were replaced on instances, as offloading does: call accelerate before that"
        raise ValueError(
            f"model: {type(model).__name__} looks like family {family.name}, but nothing in it can be accelerated: "
            f"{reasons}. Describe it with opendit.register_family, or leave it as it is"
        )
    plan_norms(planner, model, choices)
    if cfg.sequence_parallel != "auto" and sp_size == 1:
        planner.keep("blocks", f"no sequence is spread (sequence_parallel={cfg.sequence_parallel!r}): sp_size is 1")
    if cfg.regather_input and (sp_size == 1 or isinstance(family.spread, Alternating)):
        why = "sp_size is 1" if sp_size == 1 else "blocks that alternate between frames and tokens gather none"
        planner.keep("blocks", f"no input is gathered again (regather_input): {why}")
    if sp_size > 1:
        choices = _spread(planner, model, family, cfg, choices, sp_size)
    _check_used(cfg, planner)
    _check_blocks(cfg, planner, choices, family)
    plan_precision(planner, model, cfg.precision)
    if cfg.sampling:
        plan_sampling(planner, [name for name, _ in family.blocks_of(model)], cfg.weights)
    units = (*family.called_apart, *(name for name, _ in family.blocks_of(model)))
    if family.name == GENERIC.name:
        units = ()  # nobody says which modules are called only through their block
        plan_division(planner, cfg.plugin if cfg.engine == "torch" else None)
    _check_called(planner, model)
    _keep_the_rest(planner, model)
    compiled: tuple[str, ...] = ()
    if cfg.compile:
        compiled = tuple(name for name, block in family.blocks_of(model) if block._compiled_call_impl is None)
    return Plan(
        family=family.name,
        model=type(model).__name__,
        edits=tuple(planner.edits),
        kept=tuple(planner.kept),
        choices=choices,
        compiled=compiled,
        units=units,
        entries=tuple(n for n in dir(type(model)) if n.startswith("forward_") and callable(getattr(model, n, None))),
        stepping=Stepping(cfg.precision, cfg.skips_in_a_row(), EMA.of(cfg.ema)),
    )


def _check_called(planner: Planner, model: nn.Module) -> None:
    """A forward on the instance hides that of the class, and with it whatever an edit would do."""
    for edit in planner.edits:
        if "forward" in model.get_submodule(edit.fqn).__dict__:
            raise ValueError(
                f"model: the forward of {edit.fqn or 'the model itself'} was replaced on the instance (hooks of "
                f"Accelerate and of offloading do that), so it would go without: {edit.what}. Call accelerate before "
                "that, or take it off first"
            )


def _keep_the_rest(planner: Planner, model: nn.Module) -> None:
    """Says of what no family looked at that it stays: the largest modules that hold nothing that was said already."""
    said = {edit.fqn for edit in planner.edits} | {kept.fqn for kept in planner.kept}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            fqn = prefix + name
            inside = any(other.startswith(f"{fqn}.") for other in said)
            if inside and (fqn not in said or isinstance(child, nn.ModuleList)):
                visit(child, f"{fqn}.")
            elif fqn not in said and type(child) is not nn.Identity:
                planner.keep(fqn, "its own code: opendit has nothing for it")

    visit(model, "")


def _spread(
    planner: Planner, model: nn.Module, family: Family, cfg: BoosterConfig, choices: Choices, sp_size: int
) -> Choices:
    """`choices` for tokens spread over processes, and the edits that split and gather them."""
    device = _placed_on(model, cfg)
    if cfg.compile:
        put_around(planner, "", ComparesModelInputs, "its arguments are compared among processes at first")
    if isinstance(family.spread, Alternating):
        plan_alternating(planner, model, family)
        itemsize = 2 if cfg.residual == "bf16" and device.type == "cuda" else _dtype(model).itemsize
        shape = video_shape(model, family)
        sequence = fastseq_choice.switching(cfg.sequence_parallel, *shape, sp_size, device, itemsize)
        return dataclasses.replace(choices, sequence=sequence)
    if cfg.precision == "fp8":
        raise ValueError(
            "precision: got 'fp8' with sp_size > 1; allowed: 'bf16' and others. Products in 8 bits are "
            "those of blocks that see whole sequences"
        )
    excluded: dict[str, str] = {}
    why: str | None = None
    if isinstance(family.spread, Joint):
        plan_joint(planner, model, family)
        apart = "image and text have projections of their own, and are no one input to be gathered"
        excluded |= dict.fromkeys(set(methods()) - set(joint.METHODS), apart)
    else:
        plan_spread(planner, model, family)
        whole = only_whole(planner, model, family)
        if whole is not None:
            excluded["fastseq"] = f"it computes q, k, v from rows of the weights, but {whole}"
        why = only_together(planner)
    heads, width = attention_shape(model, family)
    assert isinstance(family.spread, Spread | Joint)
    tokens = family.spread.tokens(model)
    if why is None and cfg.attention != "auto":
        why = f"blocks of keys are computed by kernels that give back softmax denominators, not by {cfg.attention!r}"
    if why is not None:
        excluded |= {name: why for name, method in methods().items() if method.layout(sp_size, heads) > 1}
    sequence = fastseq_choice.choose(
        cfg.sequence_parallel,
        heads,
        width,
        tokens,
        sp_size,
        device,
        _dtype(model),
        excluded,
        cfg.regather_input,
    )
    if cfg.regather_input and not sequence.regather:
        planner.keep("blocks", f"no input is gathered again: {sequence.method}, which auto chose, gathers none")
    if sequence.method not in in_block.METHODS:
        if cfg.fusion == "block":
            raise ValueError(
                f"fusion: got 'block' with the method {sequence.method!r} for sp_size > 1; allowed: 'auto', 'adaln', "
                f"or sequence_parallel={' or '.join(map(repr, in_block.METHODS))}, which a block can compute itself"
            )
        choices = dataclasses.replace(choices, fusion="adaln")
        if choices.graphs or choices.keep == "selective":
            why = f"blocks run in parts with the method {sequence.method}"
            planner.keep("blocks", f"no CUDA graphs and no selective checkpointing: {why}")
    elif choices.graphs and cfg.cuda_graphs != "collectives":
        choices = dataclasses.replace(choices, graphs=False)
        why = "no process group ends before graphs of its collectives do; cuda_graphs='collectives' asks for them"
        planner.keep("blocks", f"no CUDA graphs with sp_size > 1: {why}")
    return dataclasses.replace(choices, sequence=sequence)


def _placed_on(model: nn.Module, cfg: BoosterConfig) -> torch.device:
    """Where the model will run: FSDP2 takes it to the GPU, wherever it is now."""
    divides = cfg.plugin not in (None, "ddp") and cfg.engine == "torch"
    if divides and device_type() == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device_of(model)


def _check_used(cfg: BoosterConfig, planner: Planner) -> None:
    """What was asked for by name must have somewhere to go."""
    used = {name for edit in planner.edits for name in edit.mixin.uses}
    asked = [("kernels", name) for name in cfg.kernels] if isinstance(cfg.kernels, Mapping) else []
    if cfg.attention != "auto":
        asked.append(("attention", "attention"))
    for field, name in asked:
        if name not in used:
            reasons = "; ".join(sorted({kept.why for kept in planner.kept}))
            raise ValueError(
                f"{field}: got {getattr(cfg, field)!r}, but nothing in this model would use {name}; allowed here: "
                f"{', '.join(sorted(used)) or 'none'}. Leave it out, or see why parts were left: {reasons}"
            )


def _check_blocks(cfg: BoosterConfig, planner: Planner, choices: Choices, family: Family) -> None:
    """What only fused blocks can do must find one; by name it is refused, of a recipe's it is said."""
    if cfg.compile and not family.blocks:
        raise ValueError(
            "compile: got True, but this model has no list of blocks to compile one by one; leave it out, and wrap "
            "what accelerate returns in torch.compile"
        )
    ways = ways_of(planner.edits)
    checkpointing = cfg.activation_checkpointing
    if cfg.precision == "fp8":
        _check_fp8(cfg, planner, choices, "whole" in ways)
    if "whole" in ways:
        return
    if choices.graphs or checkpointing == "selective":
        planner.keep("", "no CUDA graphs and no selective checkpointing: no block is one function")
    if cfg.fusion == "block":
        raise ValueError(
            "fusion: got 'block'; allowed here: 'auto', 'adaln'. No block of this model is fused as one function: "
            + "; ".join(sorted({kept.why for kept in planner.kept}))
        )
    asked = [("residual", cfg.residual != "inherit"), ("activation_checkpointing", checkpointing in (True, "full"))]
    for field, is_asked in asked:
        if is_asked and not ways:
            raise ValueError(
                f"{field}: got {getattr(cfg, field)!r}, but no block of this model is fused, and only those can do that"
                ". Leave it out, or use what the model itself has"
            )


def _check_fp8(cfg: BoosterConfig, planner: Planner, choices: Choices, whole: bool) -> None:
    """Products in 8 bits are those of blocks that are one function, of Triton's kernels."""
    others = [n for n in (*BLOCK_KERNELS, "gelu") if choices.kernel(n) not in ("auto", "triton")]
    if others:
        raise ValueError(
            f"precision: got 'fp8' with kernels={choices.kernel(others[0])!r} for {', '.join(others)}; allowed: 'auto' "
            "and 'triton', for blocks are one function with those only"
        )
    if cfg.fusion == "adaln":
        raise ValueError("precision: got 'fp8' with fusion='adaln'; allowed: with 'auto' or 'block', for whole blocks")
    if not whole:
        raise ValueError(
            "precision: got 'fp8', but no block of this model is fused as one function, and only those can do that: "
            + "; ".join(sorted({kept.why for kept in planner.kept}))
            + ". Take 'bf16'"
        )


def ways_of(edits: Iterable[Edit]) -> set[str]:
    """How the blocks among them can be computed."""
    return {way for edit in edits if issubclass(edit.mixin, FusedAdaLN) for way in edit.mixin.ways}


def choose(cfg: BoosterConfig, model: nn.Module) -> Choices:
    """The backend of each kernel and of attention. `"auto"` stays `"auto"`: it is resolved call by call, by
    device, so that the model may still be moved. What is named must be able to run where the model is now.
    """
    names = sorted(spec.discover())
    device = device_of(model)
    requested = cfg.kernels if isinstance(cfg.kernels, Mapping) else dict.fromkeys(names, cfg.kernels)
    for name, backend in requested.items():
        if name not in names:
            raise ValueError(f"kernels: got the kernel name {name!r}; allowed: {', '.join(names)}")
        reason = kernel_backend.unavailable(backend, device, name) if backend != "auto" else None
        if reason is not None:
            raise ValueError(f"kernels: {name}={backend!r} can't run here: {reason}")
    known = ("auto", *attention.backend_names())
    if cfg.attention not in known:
        raise ValueError(f"attention: got {cfg.attention!r}; allowed: {', '.join(known)}")
    if cfg.attention != "auto":
        reason = attention.backend_unavailable(cfg.attention, device, None, None)
        if reason is not None:
            raise ValueError(f"attention: {cfg.attention!r} can't run here: {reason}")
    reason = fp8.unavailable(device) if cfg.precision == "fp8" else None
    if reason is not None:
        raise ValueError(f"precision: 'fp8' can't run here: {reason}. Take 'bf16'")
    checkpointing = cfg.activation_checkpointing
    keep = checkpointing if isinstance(checkpointing, str) else "full" if checkpointing else "all"
    return Choices(
        kernels=tuple((name, requested.get(name, "auto")) for name in names),
        attention=cfg.attention,
        fusion=cfg.fusion,
        residual=cfg.residual,
        keep=keep,
        graphs=bool(cfg.cuda_graphs) and not cfg.sampling,
        sampling=Sampling(cfg.weights, bool(cfg.cuda_graphs), cfg.cfg_parallel) if cfg.sampling else None,
        fp8=cfg.precision == "fp8",
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
