"""Cases for `test_behaviour`: what a spread model does besides computing the right gradients."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import opendit
from opendit.patch.core import notes
from tests.comparing import build, exactly, run, twin, worst
from tests.fastseq import joining, parity
from tests.fastseq.whole_models import FIRST, joint, spread
from tests.tiny_models import TINY, Tiny, UserDiT, _dit_inputs, randomise

# Of diffusers' models of videos, one that others say nothing about is enough: its attention has a text beside it.
NAMES = tuple(name for name in FIRST if name not in ("wan", "hunyuan-video"))
tiny_of = {t.name: t for t in TINY if t.name in NAMES}


def cases(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in ("fastseq", "ring", "switch"):  # the collectives of the others are among theirs
        found[f"compiled/{method}"] = functools.partial(compiled, method, world, name_of(method))
    found["compiled/turned by positions"] = functools.partial(compiled, "ulysses", world, "lightningdit")
    for name in NAMES:
        found[f"inference/{name}"] = functools.partial(inference, name, world)
        found[f"copies/{name}"] = functools.partial(copies, name, world)
        found[f"full checkpointing/{name}"] = functools.partial(full_checkpointing, name, world)
    for method in ("fastseq", "ulysses", "switch"):
        found[f"calls/{method}"] = functools.partial(calls, method, world)
        found[f"ddp/{method}"] = functools.partial(ddp, method, world)
        found[f"fully_shard/{method}"] = functools.partial(sharded, method, world)
    for name in ("dit", "latte"):
        found[f"compiled blocks/{name}"] = functools.partial(compiled_blocks, name, world)
    for name in ("dit", "latte"):
        found[f"different inputs, compiled/{name}"] = functools.partial(different_inputs, name, world)
    for method in ("fastseq", "fastseq-overlapped-regather"):
        for name in ("dit", "diffusers"):
            found[f"frozen/{method}/{name}"] = functools.partial(frozen, method, name, world)
    found["groups"] = functools.partial(groups_apart, world)
    found["autocast"] = functools.partial(autocast, world)
    found["regather"] = functools.partial(regathered, world)
    for name in ("dit", "latte"):
        found[f"explain/{name}"] = functools.partial(explained, name, world)
    found["lengths in flight"] = functools.partial(lengths_in_flight, world)
    found["refusals"] = functools.partial(refusals, world)
    return found | joining.cases(world)


def name_of(method: str) -> str:
    """The model that shows what is particular to a method."""
    return "latte" if method == "switch" else "dit"


def method_of(name: str, method: str) -> str:
    if joint(name):
        return "ulysses" if method == "fastseq" else method
    return "switch" if name == "latte" else method


def _averaged(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, value in found.items():
        if name not in ("output", "input"):
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return found


def _error(model: nn.Module, plain: nn.Module, of: str | Tiny, **options: Any) -> float:
    """Worst relative error over the output, the input's gradient and all parameters'; inputs alike on all ranks."""
    tiny = tiny_of[of] if isinstance(of, str) else of
    found = {key.removeprefix("_orig_mod."): value for key, value in run(model, tiny, **options).items()}
    return worst(_averaged(found), run(plain, tiny, **options))[0]


def compiled(method: str, world: int, name: str) -> float:
    plain, sizes = _of_two_lengths() if method == "fastseq" else (build(tiny_of[name], torch.float64), [tiny_of[name]])
    model = torch.compile(spread(twin(plain), method, world), fullgraph=True, backend="aot_eager")
    return max(_error(model, plain, tiny) for tiny in sizes)


def _of_two_lengths() -> tuple[nn.Module, list[Tiny]]:
    """A DiT, and inputs of two sizes: the second time torch.compile takes a length for dynamic."""
    dit = tiny_of["dit"]
    plain = build(dit, torch.float64)
    plain.pos_embed = nn.Parameter(plain.pos_embed[:, :1].clone(), requires_grad=False)  # alike for any length
    return plain, [dit, dataclasses.replace(dit, inputs=_dit_inputs(size=8))]


def compiled_blocks(name: str, world: int) -> float:
    plain, sizes = _of_two_lengths() if name == "dit" else (build(tiny_of[name], torch.float64), [tiny_of[name]])
    model = twin(plain)
    opendit.accelerate(model, {"compile": True, "kernels": "reference"}, sp_size=world)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return max(_error(model, plain, tiny) for tiny in sizes)


def different_inputs(name: str, world: int) -> str:
    """What is said where blocks are compiled and processes of a group have other noise."""
    model = opendit.accelerate(build(tiny_of[name]), {"compile": True, "kernels": "reference"}, sp_size=world)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    (x, *rest), kwargs = tiny_of[name].inputs(torch.float32, torch.device("cpu"))
    try:
        model(x + dist.get_rank(), *rest, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing"


def frozen(method: str, name: str, world: int) -> tuple[float, int]:
    """With some projections frozen: the error, and operations of the backward that are saved against none frozen."""
    plain = build(tiny_of[name], torch.float64)
    model, operations = spread(twin(plain), method, world), []
    (x, *rest), kwargs = tiny_of[name].inputs(torch.float64, torch.device("cpu"))
    for freeze in (False, True):
        for either in (plain, model):
            for key, parameter in either.named_parameters():
                if key.endswith(("1.attn.qkv.weight", "0.attn.qkv.bias", "to_v.weight", "to_q.bias")):
                    parameter.requires_grad_(not freeze)
        out = tiny_of[name].output(model(x, *rest, **kwargs))
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        operations.append(counter.get_total_flops())
    return _error(model, plain, name), operations[0] - operations[1]


def groups_apart(world: int) -> list[bool]:
    """Which of what is meant of the groups holds."""
    from opendit.fastseq.mesh import _timeout, groups

    every = [groups(world, ring) for ring in (1, world)]
    mine = every[0].sp
    seconds = [pg._get_backend(torch.device("cpu")).options._timeout for pg in (mine, dist.group.WORLD)]
    return [
        mine is not dist.group.WORLD,
        all(place.sp is mine and place.dp is every[0].dp and place.mesh is every[0].mesh for place in every),
        dist.get_process_group_ranks(mine) == list(range(world)),
        seconds[0] == seconds[1] == _timeout("cpu"),
    ]


def inference(name: str, world: int) -> float:
    plain = build(tiny_of[name], torch.float64).eval()
    model = spread(twin(plain), method_of(name, "fastseq"), world)
    args, kwargs = tiny_of[name].inputs(torch.float64, torch.device("cpu"))
    with torch.inference_mode(), exactly(tiny_of[name]):
        expected, found = (tiny_of[name].output(m(*args, **kwargs)) for m in (plain, model))
    return ((expected - found).abs().max() / expected.abs().max()).item()


def copies(name: str, world: int) -> list[float]:
    """Errors of a deep copy, of an unpickled one, and of the model once restored."""
    plain = build(tiny_of[name])
    for module in plain.modules():
        module._forward_pre_hooks.clear()  # local functions, which don't pickle
    model = spread(twin(plain), method_of(name, "ulysses"), world)
    classes = [type(m) for m in plain.modules()]
    there = [_error(m, plain, name) for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))]
    opendit.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert opendit.data_parallel_size(model) == world
    before = run(plain, tiny_of[name])
    assert all(torch.equal(value, before[key]) for key, value in run(model, tiny_of[name]).items())
    return there


def full_checkpointing(name: str, world: int) -> float:
    plain = build(tiny_of[name], torch.float64)
    config = {"activation_checkpointing": "full", "kernels": "reference"}
    return _error(opendit.accelerate(twin(plain), config, sp_size=world), plain, name)


def autocast(world: int) -> float:
    """Of bf16 autocast: our error over that of the plain model, both against fp64, the worst tensor's.

    Of five draws the middle one: in one, the gradients of a nearly uniform softmax may be off by twice as much or half.
    """
    ratios = []
    for name in (name for name in NAMES if name != "sd3.5"):  # which takes long, and Flux is of its kind
        plain = build(tiny_of[name])
        method = method_of(name, "fastseq")
        fast, found = spread(twin(plain), method, world), []
        for seed in range(5):
            randomise(plain, seed)
            randomise(fast, seed)
            truth = run(twin(plain).double(), tiny_of[name])
            theirs = worst(run(plain, tiny_of[name], autocast=torch.bfloat16), truth)[0]
            ours = worst(_averaged(run(fast, tiny_of[name], autocast=torch.bfloat16)), truth)[0]
            found.append(ours / theirs)
        ratios.append(statistics.median(found))
    return max(ratios)


_COLLECTIVES = (
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "all_reduce",
    "batch_isend_irecv",
)


def calls(method: str, world: int) -> dict[str, list[str]]:
    """The collectives of a forward and of a backward of a model, in order."""
    tiny = tiny_of[name_of(method)]
    model = spread(build(tiny, torch.float64), method, world)
    run(model, tiny)
    for _ in range(opendit.fastseq.inputs.STEPS):
        run(model, tiny)  # the comparison of inputs is over
    seen: list[str] = []
    originals = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
    for name, original in originals.items():
        setattr(dist, name, functools.partial(_counted, seen, name, original))
    try:
        args, kwargs = tiny.inputs(torch.float64, torch.device("cpu"))
        out = model(*args, **kwargs)
        forward = list(seen)
        out.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"forward": forward, "backward": seen[len(forward) :]}


def _counted(seen: list[str], name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    seen.append("gather" if "gather" in name else "reduce-scatter" if "reduce_scatter" in name else name)
    return original(*args, **kwargs)


def ddp(method: str, world: int) -> tuple[float, float, str]:
    """The mean that DDP takes over the world, with two groups where there are four processes."""
    plain = build(tiny_of[name_of(method)], torch.float64)
    model = spread(twin(plain), method, 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = parity.together(wrapped, tiny_of[name_of(method)], 1, averaged=True)
    return parity.errors(found, parity.alone(plain, tiny_of[name_of(method)], world // 2, 1))


def sharded(method: str, world: int) -> float:
    """FSDP2 over the world on top: gradients are averaged and scattered by it."""
    from torch.distributed.fsdp import fully_shard

    plain = build(tiny_of[name_of(method)], torch.float64)
    model = spread(twin(plain), method, 2)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    found = run(model, tiny_of[name_of(method)])
    whole = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    found = {"output": found["output"], "input": found["input"], **whole}
    return worst(found, run(plain, tiny_of[name_of(method)]))[0]


def kept_bytes(model: nn.Module, inputs: Any) -> int:
    """What a forward keeps for its backward, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*inputs)
    del out
    return sum(kept.values())


def regathered(world: int) -> dict[str, Any]:
    """Errors, shares of one device's kept bytes without and with gathering again, and what is said about it."""
    plain = UserDiT(size=32, dim=48, depth=4)
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.tensor([1]))
    config = {"sequence_parallel": "fastseq", "kernels": "reference"}
    models = [
        opendit.accelerate(twin(plain), {**config, "regather_input": again}, sp_size=world) for again in (False, True)
    ]
    alone = kept_bytes(opendit.accelerate(twin(plain), {"kernels": "reference"}), inputs)
    text = io.StringIO()
    opendit.explain(models[1], file=text)
    without = io.StringIO()
    other = opendit.accelerate(build(tiny_of["latte"]), {"regather_input": True}, sp_size=world)
    opendit.explain(other, file=without)
    return {
        "compiled": _compiled_regather(world),
        "shares": [kept_bytes(model, inputs) / alone for model in models],
        "said": text.getvalue(),
        "latte": without.getvalue(),
    }


def _compiled_regather(world: int) -> float:
    plain = build(tiny_of["dit"], torch.float64)
    model = torch.compile(spread(twin(plain), "fastseq-regather", world), fullgraph=True, backend="aot_eager")
    return _error(model, plain, "dit")


def explained(name: str, world: int) -> str:
    before, after = io.StringIO(), io.StringIO()
    model = build(tiny_of[name])
    opendit.explain(model, sp_size=world, file=before)
    opendit.explain(opendit.accelerate(model, sp_size=world), file=after)
    sequence = [line for line in before.getvalue().splitlines() if line.startswith("  sequence: ")]
    assert sequence
    assert all(line in after.getvalue() for line in sequence)
    return after.getvalue()


def lengths_in_flight(world: int) -> float:
    """Two lengths that would have one number of local tokens, checkpointed, forwards before backwards."""
    from torch.utils.checkpoint import checkpoint

    from opendit.fastseq import Sequence, methods
    from opendit.fastseq.collectives import gather_tokens, split_tokens
    from tests.fastseq.fuzzing import Layer, attend, turned

    layer = Layer(4, packed=True)
    sequence = Sequence("fastseq", world)
    xs = [torch.randn(1, n, 5, dtype=torch.float64, requires_grad=True) for n in (4 * world - 1, 4 * world)]

    def block(x: torch.Tensor) -> torch.Tensor:
        return methods()["fastseq"].attention(x, layer.description(), sequence)

    outs = [gather_tokens(checkpoint(block, split_tokens(x, world), use_reentrant=False), world) for x in xs]
    found = [torch.autograd.grad((out**2).sum(), x)[0] for out, x in zip(reversed(outs), reversed(xs), strict=True)]
    worst_error = 0.0
    for grad, x in zip(reversed(found), xs, strict=True):
        q, k, v = layer.project(x)
        expected = torch.autograd.grad((attend(*turned(q, k, 0), v) ** 2).sum(), x)[0]
        worst_error = max(worst_error, ((grad - expected).norm() / expected.norm()).item())
    return worst_error


def _mixing_rows() -> nn.Module:
    model = build(tiny_of["latte"])
    for block in model.blocks:
        block.mlp.register_module("mixer", nn.Conv1d(48, 48, 3))
        block.mlp.forward = lambda x: x - x.mean(0, keepdim=True)
    return model


def _dropping() -> nn.Module:
    model = build(tiny_of["latte"])
    model.blocks[1].mlp.drop1.p = 0.1
    return model


def _with_other_positions(world: int) -> None:
    """A model for 4 tokens of a frame that is given 9 after all."""
    model = opendit.accelerate(build(tiny_of["latte"]).eval(), sp_size=world)
    model.pos_embed = nn.Parameter(torch.randn(1, 9, 48))
    model(torch.randn(2, 3, 4, 6, 6), torch.tensor([1, 2]), torch.tensor([1, 2]))


def refusals(world: int) -> dict[str, str]:
    """What is said to requests that can't be right."""
    said: dict[str, str] = {}

    def tried(what: str, call: Any) -> None:
        try:
            call()
            said[what] = "nothing was raised"
        except (ValueError, NotImplementedError) as error:
            said[what] = str(error)

    latte = tiny_of["latte"]
    for method in ("fastseq", "ulysses", "ring", "usp"):
        named = {"sequence_parallel": method}
        tried(f"latte {method}", lambda named=named: opendit.accelerate(build(latte), named, sp_size=world))
    tried("latte's rows", lambda: opendit.accelerate(_mixing_rows(), sp_size=world))
    tried("latte's dropout", lambda: opendit.accelerate(_dropping(), sp_size=world))
    tried("latte's tokens", lambda: _with_other_positions(world))
    for name, method in (("wan", "fastseq"), ("cogvideox", "ring"), ("cogvideox", "usp")):
        of_videos = build(next(t for t in TINY if t.name == name))
        named = {"sequence_parallel": method}
        tried(f"{name} {method}", lambda model=of_videos, named=named: opendit.accelerate(model, named, sp_size=world))
    tiny = tiny_of["dit"]
    tried("divisor", lambda: opendit.accelerate(build(tiny), sp_size=world + 1))
    ring = {"fusion": "block", "sequence_parallel": "ring"}
    tried("block", lambda: opendit.accelerate(build(tiny), ring, sp_size=world))
    named = {"attention": "sdpa-math", "sequence_parallel": "ring"}
    tried("attention", lambda: opendit.accelerate(build(tiny), named, sp_size=world))
    wrapped = build(tiny)
    for block in wrapped.blocks:
        block.attn.qkv = type("Adapted", (nn.Linear,), {})(48, 144)
    tried("adapted", lambda: opendit.accelerate(wrapped, {"sequence_parallel": "fastseq"}, sp_size=world))
    opendit.accelerate(wrapped, {"attention": "sdpa-math"}, sp_size=world)
    text = io.StringIO()
    opendit.explain(wrapped, file=text)
    assert "ulysses (chosen by auto)" in text.getvalue()
    mixing = build(tiny)
    for block in mixing.blocks:
        block.mlp.register_module("mixer", nn.Conv1d(48, 48, 3))
        block.mlp.forward = lambda x: x - x.mean(1, keepdim=True)
    tried("mlp", lambda: opendit.accelerate(mixing, sp_size=world))
    model = spread(build(tiny, torch.float64), "fastseq", world)
    tried("part", lambda: model.blocks[1](torch.randn(1, 977, 48).double(), torch.randn(1, 48).double()))
    model.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    args, kwargs = tiny.inputs(torch.float64, torch.device("cpu"))
    tried("hook", lambda: model(*args, **kwargs))
    model.blocks[0].attn.attn_drop.p = 0.5
    tried("dropout", lambda: model.train()(*args, **kwargs))
    assert all("upstream's own" not in note for _, note in notes(model))
    return said
