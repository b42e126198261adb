"""diffusers' `PixArtTransformer2DModel`, α and Σ, matched by its class. Its blocks: `opendit/patch/adaln_single.py`.

Micro-conditions (resolution, aspect ratio) go into the embedding that all blocks share, sizes and text come with the
call; neither is any block's affair. norm_out's modulation stands in the model's own forward and stays there.
"""

from __future__ import annotations

from typing import Any

from opendit.patch.adaln_single import plan_single_block
from opendit.patch.diffusers_parts import is_class
from opendit.patch.planner import Planner, has
from opendit.patch.registry import Family, Spread, Trait

_MODEL = "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel"


def plan(model: Any, planner: Planner) -> None:
    for i, block in enumerate(model.transformer_blocks):
        plan_single_block(planner, f"transformer_blocks.{i}", block)
    planner.keep("norm_out", "its modulation is written in the model's own forward")


FAMILY = Family(
    name="diffusers_pixart",
    describes="diffusers' PixArtTransformer2DModel, α and Σ; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has transformer_blocks", lambda m: has(m, "transformer_blocks")),
    ),
    plan=plan,
    blocks="transformer_blocks",
    spread=Spread(
        gather="proj_out",
        attention="attn1",
        mlp="ff",
        cross=("attn2",),
        tokens=lambda model: (model.config.sample_size // model.config.patch_size) ** 2,
    ),
)
