"""From a plan to words: what `explain` prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from opendit import attention
from opendit.kernels import backend as kernel_backend
from opendit.patch.core import Choices, Plan, notes
from opendit.plan import ways_of
from opendit.stepping import in_words
from opendit.wrapping import device_of


def describe(plan: Plan, model: nn.Module, *, applied: bool, engine: Sequence[str] = ()) -> str:
    """`plan` in words: what changed and by what, what did not and why, what happened since; `engine`: its lines."""
    device = device_of(model)
    compiled_notes: list[tuple[str, str]] = []
    lines = [f"{plan.model}: family {plan.family}, {'accelerated' if applied else 'not accelerated yet'}"]
    lines.append("changed:" if applied else "would change:")
    lines += grouped((edit.fqn, edit.what) for edit in plan.edits) or ["  nothing"]
    lines.append("by:")
    used = {name for edit in plan.edits for name in edit.mixin.uses}
    for name, backend in plan.choices.kernels:
        if name in used:
            lines.append(f"  kernel {name}: {_kernel_in_words(name, backend, device)}")
    if "attention" in used:
        lines.append(f"  attention: {_attention_in_words(plan.choices.attention)}")
    if "attention" in used and plan.choices.attention == "auto":
        lines += [f"    so far {choice}" for choice in attention.choices_made()]
    lines += _choices_in_words(plan.choices, ways_of(plan.edits))
    if plan.choices.sequence is not None:
        lines += [f"  sequence: {line}" for line in plan.choices.sequence.reasons]
    lines += [f"  engine: {line}" for line in engine]
    lines += in_words(plan.stepping, model, applied=applied)
    modules = dict(model.named_modules())
    for fqn in plan.compiled:
        # A copy or an unpickled model has the plan and the classes, but not the compiled code.
        compiled = not applied or (fqn in modules and modules[fqn]._compiled_call_impl is not None)
        compiled_notes.append(
            (fqn, "compiled on its own by torch.compile" if compiled else "no longer compiled (a copy is not)")
        )
    lines += grouped(compiled_notes)
    lines.append("left as it was:")
    lines += grouped((kept.fqn, kept.why) for kept in plan.kept) or ["  nothing"]
    since = grouped(notes(model))
    if since:
        lines += ["while running, since then:", *since]
    return "\n".join(lines)


def _kernel_in_words(name: str, backend: str, device: torch.device) -> str:
    if backend != "auto":
        return f"{backend} (asked for)"
    if device.type != "cuda":
        return f"reference (auto: the model is on {device.type}; on a GPU it would be triton)"
    reason = kernel_backend.unavailable("triton", device, name)
    return "triton (auto)" if reason is None else f"reference (auto: {reason})"


_FUSION = {
    "auto": "blocks are one function each where Triton and a low-precision attention kernel run, else fused in parts",
    "block": "blocks are one function each",
    "adaln": "blocks are fused in parts; their sublayers run as modules",
}
_KEEP = {
    "selective": "blocks that are one function compute normalised inputs and GELUs again; others keep everything",
    "full": "blocks keep their input only and compute their forward again",
}


def _choices_in_words(choices: Choices, ways: set[str]) -> list[str]:
    if "whole" in ways:
        rows = [f"  fusion: {choices.fusion}: {_FUSION[choices.fusion]}"]
    else:
        rows = [f"  fusion: {_FUSION['adaln'] if ways else 'no block is fused'}"]
    if choices.fp8:
        rows.append(
            "  fp8: in blocks that are one function, qkv's and the MLP's products and their inputs' gradients are of "
            "rows in 8 bits"
        )
    if choices.residual != "inherit":
        rows.append(f"  residual stream under autocast: {choices.residual}")
    if choices.keep == "full" or (choices.keep == "selective" and "whole" in ways):
        rows.append(f"  activation checkpointing: {choices.keep}: {_KEEP[choices.keep]}")
    if choices.graphs and "whole" in ways:
        rows.append(
            "  CUDA graphs: on GPUs, in training, of blocks that are one function, where launches can be the limit and "
            "nobody holds what a replay overwrites; not under torch.compile"
        )
    if choices.sampling is not None:
        rows += [f"  sampling: {line}" for line in _sampling_in_words(choices)]
    return rows


def _sampling_in_words(choices: Choices) -> list[str]:
    asked = choices.sampling
    assert asked is not None
    rows = ["in opendit.sampling, modulations of all timesteps are computed at once, before the first step"]
    if asked.weights != "inherit":
        rows.append(f"weights are {asked.weights}, without autocast; restore gives back what came in, to the bit")
    if asked.graphs:
        rows.append("a CUDA graph of the whole forward for each shape, on GPUs, without gradients")
    if asked.pairs:
        rows.append("cfg_parallel: two processes share each batch, half of its rows each; one all-gather a forward")
    return rows


def _attention_in_words(backend: str) -> str:
    return f"{backend} (asked for)" if backend != "auto" else "auto, chosen per call by device, dtype, head_dim, length"


def grouped(rows: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all modules that differ in their numbers only: `blocks.{0-27}.attn (28)  text`."""
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for fqn, text in rows:
        numbers = [int(n) for n in re.findall(r"\d+", fqn)]
        groups.setdefault((re.sub(r"\d+", "{}", fqn), text), []).append(numbers)
    lines = []
    for (pattern, text), rows_alike in groups.items():
        columns = [_ranges(sorted(set(column))) for column in zip(*rows_alike, strict=True)]
        count = f" ({len(rows_alike)})" if len(rows_alike) > 1 else ""
        lines.append(f"  {pattern.format(*columns) or '(the model)'}{count}: {text}")
    return lines


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
