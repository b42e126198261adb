"""Others' sequence parallelism beside ours, on the same inputs: two GPUs, bf16.

    torchrun --nproc-per-node=2 benchmarks/peers.py                # needs diffusers and yunchang
    torchrun --nproc-per-node=2 benchmarks/peers.py --smoke        # tiny, gloo, on the CPU; nothing is written

layers   the layer of benchmarks/sequence_parallel.py, forward and with its backward, in CUDA graphs: ours, and
           yunchang ulysses        its UlyssesAttention, with `attn_fn` set to the attention that ours uses: its own
                                   needs flash-attn. Its exchange is compared, then
models   four blocks of diffusers' WanTransformer3DModel in Wan 2.1 1.3B's widths, one forward without gradients, eager:
           one                     diffusers on one GPU
           diffusers ulysses, ring `enable_parallelism` with ContextParallelConfig, cuDNN's attention on GPUs
           opendit, opendit sp=2   `accelerate(model, sp_size=...)`

Nothing is timed that computes something else: layers as there, output and every gradient; models, where the output is
more than SLACK times as far from fp32's as `one`'s in bf16. Times are the slowest process's medians. What a package
lacks, or raises, stands in its row.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import opendit
from benchmarks.common import RESULTS, agreed, summary, synchronize, time_events, versions, write_results
from benchmarks.sequence_parallel import HEAD_DIM, HEADS, PATIENCE, Layer, in_words, layer_rows
from benchmarks.spread_models import SLACK, clean_up
from benchmarks.video import TINY, Model
from opendit.attention import attend
from opendit.fastseq import Sequence, mesh

Row = dict[str, Any]

LAYERS = ("fastseq overlapped", "ulysses", "yunchang ulysses")
MODELS = ("one", "diffusers ulysses", "diffusers ring", "opendit", "opendit sp=2")
TOKENS = (10240, 65536)


def wan(tokens: int) -> Model:
    """Four blocks; latents are cut into patches of 1 × 2 × 2."""
    frames, side = {10240: (10, 64), 65536: (16, 128)}[tokens]
    sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 4, "text_dim": 4096}
    return Model("WanTransformer3DModel", sizes, (16, frames, side, side), (512, 4096), tokens)


class PeerLayer(Layer):
    def spread(self, name: str, x: Tensor) -> Tensor:
        if not name.startswith("yunchang"):
            return super().spread(name, x)
        from yunchang import UlyssesAttention
        from yunchang.kernels import AttnType

        group = Sequence("ulysses", dist.get_world_size()).line("sp").group
        peer = UlyssesAttention(group, attn_type=AttnType.TORCH_FLASH)
        peer.attn_fn = lambda q, k, v, **_: attend(q, k, v)
        return self.proj(peer(*self.project(x)).flatten(2))


def main() -> int:
    args = parse()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    mesh.ensure_world(device, "benchmark: got several processes", timeout=PATIENCE)
    results: list[Row] = []
    path = None
    for row in rows(args, device):
        results.append(row)
        if dist.get_rank() == 0:
            print(words(row), flush=True)
            if not args.smoke:
                facts = {"processes": dist.get_world_size(), "peers": versions("diffusers", "yunchang")}
                path = write_results("peers", results, args.out, path, **facts)
    if path:
        print(f"written to {path}")
    gc.collect()
    dist.destroy_process_group()
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("layers", "models"), help="default: both")
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=list(TOKENS), metavar="L")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU too; nothing is written")
    return parser.parse_args()


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for tokens in [32] if args.smoke else args.tokens:
        if args.only in (None, "layers"):
            layer = PeerLayer(4 if args.smoke else HEADS, 8 if args.smoke else HEAD_DIM, device)
            yield from layer_rows(layer, tokens, LAYERS)
            del layer
            clean_up()
        if args.only in (None, "models"):
            yield from model_rows(TINY["wan"] if args.smoke else wan(tokens), device)


def model_rows(described: Model, device: torch.device) -> Iterator[Row]:
    truth = forward(described.build(device, torch.float32), described, torch.float32, device)
    clean_up()
    alone: dict[str, float] = {}
    for name in MODELS:
        row: Row = {"part": "model", "model": described.kind, "tokens": described.tokens, "variant": name}
        try:
            model = spread(described.build(device, torch.bfloat16), name, device)
            off = agreed(distance(forward(model, described, torch.bfloat16, device), truth))
            if name == "one":
                alone["error"] = off
            row |= {"error": off, "error_ratio": off / alone["error"] if alone else float("nan")}
            if not row["error_ratio"] <= SLACK:
                row["refused"] = f"{row['error_ratio']:.2f} times as far from fp32's as one GPU's in bf16"
            else:
                row["ms"] = timed(model, described, device)
                alone.setdefault("ms", row["ms"]["median"])  # the first is `one`, without which nothing is timed
                row["times_one"] = alone["ms"] / row["ms"]["median"]
        except Exception as error:
            row["refused"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
        model = None
        clean_up()
        yield row


def spread(model: nn.Module, name: str, device: torch.device) -> nn.Module:
    size, peer = dist.get_world_size(), model
    if name.startswith("opendit"):
        return opendit.accelerate(model, sp_size=size if "sp=" in name else 1)
    if device.type == "cuda":
        peer.set_attention_backend("_native_cudnn")
    if name.startswith("diffusers"):
        from diffusers import ContextParallelConfig

        degrees: Any = {f"{name.split()[1]}_degree": size}
        peer.enable_parallelism(config=ContextParallelConfig(**degrees))
    return model


@torch.no_grad()
def forward(model: nn.Module, described: Model, dtype: torch.dtype, device: torch.device) -> Tensor:
    out: Tensor = model(**described.inputs(device, dtype), return_dict=False)[0]
    return out.float()


@torch.no_grad()
def timed(model: nn.Module, described: Model, device: torch.device) -> dict[str, float]:
    inputs = described.inputs(device, torch.bfloat16)
    synchronize()
    dist.barrier()
    repeats, warmup = (5, 2) if device.type == "cuda" else (1, 0)
    samples = time_events(lambda: model(**inputs, return_dict=False), repeats, warmup)
    return {key: agreed(value) for key, value in summary(samples).items()}


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def words(row: Row) -> str:
    if row["part"] == "layer":
        return in_words(row)
    head = f"{row['tokens']:6} tokens  {row['model']}, {row['variant']:<18}"
    return f"{head}  {row['refused'] if 'refused' in row else _speed(row)}"


def _speed(row: Row) -> str:
    return f"{row['ms']['median']:.2f} ms, {row['times_one']:.2f}× one, {row['error_ratio']:.2f} times as far from fp32"


if __name__ == "__main__":
    sys.exit(main())
