"""A training step of DiT on each engine, against DDP and FSDP2 with torch.compile written by hand.

    torchrun --nproc-per-node=2 benchmarks/engines.py                    # DiT-XL/2, 256 px, 64 samples per GPU
    torchrun --nproc-per-node=2 benchmarks/engines.py --batch 128 --variants "ddp by hand" ddp zero2
    torchrun --nproc-per-node=2 benchmarks/engines.py --variants ddp "ddp skipping" "zero2 ema saving"
    python benchmarks/engines.py --cap-gib 8 --batch 8 --variants ddp gemini   # what fits into 8 GiB of one GPU
    python benchmarks/engines.py --smoke                                 # a tiny model on the CPU: does the script work

    ddp by hand     torch.compile of the whole model, in DDP with gradients in its buckets
    fsdp2 by hand   each block compiled, then fully_shard per block: bf16 gathers, fp32 reduction
    the plugins     opendit.accelerate(model, {recipe "train", plugin}, optimizer=...); then, in any order:
    ungraphed       with cuda_graphs=False, as FSDP2's always are
    skipping        with skip_nonfinite=True
    ema             with ema=0.9999, which skips too
    saving          as it is; then, how long a save in the background holds training up (background_save.py)

Everywhere bf16 autocast over fp32 parameters, and fused AdamW. Step i of process r draws the same batch whatever
the variant, so first losses must agree to bf16's rounding, or there is no figure. A cap is torch's own limit on what a
process may allocate on its GPU; what goes beyond it is out of memory, as on a smaller card. `update_ms` is
`optimizer.step()` alone, with what it does besides. Process 0 writes the JSON, after each row.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

import opendit
from benchmarks.background_save import save_twice
from benchmarks.common import RESULTS, agreed, time_events, time_steps, write_results
from benchmarks.training import EMA_DECAY, LEARNING_RATE, clean_up, make_model
from examples.diffusion.gaussian import GaussianDiffusion
from examples.models.dit import DIT_MODELS, DiT
from opendit.attached import attached
from opendit.config import _RECIPES
from opendit.fastseq.mesh import ensure_world
from opendit.wrapping import unwrap

BY_HAND = ("ddp by hand", "fsdp2 by hand")
PLUGINS = ("ddp", "zero1", "zero2", "zero3", "gemini")
MORE: dict[str, dict[str, Any]] = {
    "ungraphed": {"cuda_graphs": False},
    "skipping": {"skip_nonfinite": True},
    "ema": {"ema": EMA_DECAY},
    "saving": {},
}
# How far a first loss may be from the first variant's: an order above what bf16 rounding gave on one GPU.
AGREE = 5e-3


def main() -> int:
    args = parse()
    ensure_world(torch.device("cpu" if args.smoke else "cuda"), "benchmark: got several", alone=True)
    device = torch.device("cpu") if args.smoke else torch.device("cuda", torch.cuda.current_device())
    if args.cap_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(args.cap_gib / total, 1.0))
    first = dist.get_rank() == 0
    rows: list[dict[str, Any]] = []
    path = None
    for name in args.variants or (*BY_HAND, *PLUGINS):
        row = {"variant": name, "model": args.model, "image_size": args.image_size, "batch": args.batch}
        row |= {"processes": dist.get_world_size(), "cap_gib": args.cap_gib}
        try:
            row |= measure(name, args, device)
            row |= agreement(row["losses"], next((r["losses"] for r in rows if "losses" in r), row["losses"]))
        except Exception as error:  # where only some processes fail, the collectives' time-out ends the run
            row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        rows.append(row)
        clean_up()
        if first:
            print(line(row), flush=True)
            if not args.smoke:
                slug = args.model.lower().replace("/", "-")
                path = write_results(f"engines_{slug}_{args.image_size}px", rows, args.out, path)
    if first:
        print(f"written to {path}" if path else "smoke: nothing written")
    dist.barrier()
    dist.destroy_process_group()
    return int(any("error" in row for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=list(DIT_MODELS))
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="samples per process; default 64")
    parser.add_argument("--micro-batches", type=int, default=1, help="per step, all but the last in no_sync")
    parser.add_argument(
        "--precision", default="inherit", help='what the plugins are given; "inherit" is autocast alone'
    )
    parser.add_argument("--cap-gib", type=float, help="GPU memory that each process may allocate; default: all")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps per sample")
    allowed = f"{', '.join((*BY_HAND, *PLUGINS))}; a plugin and any of {', '.join(MORE)}"
    parser.add_argument("--variants", nargs="+", type=variant, metavar="V", help=f"of {allowed}. Default: the first 7")
    folder = Path(tempfile.gettempdir()) / f"saves_{os.getppid()}"  # alike in all processes of a torchrun
    parser.add_argument(
        "--folder", type=Path, default=folder, help="for checkpoints, made and removed; here: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, nothing written")
    args = parser.parse_args()
    if args.smoke:
        torch.set_num_threads(1)
        args.model, args.image_size, args.batch, args.samples, args.steps = "smoke", 32, 2, 1, 1
        os.environ["TRITON_INTERPRET"] = "1"
    return args


def variant(name: str) -> str:
    plugin, *more = name.split()
    if name not in BY_HAND and (plugin not in PLUGINS or not set(more) <= set(MORE)):
        raise argparse.ArgumentTypeError(f"got {name!r}")
    return name


class Training:
    """A model on an engine with its optimizer; `step(i)` trains once."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        self.batch, self.micros, self.device = args.batch, args.micro_batches, device
        # Paged models are made on the host: on the device they would not fit.
        model = make_model(args.model, args.image_size, torch.device("cpu") if name.startswith("gemini") else device)
        self.shape = (self.batch, model.in_channels, model.input_size, model.input_size)
        self.classes = model.num_classes
        self.diffusion = GaussianDiffusion().to(device)
        self.generator = torch.Generator(device)
        fused = True if device.type == "cuda" else None

        def adamw(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)

        self.model: Any
        if name in BY_HAND:
            backend = "eager" if args.smoke else "inductor"
            self.model = by_hand(name, model, backend)
            self.optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        else:
            plugin, *more = name.split()
            config = _RECIPES["train"] | {"plugin": plugin, "precision": args.precision}
            for extra in more:
                config |= MORE[extra]
            self.model, self.optimizer = opendit.accelerate(model, config, optimizer=adamw)

    def loss(self, i: int) -> Tensor:
        seed = i * dist.get_world_size() + dist.get_rank()
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # the label drops'
        options: dict[str, Any] = {"device": self.device, "generator": self.generator}
        x, noise = torch.randn(self.shape, **options), torch.randn(self.shape, **options)
        t = torch.randint(self.diffusion.steps, (self.batch,), **options)
        y = torch.randint(self.classes, (self.batch,), **options)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.diffusion.loss(self.model, x, y, t=t, noise=noise)

    def step(self, i: int) -> Tensor:
        for micro in range(self.micros):
            adding = opendit.no_sync(self.model) if micro + 1 < self.micros else _nothing()
            with adding:
                loss = self.loss(i * self.micros + micro)
                (loss / self.micros).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def update_ms(self, i: int, repeats: int) -> float:
        """Milliseconds of `optimizer.step()` alone, again and again with the gradients of step i."""
        self.loss(i).backward()
        samples = time_events(self.optimizer.step, repeats, 1)
        self.optimizer.zero_grad()
        return statistics.median(samples)

    def states_gib(self) -> dict[str, float]:
        """Of this process's parameters and optimizer states, on its GPU and on the host, and of its averages."""
        found = {"cuda": 0, "cpu": 0}
        states = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        for tensor in (*self.model.parameters(), *states):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            found[local.device.type] += local.numel() * local.element_size()
        target = unwrap(self.model)
        pieces = attached(target)["ema"].pieces(target) if "ema" in attached(target) else {}
        averages = sum(piece.values.numel() * piece.values.element_size() for piece in pieces.values())
        sizes = {"states_gib": found["cuda"], "states_on_host_gib": found["cpu"], "ema_gib": averages}
        return {key: value / 2**30 for key, value in sizes.items()}


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def by_hand(name: str, model: DiT, backend: str) -> nn.Module:
    if name == "ddp by hand":
        on_gpu = next(model.parameters()).is_cuda
        devices = [torch.cuda.current_device()] if on_gpu else None
        return DistributedDataParallel(
            torch.compile(model, backend=backend), device_ids=devices, gradient_as_bucket_view=True
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        block.compile(backend=backend)
        fully_shard(block, mp_policy=policy)
    fully_shard(model, ignored_params={p for p in model.parameters() if not p.requires_grad})
    return model


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    training = Training(name, args, device)
    losses = [training.step(i).item() for i in range(3)]
    steps = itertools.count(3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    samples = sorted(time_steps(lambda: training.step(next(steps)), args.samples, args.steps))
    ms = agreed(samples[len(samples) // 2])
    images = args.batch * args.micro_batches * dist.get_world_size()
    row: dict[str, Any] = {"ms": ms, "samples_ms": samples, "images_per_s": 1000 * images / ms, "losses": losses}
    if device.type == "cuda":
        row["peak_gib"] = agreed(torch.cuda.max_memory_allocated() / 2**30)
        row["reserved_gib"] = agreed(torch.cuda.max_memory_reserved() / 2**30)
    row |= {key: agreed(value) for key, value in training.states_gib().items()}
    row["update_ms"] = agreed(training.update_ms(next(steps), args.samples * args.steps))
    if "saving" in name.split():
        row["save"] = save_twice(args.folder, training, lambda: training.step(next(steps)), args.steps)
    return row


def agreement(losses: list[float], reference: list[float]) -> dict[str, Any]:
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
    return {"losses_apart": apart} | ({"error": f"losses are {apart:.1e} apart"} if agreed(apart) > AGREE else {})


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['variant']:16s} {row['error']}"
    memory = f", peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    return (
        f"{row['variant']:16s} {row['ms']:8.1f} ms, {row['images_per_s']:.0f} img/s{memory}, states "
        f"{row['states_gib']:.2f} + {row['states_on_host_gib']:.2f} GiB, averages {row['ema_gib']:.2f}, update "
        f"{row['update_ms']:.2f} ms, losses {row['losses_apart']:.0e} apart{saving_in_words(row)}"
    )


def saving_in_words(row: dict[str, Any]) -> str:
    if "save" not in row:
        return ""
    first, second = row["save"]["stall_s"]
    return f"; a save holds it up {first:.2f} s, the next {second:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
