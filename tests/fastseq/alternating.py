"""Cases for `test_alternating`: videos whose frames and tokens don't divide, blocks left to upstream, and mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opendit
from opendit.fastseq import ops, switch
from opendit.fastseq.collectives import gather_tokens
from opendit.fastseq.shards import local_length
from opendit.patch import block as block_file
from tests.comparing import Results, build, run, twin, worst
from tests.fastseq import parity
from tests.fastseq.whole_models import sizes
from tests.patch.plain_kernels import use_plain_kernels
from tests.tiny_models import TINY, Tiny, UserLatte, UserLatteIMG, _latte_img_inputs, _latte_inputs

LATTE = next(t for t in TINY if t.name == "latte")
# (frames, side of a frame in patches, samples): more frames than processes and fewer, tokens likewise, one of each.
VIDEOS = ((5, 3, 2), (3, 2, 1), (1, 5, 1), (7, 1, 2), (1, 1, 1))
FRAMES, TOKENS = range(1, 18), range(1, 66)
NAMED = [(5, 17), (3, 17), (3, 4), (1, 1), (17, 3)]


def cases(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sp in sizes(world):
        for video in VIDEOS:
            found[f"video/{sp}/{video}"] = functools.partial(_video, sp, world, video)
        found[f"rows/{sp}"] = functools.partial(_rows, sp, 40)
    found["images"] = functools.partial(_images, world)
    found["no images"] = functools.partial(_of, Tiny("", "latte", UserLatteIMG, _latte_inputs(2)), world, world)
    found |= {f"in place/{batch}": functools.partial(_in_place, world, batch) for batch in (1, 2)}
    flash = dataclasses.replace(LATTE, build=lambda: UserLatte(attention_mode="flash"))
    found["flash"] = functools.partial(_of, flash, world, world)
    found["whole blocks"] = functools.partial(_whole_blocks, world)
    if world == 4:
        found |= {f"mutant/{name}": functools.partial(_mutant, mistake) for name, mistake in MUTANTS.items()}
    return found


def every_shape(world: int) -> dict[str, Any]:
    return {f"rows/{sp}": functools.partial(_rows, sp, None) for sp in sizes(world)}


def _of(tiny: Tiny, sp: int, world: int, config: Any = None) -> tuple[float, float, str]:
    plain = build(tiny, torch.float64)
    plain.temp_embed.requires_grad_()
    model = opendit.accelerate(twin(plain), config or {"kernels": "reference"}, sp_size=sp)
    return parity.errors(parity.together(model, tiny, 1), parity.alone(plain, tiny, world // sp, 1))


def _video(sp: int, world: int, video: tuple[int, int, int]) -> tuple[float, float, str]:
    return _of(of_size(*video), sp, world)


def of_size(frames: int, side: int, batch: int, depth: int = 2) -> Tiny:
    inputs = _latte_inputs(2, 2 * side, frames, batch=batch)
    return Tiny("", "latte", lambda: UserLatte(size=2 * side, frames=frames, depth=depth), inputs)


def _images(world: int) -> tuple[float, float, str]:
    """Four images to three frames: most frames that a process has are not the video's."""
    tiny = Tiny("", "latte", lambda: UserLatteIMG(classes=9), functools.partial(_latte_img_inputs, images=4))
    return _of(tiny, world, world)


class InPlaceLatte(UserLatte):
    """Writes into what blocks return, as models may."""

    def block(self, i, x, c):
        return super().block(i, x, c).mul_(1.5)


def _in_place(world: int, batch: int) -> tuple[float, float, str]:
    tiny = Tiny("", "latte", lambda: InPlaceLatte(depth=4), _latte_inputs(2, batch=batch))
    return _of(tiny, world, world)


def _whole_blocks(world: int) -> float:
    """Blocks as one function each, in fp32, with plain kernels: rows are whole, so nothing is in the way of it."""
    plain = build(LATTE)
    whole = {"fusion": "block", "kernels": "triton", "attention": "sdpa-flash", "activation_checkpointing": "selective"}
    calls: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        use_plain_kernels(patch, block_file)
        original = opendit.patch.adaln.adaln_block
        patch.setattr(opendit.patch.adaln, "adaln_block", lambda *args: calls.append(None) or original(*args))
        found = run(opendit.accelerate(twin(plain), whole, sp_size=world), LATTE)
    assert len(calls) == len(plain.blocks)
    return worst(_averaged(found), run(plain, LATTE))[0]


def _averaged(found: Results) -> Results:
    for name, value in found.items():
        if name not in ("output", "input"):
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return found


def _rows(sp: int, times: int | None) -> tuple[int, float, str]:
    """Any number of frames and tokens: mixing within frames, within tokens, and within frames again."""
    pairs = [(f, t) for f in FRAMES for t in TOKENS]
    if times is not None:
        pairs = NAMED + random.Random(sp).sample(pairs, times - len(NAMED))
    largest, where = 0.0, ""
    for i, (frames, tokens) in enumerate(pairs):
        error = _mixed(sp, frames, tokens, 1 + i % 2)
        if not error <= largest:
            largest, where = error, f"{frames} frames, {tokens} tokens, {1 + i % 2} samples"
    return len(pairs), largest, where


def _mix(x: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """A block of sorts: every token of a row sees the others, and the row's condition."""
    return x + torch.tanh(x.mean(1, keepdim=True) @ w + c[:, None]) * x.roll(1, 1)


def _mixed(sp: int, frames: int, tokens: int, batch: int) -> float:
    torch.manual_seed(frames * 100 + tokens)
    x = torch.randn(batch * frames, tokens, 3, dtype=torch.float64, requires_grad=True)
    c, d = (torch.randn(batch * n, 3, dtype=torch.float64, requires_grad=True) for n in (frames, tokens))
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(x.shape, dtype=torch.float64)

    def crossed(x: Tensor) -> Tensor:
        return x.view(batch, -1, *x.shape[1:]).transpose(1, 2).reshape(-1, len(x) // batch, 3)

    out = _mix(x, c, w)
    out = crossed(_mix(crossed(out), d, w))
    out = _mix(out, c, w)
    expected = [out, *torch.autograd.grad((out * weights).sum(), (x, c, d, w))]

    local_length(tokens, sp)
    mine = switch.frames_of(c, sp)
    out = switch.to_tokens(_mix(switch.mine_of(x, sp), mine, w), len(x), sp)
    out = crossed(_mix(crossed(out), switch.tokens_of(d, tokens, sp), w))
    out = switch.to_tokens(_mix(switch.to_frames(out, tokens, sp), mine, w), len(x), sp)
    out = gather_tokens(out, sp)
    actual = [out, *torch.autograd.grad((out * weights).sum(), (x, c, d, w))]
    for grad in actual[2:]:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


# -- mistakes, two processes to a sample and two samples' shares -------------------------------------------------------


@contextlib.contextmanager
def planted(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrong)
        yield


def _scaled() -> Any:
    original = switch._Mine.backward
    return planted(switch._Mine, "backward", staticmethod(lambda ctx, grad: (original(ctx, grad)[0] * 2, None)))


def _another_group() -> Any:
    return planted(ops.Line, "group", property(lambda line: ops.groups(line.sp, line.ring).dp))


def _others_tokens() -> Any:
    """Each sample is given another's conditions."""
    original = switch.tokens_of

    def wrong(c: Tensor, tokens: int, sp: int) -> Tensor:
        return original(c.view(-1, tokens, c.shape[-1]).flip(0).flatten(0, 1), tokens, sp)

    return planted(switch, "tokens_of", wrong)


def _first_frames_conditions() -> Any:
    return planted(switch, "frames_of", lambda c, sp: c[: len(c) // sp])


def _frames_swapped() -> Any:
    original = switch._frames_first
    return planted(switch, "_frames_first", lambda x, T, line: original(x, T, line).flip(0))


def _not_sent_back() -> Any:
    original = switch._ToFrames.backward
    return planted(switch._ToFrames, "backward", staticmethod(lambda ctx, dx: (original(ctx, dx)[0] * 0.5, None, None)))


MUTANTS: dict[str, Callable[[], Any]] = {
    "first gradient scaled": _scaled,
    "another group": _another_group,
    "conditions of another sample's tokens": _others_tokens,
    "conditions of the first frames": _first_frames_conditions,
    "frames in another order": _frames_swapped,
    "gradient of a switch halved": _not_sent_back,
}


def _mutant(mistake: Callable[[], Any]) -> float:
    tiny = of_size(4, 2, 2, depth=4)
    plain: nn.Module = build(tiny, torch.float64)
    model = opendit.accelerate(twin(plain), {"kernels": "reference"}, sp_size=2)
    with mistake():
        return parity.errors(parity.together(model, tiny, 1), parity.alone(plain, tiny, 2, 1))[1]
