"""Cases of `behaving` for models of two streams: compiled, counted, refused, and with mistakes planted."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import opendit
from opendit.fastseq import joint
from opendit.patch import spread as spread_mixins
from tests.comparing import build, twin
from tests.fastseq import parity
from tests.fastseq.whole_models import spread
from tests.tiny_models import TINY

SD3, FLUX, TWO_OF_ONE, COG = (
    next(t for t in TINY if t.name == name) for name in ("sd3.5", "flux", "flux-schnell", "cogvideox-rotary")
)
F64, CPU = torch.float64, torch.device("cpu")


def cases(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {f"joint, wrong/{name}": functools.partial(_mutant, world, name) for name in MUTANTS}
    for tiny in (SD3, FLUX):
        found[f"joint, calls/{tiny.name}"] = functools.partial(calls, tiny, world)
    found["joint, refusals"] = functools.partial(refusals, world)
    found["joint, explain"] = functools.partial(explained, world)
    return found


def _error(model: nn.Module, plain: nn.Module, tiny: Any, world: int) -> float:
    """The worst relative error of a gradient; all share one sequence."""
    return parity.errors(parity.together(model, tiny, 1), parity.alone(plain, tiny, 1, 1))[1]


def compiled_cases(world: int) -> dict[str, Any]:
    return {tiny.name: functools.partial(compiled, tiny, world) for tiny in (SD3, FLUX)}


def compiled(tiny: Any, world: int) -> float:
    plain = build(tiny, F64)
    model = spread(twin(plain), "usp", world)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = parity.alone(plain, tiny, 1, 1)
    model.zero_grad(set_to_none=True)
    loss = parity.step(fast, tiny, 0, 0, 1.0)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= world
    return max(parity.errors((loss, grads), expected)[:2])


@contextlib.contextmanager
def planted(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _first_rows(x: torch.Tensor, lengths: tuple[int, ...], sp: int) -> torch.Tensor:
    """The positions of the first process, for everyone."""
    rows, begin = [], 0
    for local in lengths:
        rows.append(x[begin : begin + local])
        begin += joint.total_length(local, sp)
    return torch.cat(rows)


def _one_after_the_other(x: torch.Tensor, lengths: tuple[int, ...], sp: int) -> torch.Tensor:
    """As if text and image were one sequence, of which each has a part."""
    rank, local = dist.get_rank() % sp, sum(lengths)
    return torch.cat([x, torch.zeros_like(x)])[rank * local : (rank + 1) * local]


@contextlib.contextmanager
def _padding_is_seen() -> Iterator[None]:
    with planted(joint, "_without_padding", _as_it_is), planted(joint, "_with_padding", _as_it_is):
        yield


def _as_it_is(x: torch.Tensor, *layout: Any) -> torch.Tensor:
    return x


def _padding_is_seen_in_a_ring() -> Any:
    original = joint.ring_attention

    def wrong(q: Any, k: Any, v: Any, pair: Any, line: Any, counts: Any) -> Any:
        return original(q, k, v, pair, line, (q.shape[1],) * len(counts))

    return planted(joint, "ring_attention", wrong)


def _lengths_mixed_up() -> Any:
    original = joint.joint_attention
    wrong = lambda q, k, v, lengths, *rest: original(q, k, v, lengths[::-1], *rest)  # noqa: E731
    return planted(spread_mixins, "joint_attention", wrong)


def _text_not_split() -> Any:
    return planted(spread_mixins.SplitStreams, "streams", 1)


MUTANTS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "none": (FLUX, "ulysses", contextlib.nullcontext),
    "everyone at the first positions": (FLUX, "ulysses", lambda: planted(spread_mixins, "rows_of", _first_rows)),
    "positions of one sequence": (FLUX, "ulysses", lambda: planted(spread_mixins, "rows_of", _one_after_the_other)),
    "padding is attended to": (FLUX, "ulysses", _padding_is_seen),
    "padding is attended to in a ring": (SD3, "ring", _padding_is_seen_in_a_ring),
    "lengths mixed up": (TWO_OF_ONE, "ulysses", _lengths_mixed_up),
    "text is not split": (SD3, "ulysses", _text_not_split),
}


def _mutant(world: int, name: str) -> float | str:
    """The worst error of a gradient, or what is raised."""
    tiny, method, mistake = MUTANTS[name]
    plain = build(tiny, F64)
    with mistake():
        try:
            return _error(spread(twin(plain), method, world), plain, tiny, world)
        except ValueError as error:
            return str(error)


def calls(tiny: Any, world: int) -> tuple[list[str], list[str], int]:
    """The collectives of a forward and of a backward, and how many attention layers there are."""
    model = spread(build(tiny, F64), "ulysses", world)
    for _ in range(opendit.fastseq.inputs.STEPS + 1):  # the comparison of inputs is over then
        parity.step(model, tiny, 0, 0, 1.0)
    seen: list[str] = []
    names = [n for n in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single") if hasattr(dist, n)]
    with contextlib.ExitStack() as stack:
        for name in names:
            original = getattr(dist, name)
            stack.enter_context(planted(dist, name, functools.partial(_counted, seen, name, original)))
        (x,), more = tiny.inputs(F64, CPU)
        out = tiny.output(model(x, **more))
        forward = list(seen)
        out.sum().backward()
    layers = sum(isinstance(m, spread_mixins.SpreadAttention) for m in model.modules())
    return forward, seen[len(forward) :], layers


def _counted(seen: list[str], name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    seen.append("gather" if "gather" in name else name)
    return original(*args, **kwargs)


def explained(world: int) -> str:
    text = io.StringIO()
    opendit.explain(opendit.accelerate(build(FLUX), sp_size=world), file=text)
    return text.getvalue()


def _left_alone(tiny: Any, fqn: str) -> nn.Module:
    """A model whose module of this name is of another class, which might do anything."""
    model = build(tiny)
    module = model.get_submodule(fqn)
    module.__class__ = type("Odd", (type(module),), {"forward": lambda self, x, c: x.flip(1)})
    return model


def refusals(world: int) -> dict[str, str]:
    """What is said to requests that can't be right."""
    said: dict[str, str] = {}

    def tried(what: str, call: Any) -> None:
        try:
            call()
            said[what] = "nothing was raised"
        except (ValueError, NotImplementedError) as error:
            said[what] = str(error)

    tried("fastseq", lambda: opendit.accelerate(build(SD3), {"sequence_parallel": "fastseq"}, sp_size=world))
    tried("last norm", lambda: opendit.accelerate(_left_alone(SD3, "norm_out"), sp_size=world))
    tried(
        "text's norm",
        lambda: opendit.accelerate(_left_alone(SD3, "transformer_blocks.1.norm1_context"), sp_size=world),
    )
    sd3, flux = (opendit.accelerate(build(tiny).eval(), sp_size=world) for tiny in (SD3, FLUX))

    def call(model: nn.Module, tiny: Any, **options: Any) -> Any:
        (x,), more = tiny.inputs(torch.float32, CPU)
        return model(x, **{**more, **options})

    added = [torch.zeros(3, 10, 48)]
    tried("controlnet", lambda: call(sd3, SD3, block_controlnet_hidden_states=added))
    tried("skipped", lambda: call(sd3, SD3, skip_layers=[0]))
    tried("controlnet of flux", lambda: call(flux, FLUX, controlnet_single_block_samples=added))
    tried("arguments", lambda: call(flux, FLUX, joint_attention_kwargs={"ip_adapter_masks": None}))
    tried("positions", lambda: call(flux, FLUX, txt_ids=torch.zeros(7, 3)))
    cog = opendit.accelerate(build(COG).eval(), {"sequence_parallel": "ulysses"}, sp_size=world)
    tables = COG.inputs(torch.float32, CPU)[1]["image_rotary_emb"]
    part = tuple(table[: -(-len(table) // world)] for table in tables)
    tried("positions of a part", lambda: call(cog, COG, image_rotary_emb=part))
    tried("a block alone", lambda: flux.single_transformer_blocks[0].attn(torch.zeros(3, 4, 48)))
    flux.single_transformer_blocks[0].norm.register_forward_hook(lambda *args: None)
    tried("upstream's block", lambda: call(flux, FLUX))
    return said
