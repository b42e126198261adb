"""What spreading a sequence costs and gains: one attention layer by every method, then whole models. Two GPUs or more.

    python benchmarks/sequence_parallel.py                      # torchrun with all GPUs, layers and models
    torchrun --nproc-per-node=2 benchmarks/sequence_parallel.py --only layers --tokens 10240 65536
    python benchmarks/sequence_parallel.py --smoke              # two processes, gloo, tiny: does the script work

layers   x [1, L, D] → q, k, v → attention → output projection, each process with its part of the tokens, bf16. `floor`
         is the arithmetic alone: q, k, v of the local tokens, attention of local heads on all tokens, the projection;
         nothing moved, not even in memory. What a method takes beyond it is its exposed communication, copies
         included.
models   training steps (forward, loss, backward, DDP, AdamW) and sampling forwards under bf16 autocast: one GPU, one
         sample over all (sp), a sample each (dp).
curve    the losses of 200 steps of a small DiT on one device and spread over all, on the same noise, bf16 autocast.

Nothing is timed that was not compared first, in the same run and at the same number of tokens: layers with one device's
layer, output and every gradient; models, with two blocks (or one pair), by the error ratio rule. Times are the slowest
process's medians.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import opendit
from benchmarks.common import RESULTS, summary, synchronize, time_events, time_graph, write_results
from examples.diffusion.gaussian import GaussianDiffusion
from examples.models.dit import DiT
from opendit.attention import attend, blockwise
from opendit.errors import relative_errors
from opendit.fastseq import Projection, SelfAttention, Sequence, mesh, methods
from opendit.fastseq.collectives import gather_tokens, split_tokens, to_heads, to_tokens
from opendit.fastseq.method import Pair
from opendit.fastseq.shards import local_length, total_length
from tests.tiny_models import UserLatte

TOKENS = (2560, 4096, 10240, 16384, 32768, 65536)
HEADS, HEAD_DIM = 16, 72
METHODS = ("fastseq", "fastseq overlapped", "ulysses", "ulysses 4 calls", "ring")
TRAIN = {"activation_checkpointing": "selective", "cuda_graphs": "collectives"}  # models are dropped before the group
LONG = 16384  # tokens; fewer repeats beyond
TOLERANCE, SLACK = 2e-2, 1.2  # relative, a few bf16 roundings; the error ratio rule


@dataclass(frozen=True)
class Job:
    """A model at one size: DiT-XL/2 of L tokens, or Latte-XL/2 of F frames of L tokens."""

    name: str
    tokens: int
    frames: int = 0
    width: int = HEADS * HEAD_DIM
    heads: int = HEADS
    depth: int = 28

    def build(self, device: torch.device, depth: int | None = None) -> nn.Module:
        """On the device, whose processes draw the same weights."""
        side, depth = 2 * round(self.tokens**0.5), depth or self.depth
        torch.manual_seed(0)
        with device:
            if self.frames:
                sizes = {"dim": self.width, "heads": self.heads, "frames": self.frames, "frequencies": 256}
                model: nn.Module = UserLatte(size=side, depth=depth, classes=1000, **sizes)
            else:
                model = DiT(input_size=side, hidden_size=self.width, depth=depth, num_heads=self.heads)
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():  # behind zero gates every gradient is zero
                    p.normal_(0, 0.02)
        return model

    def batch(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator, side = torch.Generator().manual_seed(seed), 2 * round(self.tokens**0.5)
        shape = (1, *([self.frames] if self.frames else []), 4, side, side)
        x = torch.randn(shape, generator=generator)
        return x.to(device), torch.tensor([500], device=device), torch.tensor([1], device=device)


JOBS = (
    *(Job("DiT-XL/2", n) for n in (4096, 16384, 65536)),
    *(Job("Latte-XL/2", n, frames=16) for n in (256, 1024)),
)
CURVE = Job("DiT-S/2", 1024, width=384, heads=6, depth=12)
SMOKE = (Job("DiT", 16, width=32, heads=4, depth=2), Job("Latte", 4, frames=3, width=32, heads=4, depth=2))


def main() -> int:
    args = parse()
    gpus = torch.cuda.device_count()
    if gpus < 2 and not args.smoke:
        print("left out: it needs two GPUs; --smoke runs it on two processes without any")
        return 0
    if "RANK" not in os.environ:
        count = 2 if args.smoke else gpus
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        return subprocess.run([*torchrun, __file__, *sys.argv[1:]], check=False).returncode
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    mesh.ensure_world(device)
    results: list[dict[str, Any]] = []
    failed, path = False, None
    for row in rows(args, device):
        results.append(row)
        failed |= "refused" in row
        if dist.get_rank() == 0:
            print(in_words(row), flush=True)
            if not args.smoke:  # after every row, for the next one may take the process down
                path = write_results("sequence_parallel", results, args.out, path, processes=dist.get_world_size())
    if path:
        print(f"written to {path}")
    gc.collect()
    dist.destroy_process_group()
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbered = [f"{i}: {job.name} {job.frames or ''} {job.tokens}".replace("  ", " ") for i, job in enumerate(JOBS)]
    parser.add_argument("--only", choices=("layers", "models", "curve"), help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="L", help="of the layers")
    parser.add_argument("--models", nargs="+", type=int, metavar="I", help=f"some of {', '.join(map(str, numbered))}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU too; nothing is written")
    return parser.parse_args()


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    if args.only in (None, "layers"):
        for tokens in (19, 32) if args.smoke else args.tokens:
            yield from layer_rows(Layer(4 if args.smoke else HEADS, 8 if args.smoke else HEAD_DIM, device), tokens)
    if args.only in (None, "models"):
        for job in SMOKE if args.smoke else [JOBS[i] for i in args.models or range(len(JOBS))]:
            yield from model_rows(job, device)
    if args.only in (None, "curve"):
        yield from curve_rows(SMOKE[0] if args.smoke else CURVE, 4 if args.smoke else 200, device)


# -- one layer ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """DiT's attention with its projections, in bf16 on GPUs and fp32 elsewhere."""

    def __init__(self, heads: int, head_dim: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, width = heads, heads * head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.project(x)).flatten(2))

    def spread(self, name: str, x: Tensor) -> Tensor:
        """[1, l, D] → [1, l, D] by a method of `METHODS`."""
        size = dist.get_world_size()
        described = SelfAttention(
            self.heads,
            self.project,
            Projection((self.qkv.weight,), (self.qkv.bias,), None),
            lambda q, k, first: (q, k),
            attend,
            Pair(blockwise.forward, blockwise.backward),
        )
        if name == "ulysses 4 calls":
            return self.proj(four_calls(x, described, Sequence("ulysses", size)))
        method = methods()[name.split()[0]]
        sequence = Sequence(method.name, size, method.layout(size, self.heads), overlap=name.endswith("overlapped"))
        return self.proj(method.attention(x, described, sequence))


def four_calls(x: Tensor, layer: SelfAttention, sequence: Sequence) -> Tensor:
    """Ulysses as it is usually written: q, k, v and the output each in an all-to-all of its own."""
    line, local = sequence.line("sp"), x.shape[1]
    length = total_length(local, sequence.size)
    q, k, v = (to_heads((part,), line, length)[0] for part in layer.project(x))
    return to_tokens(layer.attend(q, k, v), layer.heads, line, local).flatten(2)


def layer_rows(layer: Layer, tokens: int) -> Iterator[dict[str, Any]]:
    size, weight = dist.get_world_size(), layer.qkv.weight
    torch.manual_seed(1)
    width = weight.shape[1]
    whole = torch.randn(1, tokens, width, device=weight.device, dtype=weight.dtype)
    dout = torch.randn_like(whole)
    for tensor in (whole, dout):
        dist.broadcast(tensor, 0)
    local = local_length(tokens, size)
    leaves = [whole.requires_grad_(), *layer.parameters()]
    out = layer(whole)
    expected = dict(enumerate([out.detach(), *torch.autograd.grad(out, leaves, dout)]))
    del out
    floor = timed(floor_of(layer, tokens, local), tokens)
    yield {"part": "layer", "method": "floor", "tokens": tokens, "width": width, "dtype": str(weight.dtype), **floor}
    x, dpart = (split_tokens(t.detach(), size) for t in (whole, dout))
    x.requires_grad_()
    for name in METHODS:
        row: dict[str, Any] = {"part": "layer", "method": name, "tokens": tokens, "width": width}
        out = gather_tokens(layer.spread(name, split_tokens(whole, size)), size)
        found = dict(enumerate([out.detach(), *torch.autograd.grad(out, leaves, dout)]))
        del out
        for gradient in list(found.values())[2:]:
            dist.all_reduce(gradient)
            gradient /= size
        errors = relative_errors(
            {str(i): t.double() for i, t in found.items()}, {str(i): t.double() for i, t in expected.items()}
        )
        row["error"] = worst = agreed(max(errors.values()))
        if not worst <= TOLERANCE:
            yield row | {"refused": f"off by {worst:.1e} from one device's layer"}
            continue
        inputs = [x, *layer.parameters()]

        def forward(name: str = name) -> None:
            with torch.no_grad():
                layer.spread(name, x)

        def both(name: str = name, inputs: list[Tensor] = inputs) -> None:
            torch.autograd.grad(layer.spread(name, x), inputs, dpart)

        row |= timed((forward, both), tokens)
        yield row | {f"exposed_{what}": row[what]["median"] - floor[what]["median"] for what in ("forward", "both")}


def floor_of(layer: Layer, tokens: int, local: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same arithmetic on tensors that lie where they are needed."""
    width, weight = layer.qkv.weight.shape[1], layer.qkv.weight
    heads = -(-layer.heads // dist.get_world_size())
    make = functools.partial(torch.randn, device=weight.device, dtype=weight.dtype)
    x, out = make(1, local, width).requires_grad_(), make(1, local, width).requires_grad_()
    q, k, v = (make(1, tokens, heads, width // layer.heads).requires_grad_() for _ in range(3))

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        return layer.qkv(x), attend(q, k, v), layer.proj(out)

    gradients = [torch.randn_like(part) for part in parts()]

    def forward() -> None:
        with torch.no_grad():
            parts()

    def both() -> None:
        torch.autograd.grad(parts(), [x, q, k, v, out, *layer.parameters()], gradients)

    return forward, both


def timed(calls: tuple[Callable[[], None], ...], tokens: int) -> dict[str, Any]:
    """Milliseconds of each, all processes together; the slowest's. In CUDA graphs, or a layer would time the host."""
    found = {}
    for what, call in zip(("forward", "both"), calls, strict=True):
        for _ in range(3):
            call()
        synchronize()
        dist.barrier()
        mine = summary(time_graph([call], 8) if tokens > LONG else time_graph([call] * 4, 20))
        found[what] = {key: agreed(value) for key, value in mine.items()}
    return found


def agreed(value: float) -> float:
    """The largest of all processes."""
    largest = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


# -- whole models ------------------------------------------------------------------------------------------------------


def model_rows(job: Job, device: torch.device) -> Iterator[dict[str, Any]]:
    size = dist.get_world_size()
    facts = {"part": "model", "model": job.name, "tokens": job.tokens, "frames": job.frames, "depth": job.depth}
    ratio = error_ratio(job, device)
    alone: dict[str, float] = {}
    for variant, sp, samples in (("one", 1, 1), (f"sp={size}", size, 1), (f"dp={size}", 1, size)):
        row: dict[str, Any] = {**facts, "variant": variant}
        if sp > 1:
            row["error_ratio"] = ratio
            if not ratio <= SLACK:
                yield row | {"refused": f"gradients {ratio:.2f} times as far from fp32's as one device's under bf16"}
                continue
        for what in ("train", "sample"):
            try:
                ms, memory = run(job, what, sp, samples > 1 or sp > 1, device)
            except torch.OutOfMemoryError:
                # Shapes are the same on all, and so is what they run out of.
                row[what] = {"failed": "out of memory"}
            else:
                rate = samples / ms["median"] * 1e3
                if variant == "one":
                    alone[what] = rate
                times = rate / alone[what] if what in alone else None
                row[what] = {"ms": ms, "samples_per_s": rate, "times_one": times, "gib": memory}
            gc.collect()
        yield row


def run(job: Job, what: str, sp: int, together: bool, device: torch.device) -> tuple[dict[str, float], float]:
    """(milliseconds of a step, peak GiB) of the slowest, fullest process."""
    model = job.build(device)
    model.train(what == "train")
    opendit.accelerate(model, TRAIN if what == "train" else None, sp_size=sp)
    batch = job.batch(opendit.data_parallel_rank(model) if together else 0, device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if what == "sample":

        def step() -> None:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                model(*batch)

    else:
        opendit.seed(0, model)
        trained = nn.parallel.DistributedDataParallel(model) if together else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=cuda)

        def step() -> None:
            loss_of(trained, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    synchronize()
    dist.barrier()
    first = [agreed(ms) for ms in time_events(step, 1, 2 if cuda else 0)]  # as many repeats everywhere
    samples = summary(time_events(step, min(max(round(5000 / first[0]), 3), 10) if cuda else 1, 0))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {key: agreed(value) for key, value in samples.items()}, agreed(peak)


def loss_of(model: nn.Module, batch: tuple[Tensor, ...], autocast: bool = True) -> Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=autocast):
        return (model(*batch).float() ** 2).mean()


def curve_rows(job: Job, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Losses of one device and of all together, step by step; and twice on one device, for attention's own scatter."""
    size, curves = dist.get_world_size(), []
    for variant, sp in (("one", 1), ("one again", 1), (f"sp={size}", size)):
        model = job.build(device).train()
        opendit.accelerate(model, TRAIN, sp_size=sp)
        trained = nn.parallel.DistributedDataParallel(model) if sp > 1 else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        diffusion = GaussianDiffusion().to(device)
        x, _, _ = job.batch(0, device)
        losses = torch.zeros(steps, device=device)
        for i in range(steps):
            torch.manual_seed(i)  # equal everywhere: all hold the same sample
            t, y = (torch.randint(n, (1,), device=device) for n in (diffusion.steps, 1000))
            with torch.autocast(device.type, torch.bfloat16):
                loss = diffusion.loss(trained, x, y, t=t, noise=torch.randn_like(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[i] = loss.detach()
        curves.append(losses.double().cpu())
        window = max(steps // 10, 1)
        smooth = [c.unfold(0, window, 1).mean(1) for c in (curves[0], curves[-1])]
        apart = agreed(((smooth[1] - smooth[0]).abs() / smooth[0]).max().item())
        row = {"part": "curve", "model": job.name, "tokens": job.tokens, "variant": variant, "losses": losses.tolist()}
        yield row | {"smoothed_over": window, "apart": apart}


def error_ratio(job: Job, device: torch.device) -> float:
    """Of all gradients of two blocks at this size: distance from fp32's, spread over that of one device under bf16."""
    plain = job.build(device, depth=2).eval()  # no label drops
    batch = job.batch(0, device)

    def gradients(model: nn.Module, autocast: bool, sp: int = 1) -> dict[str, Tensor]:
        loss_of(model, batch, autocast).backward()
        found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        for gradient in found.values() if sp > 1 else ():
            dist.all_reduce(gradient)
            gradient /= sp
        return found

    size = dist.get_world_size()
    spread = opendit.accelerate(copy.deepcopy(plain), TRAIN, sp_size=size)
    truth, theirs = (gradients(copy.deepcopy(plain), autocast) for autocast in (False, True))
    ours = gradients(spread, True, size)
    far = [statistics.fmean(e * e for e in relative_errors(g, truth).values()) ** 0.5 for g in (ours, theirs)]
    return agreed(far[0] / far[1])


def in_words(row: dict[str, Any]) -> str:
    if row["part"] == "curve":
        last = statistics.fmean(row["losses"][-row["smoothed_over"] :])
        head = f"{len(row['losses'])} steps of {row['model']}, {row['variant']:9}"
        return f"{head}: ends at {last:.5f}, {row['apart']:.1e} apart"
    if row["part"] == "layer":
        head = f"{row['tokens']:6} tokens  {row['method']:<18}"
    else:
        frames = f"{row['frames']} × " if row["frames"] else ""
        head = f"{row['model']}, {frames}{row['tokens']} tokens  {row['variant']:<5}"
    if "refused" in row:
        return f"{head}  refused: {row['refused']}"
    if row["part"] == "layer":
        return head + "".join(f"  {_layer_time(row, what)}" for what in ("forward", "both"))
    return head + "".join(f"  {what} {_model_speed(row[what])}" for what in ("train", "sample"))


def _layer_time(row: dict[str, Any], what: str) -> str:
    exposed = row.get(f"exposed_{what}")
    return f"{what} {row[what]['median']:8.3f} ms" + (f", exposed {exposed:8.3f}" if exposed is not None else "")


def _model_speed(found: dict[str, Any]) -> str:
    if "failed" in found:
        return found["failed"]
    times = f"{found['times_one']:.2f}× one" if found["times_one"] else "one has no room"
    return f"{found['samples_per_s']:.2f}/s ({times}), {found['gib']:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
