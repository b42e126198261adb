"""What a sublayer's mixin tells a block that wants to compute it itself.

A block fused as a whole calls neither `attn` nor `mlp`; it takes their weights. Their mixins were checked against their
own forwards, so each can say what it is made of, or why it must be called all the same.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from opendit.patch.core import Patched, hooked


class AttentionParts(NamedTuple):
    """softmax(q·kᵀ/√K)·v of heads cut from x·Wqkvᵀ + bqkv, then the output projection."""

    qkv: tuple[nn.Linear, ...]  # one packed projection, or three
    proj: nn.Linear
    heads: int
    backend: str


class MlpParts(NamedTuple):
    """fc2(GELU(fc1(x)))."""

    fc1: nn.Linear
    fc2: nn.Linear
    tanh: bool


class Sublayer(Patched):
    """Base of mixins whose module a block may take over."""

    def _parts(self) -> AttentionParts | MlpParts | str:
        """What the module is made of, or why it must be called."""
        raise NotImplementedError


def parts_of(sublayer: object) -> AttentionParts | MlpParts | str:
    """`Sublayer._parts` of a module that nothing was put on since."""
    if not isinstance(sublayer, Sublayer) or not isinstance(sublayer, nn.Module):
        return "it was left to upstream"
    if type(sublayer)._opendit_made is not type(sublayer):
        return f"it was given another class since ({type(sublayer).__name__})"
    if hooked(sublayer):
        return "a hook or another forward was put on it"
    return sublayer._parts()


def off(*dropouts: nn.Module | None) -> bool:
    """Whether these do nothing: no dropout, an inactive one, or an identity, and no hooks."""
    for module in dropouts:
        if module is None or (type(module) is nn.Identity and not hooked(module)):
            continue
        if type(module) is not nn.Dropout or (module.training and module.p > 0) or hooked(module):
            return False
    return True


def plain_linear(*linears: nn.Module) -> bool:
    """Whether these are torch's own Linears with ordinary parameters, with nothing put on them."""
    return all(
        type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not hooked(linear)
        for linear in linears
    )
