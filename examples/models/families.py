"""What opendit is told about models that it does not know by itself; importing this tells it.

PixArt in its authors' layout: attention goes to opendit's backends and the MLP's GELU is one pass. adaLN-single has
another shape than DiT's, so norms and modulation stay as they are.
"""

from __future__ import annotations

from typing import Any

import opendit
from opendit.patch.families.dit import plan_attention
from opendit.patch.mlp import plan_mlp
from opendit.patch.planner import Planner, has
from opendit.patch.registry import Family, Trait


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.blocks):
        plan_attention(planner, f"blocks.{i}.attn", block.attn)
        plan_mlp(planner, f"blocks.{i}.mlp", block.mlp)
        planner.keep(f"blocks.{i}", "adaLN-single: its norms and modulation are upstream's")


opendit.register_family(
    Family(
        name="pixart-original",
        describes="PixArt-alpha in its authors' layout; recognised by structure",
        traits=(
            Trait("it has t_block and blocks", lambda m: has(m, "t_block", "blocks")),
            Trait(
                "every block has attn, cross_attn, mlp and scale_shift_table",
                lambda m: all(has(b, "attn", "cross_attn", "mlp", "scale_shift_table") for b in m.blocks),
            ),
        ),
        plan=plan,
        blocks="blocks",
    )
)
