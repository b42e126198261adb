"""diffusers' `LatteTransformer3DModel`, matched by its class. Its blocks: `opendit/patch/adaln_single.py`.

    for pairs of blocks:  x [B·F, T, D] ← spatial(x, text), with attn2;  x → [B·T, F, D];  x ← x + positions (first)
                          x [B·T, F, D] ← temporal(x), without attn2;    x → [B·F, T, D]

B batch, F frames, T tokens of a frame, D hidden. The two kinds stand in two lists. The embedding that all blocks share
is made once for each sample, and repeated for each row by the model's own forward, as its text is. A block only adds
its table to it; what is computed more than once is k and v of the text, in each frame.
"""

from __future__ import annotations

from typing import Any

from opendit.patch.adaln_single import plan_single_block
from opendit.patch.diffusers_parts import is_class
from opendit.patch.planner import Planner, has
from opendit.patch.registry import Family, Trait

_MODEL = "diffusers.models.transformers.latte_transformer_3d.LatteTransformer3DModel"
_LISTS = ("transformer_blocks", "temporal_transformer_blocks")


def plan(model: Any, planner: Planner) -> None:
    for blocks in _LISTS:
        for i, block in enumerate(getattr(model, blocks)):
            plan_single_block(planner, f"{blocks}.{i}", block)
    planner.keep("norm_out", "its modulation is written in the model's own forward")


FAMILY = Family(
    name="diffusers_latte",
    describes="diffusers' LatteTransformer3DModel; recognised by class",
    traits=(
        Trait(f"it is a {_MODEL}", lambda m: is_class(m, _MODEL)),
        Trait("it has transformer_blocks and temporal_transformer_blocks", lambda m: has(m, *_LISTS)),
    ),
    plan=plan,
    blocks=_LISTS,
)
