"""Plans where a model's tokens are split and gathered, and refuses models for which a part would not do.

Right are blocks in which only attention looks across tokens. A module whose mixin does its work is known; one that was
left to upstream is asked, on a small copy: does it give the same for a part of the tokens (or heads) as for all?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from opendit.patch.core import Edit
from opendit.patch.parts import plain_linear
from opendit.patch.planner import Planner
from opendit.patch.probe import separable
from opendit.patch.registry import Family, Joint, Spread
from opendit.patch.spread import GatherTokens, OnPart, SplitStreams, SplitTokens, SpreadAttention


def plan_spread(planner: Planner, model: nn.Module, family: Family) -> None:
    """Adds the split and the gather to what is planned.

    Raises `ValueError`, naming the module, where they can't be; `NotImplementedError` for a family without `spread`.
    """
    spread = family.spread
    if spread is None:
        raise NotImplementedError(
            f"sp_size: sequence parallelism is not implemented for family {family.name}, which does not say where its "
            "tokens can be split (Family.spread); leave sp_size at 1"
        )
    assert isinstance(spread, Spread)
    blocks = whole_blocks(model, family)
    kept = {entry.fqn: entry.why for entry in planner.kept}
    edits = {edit.fqn: edit for edit in planner.edits}
    for fqn, block in blocks:
        if fqn not in edits:
            raise cannot(fqn, f"it is left to upstream ({kept.get(fqn)}), so it may mix tokens outside attention")
        _check_attention(planner, f"{fqn}.{spread.attention}", block, edits, kept)
        for cross in (f"{fqn}.{name}" for name in spread.cross if getattr(block, name, None) is not None):
            if cross not in edits or not issubclass(edits[cross].mixin, OnPart):
                raise cannot(cross, f"it is left to upstream ({kept.get(cross)}), so it may mix tokens")
        mlp, width = f"{fqn}.{spread.mlp}", _width(block.get_submodule(spread.attention))
        inside: Any = getattr(block, spread.mlp, None)  # single-stream blocks have its linears in themselves
        if mlp not in edits and inside is not None and not planner.once(_token_by_token, inside, width):
            raise cannot(mlp, "it is left to upstream and gives something else for a part of the tokens")
    put_around(planner, blocks[0][0], SplitTokens, "gets its process's part of the tokens")
    plan_gather(planner, model, spread.gather)


def plan_joint(planner: Planner, model: nn.Module, family: Family) -> None:
    """The same for blocks of two streams."""
    spread = family.spread
    assert isinstance(spread, Joint)
    blocks = whole_blocks(model, family)
    kept = {entry.fqn: entry.why for entry in planner.kept}
    edits = {edit.fqn: edit for edit in planner.edits}
    for fqn, block in blocks:
        if fqn not in edits:
            raise cannot(fqn, f"it is left to upstream ({kept.get(fqn)}), so it may mix tokens outside attention")
        for name in _present(block, spread.attention):
            _check_attention(planner, f"{fqn}.{name}", block, edits, kept)
        for name in _present(block, spread.mlp):
            mlp = f"{fqn}.{name}"
            if mlp not in edits and not planner.once(_token_by_token, block.get_submodule(name), _width(block)):
                raise cannot(mlp, "it is left to upstream and gives something else for a part of the tokens")
        _check_norms(planner, block, f"{fqn}.", spread.norms, edits, kept)
    _check_norms(planner, model, "", spread.norms, edits, kept)
    put_around(planner, blocks[0][0], SplitStreams, "gets its process's part of image and text")
    plan_gather(planner, model, spread.gather)
    put_around(planner, "", spread.around, "arguments that take all tokens are refused")


def _present(block: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(block, name, None) is not None]


def _check_norms(
    planner: Planner,
    module: nn.Module,
    prefix: str,
    names: tuple[str, ...],
    edits: dict[str, Edit],
    kept: dict[str, str],
) -> None:
    for name in _present(module, names):
        fqn = prefix + name
        if fqn not in edits and not planner.took_over(module.get_submodule(name)):
            raise cannot(fqn, f"it is left to upstream ({kept.get(fqn)}), so it may mix tokens")


def whole_blocks(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """The blocks by name. Raises `ValueError` where one stands twice, or draws random numbers for its rows."""
    blocks = family.blocks_of(model)
    if len({id(block) for _, block in blocks}) < len(blocks):
        raise cannot("its blocks", "one stands in it twice")
    for fqn, block in blocks:
        for inner, module in block.named_modules():
            if isinstance(module, _DropoutNd) and module.p > 0:
                why = f"dropout (p={module.p}) would draw one process's part as if it were all"
                raise cannot(f"{fqn}.{inner}", why)
    return blocks


def plan_gather(planner: Planner, model: nn.Module, fqn: str) -> None:
    """Puts the gather around the last module, which must work token by token."""
    if type(model.get_submodule(fqn)) is not nn.Linear and all(edit.fqn != fqn for edit in planner.edits):
        kept = {entry.fqn: entry.why for entry in planner.kept}
        raise cannot(fqn, f"it is left to upstream ({kept.get(fqn)})")
    put_around(planner, fqn, GatherTokens, "its output is gathered")


def attention_shape(model: nn.Module, family: Family) -> tuple[int, int]:
    """(heads, hidden size) of its first block's attention."""
    attention = next(_attentions(model, family))
    return int(getattr(attention, "num_heads", None) or attention.heads), _width(attention)


def only_whole(planner: Planner, model: nn.Module, family: Family) -> str | None:
    """Why q, k, v of some heads can't be computed apart from the others', as `fastseq` does; None where they can."""
    mixin = next(edit.mixin for edit in planner.edits if issubclass(edit.mixin, SpreadAttention))
    if mixin.all_heads is not None:
        return mixin.all_heads
    if all(plain_linear(*(getattr(a, name) for name in mixin.projections)) for a in _attentions(model, family)):
        return None
    return "linears here are not torch's own"


def only_together(planner: Planner) -> str | None:
    """Why a process must have all keys at once, as `ring` has not; None where it need not."""
    return next(edit.mixin.all_keys for edit in planner.edits if issubclass(edit.mixin, SpreadAttention))


def _attentions(model: nn.Module, family: Family) -> Iterator[Any]:
    assert isinstance(family.spread, Spread | Joint)
    names = family.spread.attention
    for _, block in family.blocks_of(model):
        yield block.get_submodule(names if isinstance(names, str) else names[0])


def _check_attention(
    planner: Planner, fqn: str, block: nn.Module, edits: dict[str, Edit], kept: dict[str, str]
) -> None:
    edit = edits.get(fqn)
    if edit is None or not issubclass(edit.mixin, SpreadAttention):
        raise cannot(fqn, f"its attention is left to upstream ({kept.get(fqn)})")
    attention = block.get_submodule(fqn.rsplit(".", 1)[1])
    for name in edit.mixin.per_head:
        norm = getattr(attention, name, None)
        if isinstance(norm, nn.Module) and not planner.once(_head_by_head, norm, _head_dim(attention)):
            raise cannot(f"{fqn}.{name}", "it gives something else for a part of the heads or tokens")


def put_around(planner: Planner, fqn: str, mixin: Any, what: str) -> None:
    for i, edit in enumerate(planner.edits):
        if edit.fqn == fqn:
            said = f"{edit.what}; {what}"
            planner.edits[i] = dataclasses.replace(edit, around=(mixin, *edit.around), what=said)
            return
    planner.edits.append(Edit(fqn, mixin, what))


def cannot(fqn: str, why: str) -> ValueError:
    return ValueError(f"sp_size: the tokens of {fqn} can't be spread over processes: {why}; leave sp_size at 1")


def _width(block: nn.Module) -> int:
    return next(m.in_features for m in block.modules() if isinstance(m, nn.Linear))


def _head_dim(attention: Any) -> int:
    if hasattr(attention, "qkv"):
        return int(attention.qkv.weight.shape[0]) // (3 * int(attention.num_heads))
    return int(attention.to_q.weight.shape[0]) // int(attention.heads)


def _token_by_token(module: nn.Module, width: int) -> bool:
    return separable(module, torch.Size((2, 6, width)), dims=(1,))


def _head_by_head(module: nn.Module, head_dim: int) -> bool:
    return separable(module, torch.Size((2, 6, 4, head_dim)), dims=(1, 2))
