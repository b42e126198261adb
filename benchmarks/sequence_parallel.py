"""What spreading a sequence costs and gains: one attention layer by every method, then whole models. Two GPUs or more.

    python benchmarks/sequence_parallel.py                      # torchrun with all GPUs, layers and models
    torchrun --nproc-per-node=2 benchmarks/sequence_parallel.py --only layers --tokens 10240 65536
    torchrun --nproc-per-node=2 benchmarks/sequence_parallel.py --only models --models 0 1 --what train
    python benchmarks/sequence_parallel.py --smoke              # two processes, gloo, tiny: does the script work

layers   x [1, L, D] → q, k, v → attention → output projection, each process with its part of the tokens, bf16. `floor`
         is the arithmetic alone: q, k, v of the local tokens, attention of local heads on all tokens, the projection;
         nothing moved, not even in memory. What a method takes beyond it is its exposed communication, copies
         included.
models   training steps and sampling forwards: one GPU, one sample over all (sp), a sample each (dp);
         benchmarks/spread_models.py has what they are.
timeline (by name only) which kernel runs when: benchmarks/spread_timeline.py; the first of --tokens, or 16384.
curve    the losses of 200 steps of a small DiT on one device and spread over all, on the same noise, bf16 autocast.

Nothing is timed that was not compared first, in the same run and at the same number of tokens: layers with one device's
layer, output and every gradient; models, with two blocks (or one pair), by the error ratio rule. Times are the slowest
process's medians.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, agreed, summary, synchronize, time_graph, write_results
from benchmarks.spread_models import CURVE, HEAD_DIM, HEADS, JOBS, LONG, SMOKE, WHAT, curve_rows, model_rows
from benchmarks.spread_timeline import timeline_rows
from opendit.attention import attend, blockwise
from opendit.errors import relative_errors
from opendit.fastseq import Projection, SelfAttention, Sequence, mesh, methods
from opendit.fastseq.collectives import gather_tokens, split_tokens, to_heads, to_tokens
from opendit.fastseq.method import Pair
from opendit.fastseq.shards import local_length, total_length

TOKENS = (2560, 4096, 10240, 16384, 32768, 65536)
METHODS = ("fastseq", "fastseq overlapped", "ulysses", "ulysses 4 calls", "ring")
TOLERANCE = 2e-2  # relative, a few bf16 roundings
PATIENCE = 60.0  # seconds; a process that failed alone must not hold the others for long


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
    mesh.ensure_world(device, timeout=PATIENCE)
    results: list[dict[str, Any]] = []
    failed, path = False, None
    for row in rows(args, device):
        results.append(row)
        failed |= "refused" in row
        if dist.get_rank() == 0:
            print(in_words(row), flush=True)
            if not args.smoke:  # after every row, for the next one may take the process down
                theme = "timeline" if args.only == "timeline" else "sequence_parallel"
                path = write_results(theme, results, args.out, path, processes=dist.get_world_size())
    if path:
        print(f"written to {path}")
    gc.collect()
    dist.destroy_process_group()
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbered = [f"{i}: {job.name} {job.frames or ''} {job.tokens}".replace("  ", " ") for i, job in enumerate(JOBS)]
    parser.add_argument("--only", choices=("layers", "models", "curve", "timeline"), help="default: the first three")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="L", help="of the layers")
    models = {"nargs": "+", "type": int, "default": list(range(len(JOBS))), "metavar": "I"}
    parser.add_argument("--models", **models, help=f"some of {', '.join(map(str, numbered))}; in this order")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="of the models, in this order")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU too; nothing is written")
    return parser.parse_args()


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    sizes = (4, 8) if args.smoke else (HEADS, HEAD_DIM)
    if args.only in (None, "layers"):
        for tokens in (19, 32) if args.smoke else args.tokens or TOKENS:
            yield from layer_rows(Layer(*sizes, device), tokens)
    if args.only in (None, "models"):
        yield from model_rows(SMOKE if args.smoke else [JOBS[i] for i in args.models], args.what, device)
    if args.only in (None, "curve"):
        yield from curve_rows(SMOKE[0] if args.smoke else CURVE, 4 if args.smoke else 200, device)
    if args.only == "timeline":
        yield from timeline_rows(Layer(*sizes, device), 32 if args.smoke else (args.tokens or [LONG])[0])


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


def layer_rows(layer: Layer, tokens: int, names: Iterable[str] = METHODS) -> Iterator[dict[str, Any]]:
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
    for name in names:
        row: dict[str, Any] = {"part": "layer", "method": name, "tokens": tokens, "width": width}
        try:
            out = gather_tokens(layer.spread(name, split_tokens(whole, size)), size)
            found = dict(enumerate([out.detach(), *torch.autograd.grad(out, leaves, dout)]))
        except Exception as error:  # of all processes alike, or the collectives' time-out ends the run
            yield row | {"refused": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"}
            continue
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


def in_words(row: dict[str, Any]) -> str:
    if row["part"] == "curve":
        last = statistics.fmean(row["losses"][-row["smoothed_over"] :])
        head = f"{len(row['losses'])} steps of {row['model']}, {row['variant']:9}"
        return f"{head}: ends at {last:.5f}, {row['apart']:.1e} apart"
    if row["part"] == "timeline":
        head = f"{row['tokens']} tokens  {row['method']:<18}  {row['pass']:<8}  {row['whole_us']:8.0f} µs"
        return f"{head}, on the wire {row['wire_us']:.0f}, hidden of that {row['hidden_us']:.0f}"
    if row["part"] == "layer":
        head = f"{row['tokens']:6} tokens  {row['method']:<18}"
    else:
        frames = f"{row['frames']} × " if row["frames"] else ""
        head = f"{row['model']}, {frames}{row['tokens']} tokens  {row['variant']:<27}"
    if "refused" in row:
        return f"{head}  refused: {row['refused']}"
    if row["part"] == "layer":
        return head + "".join(f"  {_layer_time(row, what)}" for what in ("forward", "both"))
    return head + "".join(f"  {what} {_model_speed(row[what])}" for what in WHAT if what in row)


def _layer_time(row: dict[str, Any], what: str) -> str:
    exposed = row.get(f"exposed_{what}")
    return f"{what} {row[what]['median']:8.3f} ms" + (f", exposed {exposed:8.3f}" if exposed is not None else "")


def _model_speed(found: dict[str, Any]) -> str:
    if "failed" in found:
        return found["failed"]
    times = f"{found['times_one']:.2f}× one" if found["times_one"] else "one has no room"
    activations = f", {found['activations_gib']:.1f} of them activations" if "activations_gib" in found else ""
    return f"{found['samples_per_s']:.2f}/s ({times}), {found['gib']:.1f} GiB{activations}"


if __name__ == "__main__":
    sys.exit(main())
