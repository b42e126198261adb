"""Cases for `test_behaviour`: what a model on an engine does besides training right."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import opendit
from opendit.engines import Setup, engines
from tests.comparing import build, run, worst
from tests.engines.training import PLUGINS, adamw, case, named, on, tiny_of, twin, whole
from tests.tiny_models import Tiny

DIVIDING = tuple(p for p in PLUGINS if p != "ddp")


def cases(world: int) -> dict[str, Any]:
    if world == 4:
        found: dict[str, Any] = {f"nodes/{p}": functools.partial(nodes, p) for p in ("zero3",)}
        return found | {"uneven nodes": uneven_nodes}
    found = {f"checkpointing/{p}/{kind}": functools.partial(checkpointing, p, kind) for p, kind in CHECKPOINTED}
    found |= {f"whole blocks/{p}/{kind}": functools.partial(whole_blocks, p, kind) for p, kind in WHOLE}
    found |= {f"compiled blocks/{p}": functools.partial(compiled, p) for p in ("ddp", "zero3")}
    found |= {f"bf16 reduction/{p}": functools.partial(bf16_reduction, p) for p in ("zero1", "gemini")}
    found |= {f"state/{p}": functools.partial(state_from_before, p) for p in ("ddp", "zero2", "gemini")}
    for plugin in PLUGINS:
        found[f"explain/{plugin}"] = functools.partial(explained, plugin)
    for plugin in DIVIDING:
        found[f"inference/{plugin}"] = functools.partial(inference, plugin)
        found[f"written between/{plugin}"] = functools.partial(written_between, plugin)
        found[f"bf16 gathers/{plugin}"] = functools.partial(bf16_gathers, plugin)
        found[f"no restore/{plugin}"] = functools.partial(no_restore, plugin)
    found["restore"] = restored
    found["different seeds"] = different_seeds
    found["refusals"] = refusals
    for name in ("lists of lists", "diffusers"):
        found[f"generic/{name}"] = functools.partial(generic, name)
    found["no_sync"] = what_no_sync_spares
    found["names"] = names_and_places
    return found


WHOLE = [("ddp", "full"), ("zero3", "selective"), ("gemini", "full")]
CHECKPOINTED = [
    ("ddp", "full"),
    ("zero2", "selective"),
    ("zero3", "full"),
    ("gemini", "full"),
]


def checkpointing(plugin: str, kind: str) -> dict[str, Any]:
    return case(plugin, "dit", 2 if kind == "full" else 1, activation_checkpointing=kind)


class ListsOfLists(nn.Module):
    """Layers as pairs in a list, which nobody calls: the layout of many transformers."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ([nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2)] for _ in range(3))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in self.layers:
            x = x + first(x)
            x = x + second(x)
        return x


def generic(name: str) -> tuple[float, str]:
    """A model that nobody describes, in parts: the worst error, and what is said of it."""
    lists = Tiny(
        name, "generic", ListsOfLists, lambda dtype, _: ((torch.arange(36, dtype=dtype).view(2, 3, 6).sin(),), {})
    )
    tiny, plain = (lists, build(lists, torch.float64)) if name == "lists of lists" else tiny_of(name)
    model = opendit.accelerate(twin(plain), {"plugin": "zero3"}, family="generic")
    found = run(model, tiny)
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    text = io.StringIO()
    opendit.explain(model, file=text)
    rest = {key: value for key, value in found.items() if key in ("output", "input")}
    return worst({**rest, **whole}, run(plain, tiny))[0], text.getvalue()


def whole_blocks(plugin: str, keep: str) -> tuple[int, dict[str, Any]]:
    """Blocks as one function each: how many ran so, and errors. Plain torch stands for the kernels."""
    import pytest

    from opendit.patch import adaln, block
    from tests.patch.plain_kernels import use_plain_kernels

    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        use_plain_kernels(patch, block)
        patch.setattr(adaln, "resolve", lambda *_: "triton")  # which compute in fp64 here
        original = adaln.adaln_block
        patch.setattr(adaln, "adaln_block", lambda *args: ran.append(keep) or original(*args))
        config = {"kernels": "auto", "fusion": "block", "attention": "sdpa-flash", "activation_checkpointing": keep}
        errors = case(plugin, "dit", 1, **config)
    return len(ran), errors


def _mean_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Output, and gradients averaged over the world, of inputs that all processes have; as `run` gives them."""
    model.train().zero_grad()
    tiny = tiny_of(name)[0]
    args, kwargs = tiny.inputs(torch.float64, torch.device("cpu"))
    torch.manual_seed(7)
    out = tiny.output(model(*args, **kwargs))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    (out * weights).sum().backward()
    return {"output": whole(out), **{n: whole(p.grad) for n, p in named(model).items() if p.grad is not None}}


def _expected(name: str) -> dict[str, torch.Tensor]:
    found = run(twin(tiny_of(name)[1]), tiny_of(name)[0])
    return {n: value for n, value in found.items() if n != "input"}


def compiled(plugin: str) -> tuple[float, str]:
    """Blocks compiled each on its own; Dynamo without a code generator, which a CPU test can wait for."""
    model, *_ = on(plugin, "dit", 1, compile=True)
    for block in getattr(model, "module", model).blocks:
        assert block._compiled_call_impl is not None
        block.compile(backend="aot_eager")
    return worst(_mean_of(model, "dit"), _expected("dit"))


def bf16_reduction(plugin: str) -> float:
    model, *_ = on(plugin, "dit", 1, reduction="bf16")
    found, expected = _mean_of(model, "dit"), _expected("dit")
    return max(((found[n] - e).norm() / e.norm()).item() for n, e in expected.items())


def state_from_before(plugin: str) -> tuple[float, float]:
    """An optimizer that has stepped: (largest error of moments after placing, of parameters a step later)."""
    tiny, plain = tiny_of("dit")
    alone, model = twin(plain), twin(plain)
    pairs = []
    for m in (alone, model):
        optimizer, _ = adamw(m)
        run(m, tiny)
        optimizer.step()
        pairs.append(optimizer)
    model, optimizer = opendit.accelerate(model, {"plugin": plugin, "kernels": "reference"}, optimizer=pairs[1])
    found, expected = named(model), named(alone)
    moments = 0.0
    for name, p in expected.items():
        for key, value in pairs[0].state.get(p, {}).items():
            moments = max(moments, (whole(optimizer.state[found[name]][key]) - value).abs().max().item())
    _mean_of(model, "dit")
    run(alone, tiny)
    optimizer.step()
    pairs[0].step()
    return moments, worst({n: whole(p) for n, p in found.items()}, {n: whole(p) for n, p in expected.items()})[0]


def explained(plugin: str) -> dict[str, str]:
    before, after = io.StringIO(), io.StringIO()
    cfg = {"plugin": plugin, "cuda_graphs": True}
    opendit.explain(twin(tiny_of("dit")[1]), cfg, file=before)
    opendit.explain(on(plugin, "dit", 1, cuda_graphs=True)[0], file=after)
    return {"before": before.getvalue(), "after": after.getvalue()}


def inference(plugin: str) -> dict[str, Any]:
    """Errors of outputs without gradients, and of training with such calls between backward and step."""
    tiny, plain = tiny_of("dit")
    args, _ = tiny.inputs(torch.float64, torch.device("cpu"))
    pair = (torch.cat([args[0][:1]] * 2), args[1][:2], args[2][:2])

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        model.eval()
        with torch.no_grad():
            found = [model(*args), model.forward_with_cfg(*pair, 3.0)]
        with torch.inference_mode():
            found.append(model(*args))
        model.train()
        return found

    model, *_ = on(plugin, "dit", 1)
    errors = [(a - b).abs().max().item() for a, b in zip(outputs(model), outputs(twin(plain)), strict=True)]
    gathered = float(_gathered(model))
    if plugin in ("zero2", "gemini"):
        return {"outputs": max(errors), "gathered": gathered, "trained": case(plugin, "dit", 1, mid_step=outputs)}
    return {"outputs": max(errors), "gathered": gathered}


def _gathered(model: nn.Module) -> int:
    """How many parameters are whole that should be divided."""
    return sum(p.requires_grad and not hasattr(p, "placements") for p in model.parameters())


def written_between(plugin: str) -> float:
    """Error of outputs after parameters are written in place between two forwards, as loading and EMA do."""
    tiny, plain = tiny_of("dit")
    args, _ = tiny.inputs(torch.float64, torch.device("cpu"))
    model, reference = on(plugin, "dit", 1)[0].eval(), twin(plain).eval()
    held = [*model.parameters(), *reference.parameters()]
    with torch.no_grad():
        model(*args)
        for p in held:
            p.mul_(1.25)
        expected = reference(*args)
        return ((model(*args) - expected).norm() / expected.norm()).item()


def bf16_gathers(plugin: str) -> tuple[float, bool]:
    """(difference of outputs under autocast to a model without an engine, whether blocks were gathered in bf16)."""
    plain = twin(tiny_of("dit")[1]).float()
    args, _ = tiny_of("dit")[0].inputs(torch.float32, torch.device("cpu"))
    reference = opendit.accelerate(twin(plain), {"kernels": "reference"}).eval()
    model = opendit.accelerate(twin(plain), {"kernels": "reference"}).eval()
    units = tuple(f"blocks.{i}" for i in range(len(plain.blocks)))
    setup = Setup(plugin, "bf16", "fp32", 1, units, (), torch.device("cpu"))
    engines()["torch", plugin].place(model, None, setup)
    seen: list[torch.dtype] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda m, _: seen.append(m.qkv.weight.dtype))
    # The comparison is of bits: the hook sends both models' attention the same way.
    reference.blocks[0].attn.register_forward_pre_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(*args), reference(*args)
    return (found - expected).abs().max().item(), seen == [torch.bfloat16]


def no_restore(plugin: str) -> str:
    try:
        opendit.restore(on(plugin, "dit", 1)[0])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def restored() -> bool:
    """DDP: the plain model, bit for bit, whose gradients are its own again."""
    tiny, plain = tiny_of("dit")
    model, *_ = on("ddp", "dit", 1)
    inner = model.module
    back = opendit.restore(model)
    del model
    assert back is inner
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    found, expected = run(back, tiny), run(twin(plain), tiny)
    return all(torch.equal(found[n], e) for n, e in expected.items())


def different_seeds() -> list[tuple[float, str]]:
    """Parameters that processes made differently are process 0's everywhere."""
    errors = []
    for plugin in PLUGINS:
        model = twin(tiny_of("dit")[1])
        if dist.get_rank():
            for p in model.parameters():
                p.data.normal_()
        model = opendit.accelerate(model, {"plugin": plugin, "kernels": "reference"})
        errors.append(worst(_mean_of(model, "dit"), _expected("dit")))
    return errors


@contextlib.contextmanager
def _on_a_node(size: int, local_rank: int) -> Any:
    before = dict(os.environ)
    os.environ.update(LOCAL_WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    yield
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name)
        if name in before:
            os.environ[name] = before[name]


def nodes(plugin: str) -> tuple[str, dict[str, Any]]:
    """Two nodes of two processes: how a weight is divided, and how it trains."""
    with _on_a_node(2, dist.get_rank() % 2):
        model, *_ = on(plugin, "dit", 1)
        return str(model.blocks[0].attn.qkv.weight.placements), case(plugin, "dit", 1)


def uneven_nodes() -> str:
    """Three processes on one node, one on another."""
    rank = dist.get_rank()
    text = io.StringIO()
    with _on_a_node(3 if rank < 3 else 1, rank % 3):
        opendit.explain(on("zero3", "dit", 1)[0], file=text)
    return text.getvalue()


def what_no_sync_spares() -> dict[str, dict[str, int]]:
    """Of plugins that divide: reductions in a backward inside `no_sync` and in one outside, gathers in a forward."""
    from torch.profiler import ProfilerActivity, profile

    found = {"ddp": _ddp_in_no_sync()}
    for plugin in DIVIDING:
        model, *_ = on(plugin, "dit", 1)
        _mean_of(model, "dit")
        tiny = tiny_of("dit")[0]
        args, _kwargs = tiny.inputs(torch.float64, torch.device("cpu"))
        with opendit.no_sync(model):
            loss = model(*args).sum()
            with profile(activities=[ProfilerActivity.CPU]) as inside:
                loss.backward()
            with profile(activities=[ProfilerActivity.CPU]) as forward:
                loss = model(*args).sum()
        with profile(activities=[ProfilerActivity.CPU]) as outside:
            loss.backward()
        found[plugin] = {
            "inside": _count(inside, "reduce"),
            "outside": _count(outside, "reduce"),
            "gathers": _count(forward, "gather"),
        }
    return found


def _ddp_in_no_sync() -> dict[str, int]:
    """How many parameters have another gradient on other processes, whose inputs are others."""
    model, *_ = on("ddp", "dit", 1)
    args, _ = tiny_of("dit")[0].inputs(torch.float64, torch.device("cpu"))
    found = {}
    for where, context in (("inside", opendit.no_sync(model)), ("outside", contextlib.nullcontext())):
        model.zero_grad()
        with context:
            model(args[0] + dist.get_rank(), *args[1:]).sum().backward()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {n: p.grad for n, p in named(model).items() if p.grad is not None})
        found[where] = sum(not torch.equal(grad, everyone[1][n]) for n, grad in everyone[0].items())
    return found


def _count(profiled: Any, word: str) -> int:
    names = [event.key.lower() for event in profiled.key_averages() for _ in range(event.count)]
    return sum(name.startswith("gloo:") and word in name for name in names)


def names_and_places() -> dict[str, Any]:
    """Whether keys stay, which parameters are whole, whether they are unchanged; the part of others that is here."""
    keys = list(tiny_of("dit")[1].state_dict())
    frozen = tiny_of("dit")[1].pos_embed
    found: dict[str, Any] = {}
    for plugin in DIVIDING:
        model, *_ = on(plugin, "dit", 1)
        left = [n for n, p in model.named_parameters() if not hasattr(p, "placements")]
        divided = [p for p in model.parameters() if hasattr(p, "placements")]
        part = sum(p.to_local().numel() for p in divided) / sum(p.numel() for p in divided)
        found[plugin] = (list(model.state_dict()) == keys, left, torch.equal(model.pos_embed, frozen), part)
    return found


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was raised"


def refusals() -> dict[str, str]:
    """What is said to requests that can't be right, and that nothing was changed by them."""
    plain = tiny_of("dit")[1]
    said: dict[str, str] = {}

    def refused(
        what: str, model: nn.Module, plugin: str = "zero3", optimizer: Any = None, wrap: Any = None, **more: Any
    ) -> None:
        kinds = [type(m) for m in model.modules()]
        given = wrap(model) if wrap is not None else model
        said[what] = _said(lambda: opendit.accelerate(given, {"plugin": plugin, **more}, optimizer=optimizer))
        assert [type(m) for m in model.modules()] == kinds

    refused("wrapped", twin(plain), wrap=nn.parallel.DistributedDataParallel)
    refused("compiled", twin(plain), wrap=torch.compile)
    tied = twin(plain)
    tied.blocks[1].attn.proj.weight = tied.blocks[0].attn.proj.weight
    refused("tied", tied)
    refused("bf16", twin(plain), plugin="ddp", reduction="bf16")
    refused("frozen", twin(plain).requires_grad_(False))
    refused("frozen ddp", twin(plain).requires_grad_(False), plugin="ddp")
    model = twin(plain)
    others = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)
    refused("others", model, optimizer=others)
    model = twin(plain)
    stepped = torch.optim.Adafactor(model.parameters())
    run(model, tiny_of("dit")[0])
    stepped.step()
    refused("state", model, optimizer=stepped)
    model = twin(plain)
    keeping = torch.optim.SGD(model.parameters(), lr=0.1)
    keeping.by_name = dict(model.named_parameters())
    refused("kept elsewhere", model, optimizer=keeping)
    said["again"] = _said(lambda: opendit.accelerate(on("zero3", "dit", 1)[0]))
    from torch.distributed.fsdp import fully_shard

    by_hand = twin(plain)
    fully_shard(by_hand)
    said["by hand"] = _said(lambda: opendit.no_sync(by_hand))
    wrapper = on("ddp", "dit", 1)[0]
    inner = wrapper.module
    del wrapper
    said["dropped"] = _said(lambda: opendit.no_sync(inner))
    return said
