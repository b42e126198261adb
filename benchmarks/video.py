"""Videos: training steps of Latte, and denoising steps of the shapes of Wan and CogVideoX. One GPU.

    python benchmarks/video.py                            # everything: about four minutes on an H200
    python benchmarks/video.py --only latte               # Latte-XL/2, 16 frames, 256 px, batch 8: training steps
    python benchmarks/video.py --only wan cogvideox       # one forward each, bf16, random weights, native shapes
    python benchmarks/video.py --smoke                    # tiny models on the CPU; nothing is written

    latte          forward, learned-sigma loss, backward, fused AdamW, EMA under bf16 autocast (benchmarks/training.py)
    wan            Wan 2.1 1.3B's shape: 81 frames of 480 × 832, latents [1, 16, 21, 60, 104], 512 tokens of text
    cogvideox      CogVideoX-2B's: 49 frames of 480 × 720, latents [1, 13, 16, 60, 90], 226 tokens of text

    eager          the model as it is
    torch.compile  the whole model compiled
    opendit        opendit.accelerate(model, "train", optimizer=optimizer), or accelerate(model, {"compile": True})

No speed-up is printed of what computes something else. Training: the first losses must be the first variant's, and
gradients and losses as near to fp32's as bf16 autocast's (benchmarks/parity.py). Sampling: the output of two blocks at
the full number of tokens must be as near to fp32's as eager bf16's is, times SLACK.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import opendit
from benchmarks.common import RESULTS, host_ms, synchronize, time_steps, write_results
from benchmarks.parity import SLACK, Reference
from benchmarks.train_step import check_losses, check_parity, in_words, refuse
from benchmarks.train_step import run as train
from benchmarks.training import VARIANTS, Training, Variant, clean_up, compiled, open_gates
from examples.models.latte import LATTE_MODELS, Latte
from opendit.patch import core

NAMES = ("eager", "torch.compile", "opendit")
SAMPLED = {"compile": True}  # what stands between the kernels is fused too
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model of diffusers' that is sampled from: its class, its configuration, the shapes that it is called with."""

    kind: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    text: tuple[int, int]
    tokens: int

    def build(self, device: torch.device, dtype: torch.dtype, **options: Any) -> nn.Module:
        """With random weights, always the same; what its pipelines keep in fp32 stays so."""
        import diffusers

        torch.manual_seed(0)
        with device:
            model: Any = getattr(diffusers, self.kind)(**self.config | options)
        wide = getattr(model, "_keep_in_fp32_modules", None) or []
        with torch.no_grad():
            for name, p in model.named_parameters():
                fan_in = p[0].numel() if p.dim() > 1 else 4
                p.normal_(0, max(fan_in, 1) ** -0.5)
                p.data = p.data if any(part in name for part in wide) else p.data.to(dtype)
        return model.eval()

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        make = partial(torch.randn, device=device, generator=generator)
        return {
            "hidden_states": make(1, *self.latents).to(dtype),
            "encoder_hidden_states": make(1, *self.text).to(dtype),
            "timestep": torch.tensor([500], device=device),
        }


MODELS = {
    "wan": Model(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        latents=(16, 21, 60, 104),
        text=(512, 4096),
        tokens=21 * 30 * 52,
    ),
    "cogvideox": Model(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 30, "attention_head_dim": 64, "num_layers": 30, "text_embed_dim": 4096},
        latents=(13, 16, 60, 90),
        text=(226, 4096),
        tokens=226 + 13 * 30 * 45,
    ),
}
TINY = {
    "wan": Model(
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 8},
        latents=(16, 3, 4, 6),
        text=(5, 8),
        tokens=18,
    ),
    "cogvideox": Model(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "sample_width": 6,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": 5,
        },
        latents=(3, 16, 4, 6),
        text=(5, 8),
        tokens=5 + 18,
    ),
}


def main() -> int:
    args = parse()
    device = torch.device("cpu" if args.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --smoke runs tiny models on the CPU")
    failed = False
    for what in args.only:
        rows: list[Row] = []
        path: Path | None = None
        for row in latte_rows(args, device) if what == "latte" else sampling_rows(what, args, device):
            rows.append(row)
            compare(rows)
            failed |= "error" in row and row["error"] != "out of memory"
            print(line(row), flush=True)
            if not args.smoke:  # after every row, for the next one may take the process down
                path = write_results(f"video_{what}", rows, args.out, path)
        if path is not None:
            print(f"written to {path}", flush=True)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("latte", *MODELS), default=["latte", *MODELS])
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--batch", type=int, default=8, help="Latte's, in clips")
    parser.add_argument("--loss-steps", type=int, default=5, help="training steps whose losses are compared")
    parser.add_argument("--timed-steps", type=int, default=10)
    parser.add_argument(
        "--parity", type=int, default=5, metavar="N", help="training steps compared with fp32; 0: do not"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, nothing written")
    args = parser.parse_args()
    args.steps_per_sample = 1
    if args.smoke:
        torch.set_num_threads(1)
        args.batch, args.loss_steps, args.timed_steps, args.parity = 2, 2, 2, min(args.parity, 2)
        args.variants = [v for v in args.variants if v != "torch.compile"]
    return args


# -- Latte, training ---------------------------------------------------------------------------------------------------


def make_latte(smoke: bool, device: torch.device) -> Latte:
    torch.manual_seed(0)
    with device:
        if smoke:
            model = Latte(input_size=4, hidden_size=32, depth=2, num_heads=2, num_frames=3, num_classes=10)
        else:
            model = Latte(**LATTE_MODELS["Latte-XL/2"], num_frames=16)
    open_gates(model)
    return model.train()


def latte_rows(args: argparse.Namespace, device: torch.device) -> Any:
    make = partial(make_latte, args.smoke, device)

    def build(variant: Variant) -> Training:
        return Training(make(), variant, 1)  # of one clip: 4096 tokens, whatever is slow in fp32

    reference = Reference(build, args.parity) if args.parity and "opendit" in args.variants else None
    rows: list[Row] = []
    for name in args.variants:
        row: Row = {"part": "train", "variant": name, "model": "Latte-XL/2", "batch": args.batch}
        row["booster"] = VARIANTS[name].booster
        clean_up()
        guarded(row, partial(train, VARIANTS[name], args, device, args.batch, make))
        if "images_per_s" in row:
            row["clips_per_s"] = row.pop("images_per_s")
        rows.append(row)
        check_losses(row, rows)
        if reference is not None and VARIANTS[name].booster is not None and "ms" in row:
            check_parity(row, reference, {})
        yield row


# -- Wan and CogVideoX, sampling ---------------------------------------------------------------------------------------


def sampling_rows(what: str, args: argparse.Namespace, device: torch.device) -> Any:
    model = (TINY if args.smoke else MODELS)[what]
    errors: dict[str, float] = {}
    for name in args.variants:
        row: Row = {"part": "sample", "variant": name, "model": what, "batch": 1, "tokens": model.tokens}
        row["booster"] = SAMPLED if name == "opendit" else None
        clean_up()
        guarded(row, partial(sample, model, name, args, device))
        if name == "opendit" and "ms" in row:
            errors = errors or distances(model, device)
            row["parity"] = errors
            if not errors["opendit"] <= SLACK * errors["eager"]:
                refuse(row, f"output off by {errors['opendit']:.2e}, eager bf16's by {errors['eager']:.2e}")
        yield row


def prepared(model: nn.Module, name: str, smoke: bool = False) -> Any:
    if name == "torch.compile":
        return compiled(model)
    if name == "opendit":
        opendit.accelerate(model, {} if smoke else SAMPLED)
        plan = core.plan_of(model)
        assert plan is not None
        blocks = {fqn for fqn in plan.units if "block" in fqn}
        if missing := blocks - {edit.fqn for edit in plan.edits}:
            raise RuntimeError(f"not accelerated: {sorted(missing)}; {[k for k in plan.kept if k.fqn in missing][:1]}")
    return model


def sample(model: Model, name: str, args: argparse.Namespace, device: torch.device) -> Row:
    inputs = model.inputs(device, torch.bfloat16)
    module = model.build(device, torch.bfloat16)
    call = prepared(module, name, args.smoke)

    @torch.inference_mode()
    def step() -> Tensor:
        out: Tensor = call(**inputs, return_dict=False)[0]
        return out

    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    row: Row = {"first_step_s": time.perf_counter() - start}
    samples = time_steps(step, args.timed_steps, 1)
    row |= {"ms": statistics.median(samples), "samples_ms": samples, "host_ms": min(host_ms(step, 1))}
    row["notes"] = sorted({what for _, what in core.notes(module)})
    return row | memory(device)


def distances(model: Model, device: torch.device) -> dict[str, float]:
    """Of two blocks' output at full length: the relative distance of eager bf16, and of opendit, from fp32."""

    @torch.inference_mode()
    def output(name: str, dtype: torch.dtype) -> Tensor:
        clean_up()
        call = prepared(model.build(device, dtype, num_layers=2), name, device.type == "cpu")
        out: Tensor = call(**model.inputs(device, dtype), return_dict=False)[0]
        return out.float()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    truth = output("eager", torch.float32)
    return {
        name: ((output(name, torch.bfloat16) - truth).norm() / truth.norm()).item() for name in ("eager", "opendit")
    }


# -- both --------------------------------------------------------------------------------------------------------------


def guarded(row: Row, run: Callable[[], Row]) -> None:
    """Adds what `run` found to `row`, or how it failed."""
    try:
        row |= run()
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:
        row["error"] = in_words(error)
    clean_up()


def memory(device: torch.device) -> Row:
    if device.type != "cuda":
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def compare(rows: list[Row]) -> None:
    """Every row's speed relative to eager and to torch.compile."""
    ms = {row["variant"]: row["ms"] for row in rows if "ms" in row}
    for row in rows:
        for other, key in (("eager", "ratio_to_eager"), ("torch.compile", "ratio_to_compile")):
            if "ms" in row and other in ms:
                row[key] = ms[other] / row["ms"]


def line(row: Row) -> str:
    head = f"{row['model']:11s} {row['part']:6s} {row['variant']:14s} B={row['batch']}"
    if "error" in row:
        return f"{head}  {row['error']}"
    rate = f" {row['clips_per_s']:7.2f} clips/s" if "clips_per_s" in row else ""
    used = f" {row['peak_gib']:6.1f} ({row['reserved_gib']:.1f}) GiB" if "peak_gib" in row else ""
    ratios = "".join(
        f"  {row[k]:.2f}x {k.rpartition('_')[2]}" for k in ("ratio_to_eager", "ratio_to_compile") if k in row
    )
    notes = f"  NOTE {row['notes'][0]}" if row["notes"] else ""
    return f"{head} {row['ms']:8.1f} ms{rate}{used}  first step {row['first_step_s']:5.1f} s{ratios}{notes}"


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # whose kernels.py diffusers would take for a package of that name
    sys.exit(main())
