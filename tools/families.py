"""Writes docs/families.md from the plans that `accelerate` makes for the tests' small models, so that it stays true.

python tools/families.py            writes it
python tools/families.py --check    exits with 1 where it differs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from opendit.config import BoosterConfig  # noqa: E402
from opendit.describing import grouped  # noqa: E402
from opendit.patch.core import Plan  # noqa: E402
from opendit.patch.registry import GENERIC, Family, builtin  # noqa: E402
from opendit.plan import plan_for  # noqa: E402
from tests.tiny_models import TINY, UserDiT, UserLatte, UserLightningDiT  # noqa: E402

PAGE = ROOT / "docs" / "families.md"

_HEAD = """# Families

What `accelerate` does to each kind of model, as it plans for the small ones of the tests. They have two or four blocks:
`{0-1}` stands for all. `opendit.explain(model)` prints the same for yours, with the kernels and backends that run it.
Written by `python tools/families.py`; [adding_a_family.md](adding_a_family.md) says how to add one.
"""


def _with_learned_angles() -> nn.Module:
    model = UserLightningDiT(use_rope=True)
    model.feat_rope.scale = nn.Parameter(torch.ones(()))
    return model


# Variants that are left alone in part.
_VARIANTS = {
    "dit": [lambda: UserDiT(attn_drop=0.1, qk_norm=nn.LayerNorm), lambda: UserDiT(gated=True)],
    "latte": [lambda: UserLatte(attention_mode="flash")],
    "lightningdit": [
        lambda: UserLightningDiT(use_rmsnorm=True, use_qknorm=True, wo_shift=True),
        lambda: UserLightningDiT(dim=45, heads=3, use_qknorm=True),
        _with_learned_angles,
    ],
}

_SPREAD = "Sequences can be spread over processes (`sp_size`): split before the first block, gathered after `{}`."


def page() -> str:
    parts = [_HEAD]
    for family in builtin().values():
        builders = [next(t.build for t in TINY if t.family == family.name), *_VARIANTS.get(family.name, [])]
        parts.append(_section(family, [plan_for(build(), BoosterConfig()) for build in builders]))
    parts.append(_generic())
    return "\n".join(parts)


def _section(family: Family, plans: list[Plan]) -> str:
    lines = [f"## `{family.name}`", "", f"{family.describes}.", "", "Recognised where all of this holds:", ""]
    lines += [f"- {trait.says}" for trait in family.traits]
    spread = _SPREAD.format(family.spread.gather) if family.spread else "No sequence parallelism: `sp_size` stays 1."
    return "\n".join([*lines, "", spread, "", *_plan(plans), ""])


def _plan(plans: list[Plan]) -> list[str]:
    changed = grouped((edit.fqn, edit.what) for edit in plans[0].edits)
    left = _left(plans[0])
    others = [row for plan in plans[1:] for row in _left(plan) if row not in left]
    rows = ["changed:", *changed, "left as it was:", *(left or ["  nothing"])]
    if others:
        rows += ["left as it was in some of its variants:", *dict.fromkeys(others)]
    return ["```", *rows, "```"]


def _left(plan: Plan) -> list[str]:
    # How far two forwards differ depends on the machine.
    return [re.sub(r"\d\.\de[+-]\d+", "…", row) for row in grouped((kept.fqn, kept.why) for kept in plan.kept)]


def _generic() -> str:
    tiny = next(t for t in TINY if t.family == "diffusers_pixart")
    plan = plan_for(tiny.build(), BoosterConfig(), name=GENERIC.name)
    said = (
        '`accelerate(model, booster_cfg, family="generic")` takes any model. What is recognised in it, wherever it\n'
        "stands, is edited; nothing between those modules is. PixArt, as if nobody knew it:"
    )
    return "\n".join([f"## `{GENERIC.name}`", "", said, "", *_plan([plan]), ""])


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
