"""The forward of a model that samples: around the model, and around its blocks.

    inputs ─ cast ─ this process's half ─ step begins ─ graph or forward ─ all-gather ─ cast back ─ outputs
             weights    cfg_parallel      steps.py     forward_graph.py   cfg_parallel   weights

What a model remembers between calls (graphs, memory for residuals) is kept outside of it, by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from opendit.fastseq import pairs
from opendit.patch.core import Edit, Patched
from opendit.patch.forward_graph import SHAPES, Graphs, opaque, unfit
from opendit.patch.lowered import DTYPES
from opendit.patch.planner import Planner
from opendit.patch.reuse import Memory, Residuals
from opendit.patch.steps import Call, Steps, steps_of

# What a model's forward calls its timesteps, in the families that name them; in others they are its second argument.
_TIME = "timestep"
# Rows that the model's forward is given at once while values of many steps are computed.
_ROWS_AT_ONCE = 512
# And numbers in its x, as many as in those rows of a 256-pixel image's latents, 4 × 32 × 32.
_NUMBERS_AT_ONCE = 1 << 21
# In so many first calls a pair of processes compares what it is given.
_COMPARED = 2


class Kept:
    """What a model that samples remembers."""

    def __init__(self) -> None:
        self.graphs = Graphs()
        self.memory = Memory()
        self.compared = 0  # calls whose inputs a pair of processes compared

    def bound(self) -> None:
        """Between runs: forgets residuals of many shapes, and the graphs, which know where they were."""
        if len(self.memory.kept) > SHAPES:
            self.memory.kept.clear()
            self.graphs = Graphs()


_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept_of(model: nn.Module) -> Kept:
    return _kept.setdefault(model, Kept())


def release(model: nn.Module) -> None:
    """Forgets a model's graphs and residuals, and so gives their memory back."""
    _kept.pop(model, None)


class Sampled(Patched):
    """Around the root's forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model, asked = cast(nn.Module, self), self._opendit_sampling
        assert asked is not None
        plain = super().forward  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        if model.training and torch.is_grad_enabled():
            raise ValueError(
                "model: it was accelerated for sampling and is called in training mode, with gradients; allowed: "
                "model.eval() under torch.no_grad(). To train it, opendit.restore(model) first"
            )
        steps = steps_of(self)
        if steps is not None and (model.training or torch.is_grad_enabled()):
            how = "in training mode" if model.training else "with gradients enabled"
            raise ValueError(
                f"model: it is called {how} inside opendit.sampling, where values are looked up and blocks may be left "
                "out; allowed: in evaluation mode, under torch.no_grad() or torch.inference_mode()"
            )
        x = self._argument(self._opendit_parameters[0], args, kwargs)
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
            return plain(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        given, rows = x.dtype, len(x)
        lower = DTYPES.get(asked.weights)
        if lower is not None:
            # Timesteps, of one dimension, keep every digit: 999 is not a bf16 number.
            leaves = [leaf.to(lower) if _is_wide(leaf) else leaf for leaf in leaves]
        if asked.pairs:
            if (kept := kept_of(model)).compared < _COMPARED:
                kept.compared += 1
                pairs.compare(leaves, self._sp())
            leaves = pairs.mine(leaves, rows, self._sp())
        out = self._step(leaves, spec, plain, steps)
        if (asked.pairs or lower is not None) and (kind := opaque(out)) is not None:
            raise ValueError(
                f"output: got {kind}; allowed: a tensor, or containers of tensors that pytree knows (tuples, lists, "
                "dicts, what torch.utils._pytree was told of), for it is gathered or cast. Have the forward return one "
                "of them, or leave cfg_parallel and weights out"
            )
        if asked.pairs:
            out = tree_map(lambda t: pairs.both(t, rows, self._sp()) if isinstance(t, Tensor) else t, out)
        if lower is not None:
            out = tree_map(lambda t: t.to(given) if isinstance(t, Tensor) and t.dtype == lower else t, out)
        return out

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self._opendit_parameters.index(name)
        return args[place] if place < len(args) else kwargs.get(name)

    def _sp(self) -> int:
        return self._opendit_sequence.size if self._opendit_sequence is not None else 1

    def _step(self, leaves: list[Any], spec: Any, plain: Callable[..., Any], steps: Steps | None) -> Any:
        model, asked = cast(nn.Module, self), self._opendit_sampling
        assert asked is not None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if steps is not None:
            if steps.step == 0:
                kept_of(model).bound()
            steps.begin(self._call(leaves, spec, plain))
            tensors += steps.tensors()

        def compute(tensors: Sequence[Tensor]) -> Any:
            given = iter(tensors)
            args, kwargs = tree_unflatten([next(given) if isinstance(o, Tensor) else o for o in leaves], spec)
            if steps is not None:
                steps.read(list(given))
            return plain(*args, **kwargs)

        reason = None if asked.graphs else ""
        if asked.graphs:
            reason = self._no_graph(steps) or unfit(model, leaves)
        if reason is None:
            others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
            key = (str(spec), others, None if steps is None else steps.key())
            try:
                hash(key)
            except TypeError:
                reason = "it is given something that can't be compared with what it was given before"
        if reason is None:
            kept = kept_of(model)
            out, reason = kept.graphs.run(model, key, tensors, compute, kept.memory.tensors())
        else:
            out = compute(tensors)
        if (
            steps is not None
            and steps.residuals is not None
            and steps.residuals.observe is not None
            and steps.calls == 0
        ):
            self._check_reuse(steps.residuals, out, compute, tensors)
        if reason:
            self._note(f"no CUDA graph of its forward: {reason}")
        if steps is not None:
            steps.end()
            if (why := steps.without or steps.wide) is not None:
                self._note(f"adaLN is computed step by step: {why}")
        return out

    def _check_reuse(
        self, residuals: Residuals, out: Any, compute: Callable[..., Any], tensors: Sequence[Tensor]
    ) -> None:
        """Raises where blocks left out, right after they were computed for the same input, give another output."""
        residuals.computes = False
        again = compute(tensors)
        residuals.computes = True
        stream = max(torch.finfo(key[1]).eps for key in residuals.memory.kept)
        for one, other in zip(tree_leaves(out), tree_leaves(again), strict=True):
            if isinstance(one, Tensor) and one.is_floating_point():
                off = ((other - one).double().norm() / one.double().norm().clamp_min(1e-30)).item()
                if not off <= max(stream, torch.finfo(one.dtype).eps) ** 0.75:
                    raise ValueError(
                        f"cache: with blocks {residuals.reuse.first} to {residuals.reuse.last} left out and their "
                        f"residual added, the model's output is {off:.1e} off; between its blocks it does more than "
                        "pass x on. Leave the cache out for this model"
                    )

    def _no_graph(self, steps: Steps | None) -> str | None:
        if self._opendit_sequence is not None:
            return "processes that share a sequence talk inside of it"
        if steps is not None and steps.residuals is not None and steps.residuals.observe is not None:
            return "its blocks are observed"
        return None

    def _call(self, leaves: list[Any], spec: Any, plain: Callable[..., Any]) -> Call:
        """The call as a run of a sampler sees it."""
        args, kwargs = tree_unflatten(leaves, spec)
        names = self._opendit_parameters
        name = _TIME if _TIME in names else names[1]
        time, x = self._argument(name, args, kwargs), self._argument(names[0], args, kwargs)
        if not isinstance(time, Tensor):
            raise ValueError(
                f"{name}: got {type(time).__name__} inside opendit.sampling; allowed: a tensor of one timestep, or of "
                "one for each sample"
            )
        rows = len(x)

        def of_rows(leaf: Any) -> bool:
            return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) % rows == 0

        def repeated(n: int, times: Tensor, blank: bool) -> object:
            def one(leaf: Any) -> Any:
                if leaf is time:
                    return times
                if not of_rows(leaf):
                    return leaf
                more = leaf.repeat(n, *[1] * (leaf.dim() - 1))
                return torch.zeros_like(more) if blank and leaf is x else more

            again, options = tree_unflatten([one(leaf) for leaf in leaves], spec)
            return plain(*again, **options)

        conditions = tuple(leaf for leaf in leaves if leaf is not x and leaf is not time and of_rows(leaf))
        # A list with an entry for each sample can't be repeated like a tensor.
        lists = any(isinstance(value, (list, tuple)) for value in (*args, *kwargs.values()))
        at_once = min(_ROWS_AT_ONCE // rows, _NUMBERS_AT_ONCE // max(1, x.numel()))
        return Call(x.shape, time, conditions, repeated, 1 if lists else max(1, at_once))


class Block(Patched):
    """Around a block, which a run of a sampler may leave out, or be interested in the condition of only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        steps = steps_of(self)
        plain = super().forward  # type: ignore[misc]
        if steps is None:
            return plain(*args, **kwargs)
        x = args[0] if args else kwargs[self._opendit_parameters[0]]
        if steps.recording:
            if type(self)._opendit_mixin.is_site:
                plain(*args, **kwargs)
            return x
        if steps.residuals is None or not steps.residuals.within(self):
            return plain(*args, **kwargs)
        reused = steps.residuals.before(self, x)
        if reused is not None:
            return reused
        out = plain(*args, **kwargs)
        steps.residuals.after(self, out)
        return out


def _is_wide(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.float32, torch.float64) and leaf.dim() > 1


def plan_sampling(planner: Planner, blocks: Sequence[str], weights: str) -> None:
    """Puts the mixins around the root and around each block, the latter nearest to it."""
    edits = {edit.fqn: i for i, edit in enumerate(planner.edits)}
    for fqn in blocks:
        if fqn in edits:
            old = planner.edits[edits[fqn]]
            planner.edits[edits[fqn]] = Edit(fqn, old.mixin, old.what, (*old.around, Block))
        else:
            planner.edits.append(Edit(fqn, Block, "may be left out in sampling"))
    what = "its forward samples" + (f", in {weights}" if weights != "inherit" else "")
    if "" in edits:
        old = planner.edits[edits[""]]
        planner.edits[edits[""]] = Edit("", old.mixin, f"{old.what}; {what}", (Sampled, *old.around))
    else:
        planner.edits.append(Edit("", Sampled, what))
