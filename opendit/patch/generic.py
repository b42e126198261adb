"""What can be done for a model of no known family, asked for by `family="generic"`. It is never chosen by itself.

Modules that are recognised wherever they stand (timm's and diffusers' attention and MLPs, LayerNorms where a kernel is
named) are offered the same edits as in known families, by the same checks. What stands between them (LayerNorm,
modulation, gate, residual) is written in forwards that nobody has described, and stays.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from opendit.patch import diffusers_parts
from opendit.patch.families import diffusers_flux, diffusers_sd3, dit
from opendit.patch.mlp import plan_mlp
from opendit.patch.planner import Planner, has
from opendit.patch.registry import GENERIC, Family


def generic(model: nn.Module) -> Family:
    """The family of `model` alone. Its blocks are those of ModuleLists of one class that stand in no other block."""
    lists: list[str] = []
    for name, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1 and len(module) > 1
        # Lists of lists hold what is called; they are not called themselves.
        called = alike and all(type(child).forward is not nn.Module.forward for child in module.children())
        if called and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    return dataclasses.replace(GENERIC, plan=plan, blocks=tuple(lists))


def plan(model: Any, planner: Planner) -> None:
    planner.keep(
        "", "no family describes it, so LayerNorm, modulation, gate and residual run as its own forward has them"
    )
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if _plan(planner, name, module):
            inside.append(name)


def plan_division(planner: Planner, plugin: str | None) -> None:
    """Says what not knowing the model costs where a plugin gathers parameters unit by unit."""
    if plugin not in (None, "ddp"):
        planner.keep(
            "",
            f"its parameters are one unit of {plugin!r}, gathered all at once, which takes the memory of all of them: "
            "parts of its blocks may be called from outside, and then a block's own unit would not be gathered",
        )


def _plan(planner: Planner, name: str, module: Any) -> bool:
    """Whether `module` is one that is looked at as a whole; what came of it is then in the planner."""
    kind = diffusers_parts.path(type(module))
    if kind == diffusers_flux.ATTENTION:
        diffusers_flux.plan_joint_attention(planner, name, module)
    elif kind == diffusers_parts.ATTENTION:
        if diffusers_parts.path(type(module.processor)) == diffusers_sd3.PROCESSOR:
            diffusers_sd3.plan_joint_attention(planner, name, module)
        elif module.is_cross_attention:
            diffusers_parts.plan_cross_attention(planner, name, module)
        else:
            diffusers_parts.plan_attention(planner, name, module)
    elif kind == diffusers_parts.FEED_FORWARD:
        diffusers_parts.plan_feed_forward(planner, name, module)
    elif has(module, "num_heads", "qkv.weight", "proj", "attn_drop", "proj_drop"):
        dit.plan_attention(planner, name, module)
    elif has(module, "fc1.weight", "act", "fc2.weight") or has(module, "w12.weight", "w3.weight"):
        plan_mlp(planner, name, module)
    elif re.search("attn|attention", type(module).__name__, re.IGNORECASE) and any(module.children()):
        planner.keep(
            name, f"its attention is a {kind}, built neither like timm's nor like diffusers'; it keeps its own"
        )
    else:
        return False
    return True
