"""The command line of the training and sampling scripts, and what it asks opendit for.

Every flag may be written with `_` or `-`, and may stand in a YAML file instead, under its first name without the dashes
(`--config settings.yaml`); what is on the command line as well goes before the file. What is unknown, out of range or
contradictory stops with one line before any data or model is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import opendit
from examples.common import OneLineParser, named_path, positive_float, positive_int, share, whole_number
from examples.diffusion import OBJECTIVES, SAMPLERS
from examples.models.registry import MODELS

SWITCH = ("auto", "on", "off")
METHODS = ("auto", "fastseq", "ulysses", "ring", "usp")
PLUGINS = ("auto", "ddp", "zero1", "zero2", "zero3", "gemini")
# The checkpoints that come with the project; image/sample.py takes the first that is there where none is named.
SHIPPED = tuple(Path(__file__).parent / "checkpoints" / name for name in ("cifar10", "digits"))
# opendit's kernels by what they do; one that does both is in use only where neither flag is off.
MODULATES = ("gate_residual", "gate_residual_layernorm_modulate", "layernorm_modulate")
NORMALISES = ("gate_residual_layernorm_modulate", "layernorm_modulate")


def adder(group: Any):
    """`add_argument` that knows each flag by both spellings."""

    def add(*names: str, **options: Any) -> None:
        spelled = [*names, *(n.replace("_", "-") for n in names), *("--" + n[2:].replace("-", "_") for n in names)]
        options.setdefault("dest", names[0].lstrip("-").replace("-", "_"))
        group.add_argument(*dict.fromkeys(spelled), **options)

    return add


def add_opendit_options(parser: OneLineParser) -> None:
    add = adder(parser.add_argument_group("opendit"))
    add("--enable_modulate_kernel", choices=SWITCH, nargs="?", const="on", default="auto",
        help="kernels that scale, shift or gate: auto: where they run, on: must run, off: PyTorch")  # fmt: skip
    add("--enable_layernorm_kernel", choices=SWITCH, nargs="?", const="on", default="auto",
        help="likewise kernels that normalise; those that also modulate need both")  # fmt: skip
    add("--enable_flashattn", choices=SWITCH, nargs="?", const="on", default="auto",
        help="auto: the fastest attention, on: a flash kernel must run, off: PyTorch's matrix of weights")  # fmt: skip
    add("--kernels", default="auto", help="of all kernels: auto, triton or reference")
    add("--attention", default="auto", help="auto, or the name of a backend of opendit.attention")
    add("--sequence_parallel_size", type=positive_int, default=1, help="processes that share a sequence")
    add("--sequence_parallel_type", choices=METHODS, help="how they share it (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile of each block, by opendit (default: no)")  # fmt: skip
    add("--no_accelerate", action="store_true", help="leave opendit out: plain PyTorch, not compiled")
    add("--explain", action="store_true", help="print what opendit changed in the model, and why")


def add_device_options(parser: OneLineParser) -> None:
    add = adder(parser)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--mixed_precision", "--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 on GPUs, fp32 on CPUs")  # fmt: skip
    add("--global_seed", "--seed", type=partial(whole_number, limit=2**63 - 1), default=0)


def parse(parser: OneLineParser) -> argparse.Namespace:
    """The settings, from the YAML file that --config names and from the command line."""
    parser.add_argument("--config", type=named_path, help="a YAML file of settings, by the flags' names")
    first = OneLineParser(prog=parser.prog, add_help=False)
    first.add_argument("--config", type=named_path)
    path = first.parse_known_args()[0].config
    return parser.parse_args([*(from_yaml(parser, path) if path else []), *sys.argv[1:]])


def from_yaml(parser: OneLineParser, path: Path) -> list[str]:
    """The file's settings as they would stand on the command line, so that they are checked as those are."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"argument --config: {path}: {error}")
    if found is None:
        return []
    if not isinstance(found, dict):
        parser.error(f"argument --config: {path} holds a {type(found).__name__}; allowed: names with values")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words: list[str] = []
    for name, value in found.items():
        action = actions.get(name)
        if action is None:
            close = difflib.get_close_matches(str(name), list(actions), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            parser.error(f"argument --config: {path} sets {name!r}, which is no setting of {parser.prog}{hint}")
        flag = action.option_strings[0]
        if action.nargs == 0:  # a switch: true, false, or with a --no- twin
            if not isinstance(value, bool):
                parser.error(f"argument --config: {path} sets {name} to {value!r}; allowed: true or false")
            twin = isinstance(action, argparse.BooleanOptionalAction)
            words += [flag] if value else [f"--no-{flag[2:]}"] if twin else []
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, bool) and action.choices and "off" in action.choices:
            words += [flag, (action.const or "on") if value else "off"]  # YAML 1.1 reads on and off as true and false
        elif value is not None:
            words += [f"{flag}={value}"]
    return words


def add_train_options(parser: OneLineParser, kind: str) -> None:
    video = kind == "video"
    add = adder(parser.add_argument_group("data"))
    if video:
        add("--data_path", "--data", metavar="PATH", required=False, help="a folder of clips, or a CSV of path,text")
        add("--num_frames", type=partial(positive_int, limit=4096), default=16)
        add("--frame_interval", type=partial(positive_int, limit=4096), default=1, help="every how many-th frame")
    else:
        add("--data_path", "--data", metavar="PATH", default="digits",
            help="'digits', or a folder with a sub-folder per class, shards, …: see README.md")  # fmt: skip
    add("--image_size", type=partial(positive_int, limit=4096), help="side in pixels (default: digits 8, others 64)")
    add("--no_flip", action="store_true", help="no random left-right flips")
    add(
        "--num_workers", "--workers", type=partial(whole_number, limit=1024), default=0, help="processes that load data"
    )
    add("--val_fraction", type=share, default=0.0, help="share of the data that is held out for the validation loss")
    add("--vae", help="train on this VAE's latents: a diffusers name or a folder (default: pixels)")
    add("--text_encoder", help="condition on captions: a transformers name, a folder, or 'words' (no download)")
    add("--num_classes", type=partial(positive_int, limit=1_000_000), help="more than the data has")

    add = adder(parser.add_argument_group("model"))
    default = "VDiT-Digits/1x2x2" if video else "DiT-Digits/2"
    add("--model", default=default, choices=sorted(MODELS[kind]), metavar="NAME", help=f"default: {default}")
    add("--depth", type=partial(positive_int, limit=1000), help="other than the model's own")
    add("--hidden_size", type=partial(positive_int, limit=16384), help="other than the model's own")
    add("--num_heads", type=positive_int, help="other than the model's own")

    add = adder(parser.add_argument_group("training"))
    add("--objective", default="flow", choices=sorted(OBJECTIVES))
    add("--min_snr", type=positive_float, metavar="GAMMA", help="min-SNR weighting of gaussian and v, usually 5")
    add("--flow_timesteps", choices=["logit-normal", "uniform"], help="default: logit-normal")
    add("--steps", type=positive_int, help="optimizer steps (default: 1000)")
    add("--epochs", type=positive_int, help="instead of --steps")
    add("--batch_size", type=positive_int, default=64, help="per data-parallel process and micro-batch")
    add("--accum", type=positive_int, default=1, help="micro-batches per optimizer step")
    add("--label_drop", type=share, default=0.1, help="share of conditions that become the null, for guidance")
    add("--lr", type=positive_float, default=2e-3)
    add("--warmup", type=positive_int, default=50, help="steps until the learning rate is reached")
    add("--schedule", default="constant", choices=["constant", "cosine", "linear"], help="after the warm-up")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    add("--ema_decay", type=share, default=0.995)
    add("--plugin", default="auto", choices=PLUGINS, help="auto: ddp under torchrun")
    add("--grad_checkpoint", choices=["auto", "off", "selective", "full"], nargs="?", const="full", default="auto",
        help="what blocks compute again in the backward (auto: selective on GPUs, which costs no speed)")  # fmt: skip
    add_device_options(parser)
    add_opendit_options(parser)

    add = adder(parser.add_argument_group("watching, saving"))
    add("--log_every", type=positive_int, default=20)
    add("--val_every", type=whole_number, default=0, help="0: at the end only")
    add("--sample_every", type=whole_number, default=0, help="samples of the averaged weights; 0: at the end only")
    add("--ckpt_every", type=whole_number, default=0, help="0: none")
    add("--keep", type=positive_int, default=3, help="how many checkpoints")
    add("--load", metavar="PATH", help="go on from a checkpoint; 'latest': of this run, if there is one")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases as well")
    add("--cfg_scale", type=positive_float, default=2.0)
    add("--sampler", choices=samplers(), help="default: flow heun, others ddim")
    add("--sample_steps", type=positive_int, help="default: flow 10, others 50")
    add("--sample_prompts", nargs="+", metavar="TEXT", help="default: the first captions of the data")
    if not video:
        add(
            "--compare_steps",
            type=whole_number,
            help="steps of the speed table; 0: none (default: digits 10, others 0)",
        )
    add("--outputs", type=named_path, default=Path("outputs"))
    add("--name", help="sub-folder of --outputs (default: DATA-OBJECTIVE)")


def parse_train_options(parser: OneLineParser, kind: str = "image") -> argparse.Namespace:
    add_train_options(parser, kind)
    args = parse(parser)
    args.kind = kind
    check_train_options(parser, args)
    digits = args.data_path == "digits"
    args.image_size = args.image_size or (8 if digits else 64)
    args.sampler = args.sampler or SAMPLERS[args.objective][0]
    args.sample_steps = args.sample_steps or (10 if args.objective == "flow" else 50)
    if args.steps is None and args.epochs is None:
        args.steps = 1000
    if kind == "image" and args.compare_steps is None:
        args.compare_steps = 10 if digits and not args.no_accelerate and args.plugin in ("auto", "ddp") else 0
    if args.name is None:
        args.name = f"{'digits' if digits else os.path.basename(os.path.abspath(args.data_path))}-{args.objective}"
    return args


def check_train_options(parser: OneLineParser, args: argparse.Namespace) -> None:
    def refuse(flag: str, why: str) -> None:
        parser.error(f"argument {flag}: {why}")

    check_opendit_options(parser, args)
    if args.data_path is None:
        refuse("--data_path", "is needed: a folder of clips, or a CSV of path,text")
    if not args.data_path:
        refuse("--data_path", "the path is empty")
    if not 0 < args.ema_decay < 1:
        refuse("--ema_decay", "must be above 0 and below 1")
    if not 0 <= args.grad_clip < float("inf"):
        refuse("--grad_clip", f"{args.grad_clip} is not a number of at least 0")
    if args.name is not None and (args.name in ("", "..") or args.name != Path(args.name).name):
        refuse("--name", f"{args.name!r} is not the name of a sub-folder")
    if args.steps and args.epochs:
        refuse("--epochs", "contradicts --steps; leave one of them out")
    if args.objective == "flow" and args.min_snr:
        refuse("--min_snr", "is a weighting of the objectives gaussian and v, not of flow")
    if args.objective != "flow" and args.flow_timesteps:
        refuse("--flow_timesteps", f"is for --objective flow, not {args.objective}")
    if args.sampler and args.sampler not in SAMPLERS[args.objective]:
        refuse("--sampler", f"{args.sampler} is none for {args.objective}: {', '.join(SAMPLERS[args.objective])}")
    if args.objective != "flow" and (args.sample_steps or 0) > 1000:
        refuse("--sample_steps", f"the {args.objective} objective has 1000 steps")
    if args.label_drop == 0 and args.cfg_scale != 1:
        refuse("--label_drop", "0 leaves nothing to guide by; take --cfg_scale 1 with it")
    if args.model.startswith("PixArt") and not args.text_encoder:
        refuse("--model", f"{args.model} reads texts; name a --text_encoder ('words' needs no download)")
    if args.val_every and not args.val_fraction:
        refuse("--val_every", "there is nothing to judge by; hold out a --val_fraction")
    if args.text_encoder and args.num_classes:
        refuse("--num_classes", "contradicts --text_encoder: the model is conditioned on one of them")
    if args.sample_prompts and not args.text_encoder:
        refuse("--sample_prompts", "needs a --text_encoder")
    if args.plugin not in ("auto", "ddp"):
        if args.no_accelerate:
            refuse("--plugin", f"{args.plugin} is opendit's; leave --no_accelerate out, or take ddp")
        if getattr(args, "compare_steps", None):
            refuse("--compare_steps", f"the speed table is for whole models; leave it out, or --plugin {args.plugin}")
    if args.no_accelerate and args.mixed_precision == "fp16":
        refuse("--mixed_precision", "fp16's loss scale is opendit's here; take bf16 or fp32 with --no_accelerate")
    if args.no_accelerate and args.grad_checkpoint not in ("auto", "off"):
        refuse("--grad_checkpoint", "is opendit's; leave --no_accelerate out, or --grad_checkpoint")


def check_opendit_options(parser: OneLineParser, args: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    size = args.sequence_parallel_size
    if args.sequence_parallel_type and size == 1:
        parser.error("argument --sequence_parallel_type: needs a --sequence_parallel_size above 1")
    if world % size:
        parser.error(
            f"argument --sequence_parallel_size: {size} does not divide the {world} processes that torchrun started"
        )
    asked = {name: getattr(args, f"enable_{name}") for name in ("modulate_kernel", "layernorm_kernel", "flashattn")}
    if args.no_accelerate:
        for name, value in asked.items():
            if value == "on":
                parser.error(f"argument --enable_{name}: on contradicts --no_accelerate")
        if size > 1:
            parser.error("argument --sequence_parallel_size: is opendit's and contradicts --no_accelerate")
        for name in ("kernels", "attention"):
            if getattr(args, name) != "auto":
                parser.error(f"argument --{name}: is opendit's and contradicts --no_accelerate")
        if args.compile:
            parser.error("argument --compile: is opendit's here and contradicts --no_accelerate")
    if args.kernels != "auto" and (asked["modulate_kernel"], asked["layernorm_kernel"]) != ("auto", "auto"):
        parser.error(
            "argument --kernels: contradicts --enable_modulate_kernel and --enable_layernorm_kernel; leave one out"
        )
    if args.attention != "auto" and asked["flashattn"] != "auto":
        parser.error("argument --attention: contradicts --enable_flashattn; leave one of them out")
    if asked["layernorm_kernel"] == "on" and asked["modulate_kernel"] == "off":
        parser.error(
            "argument --enable_layernorm_kernel: on contradicts --enable_modulate_kernel off: a DiT's kernels that "
            "normalise also modulate"
        )


def samplers() -> list[str]:
    return sorted({name for names in SAMPLERS.values() for name in names})


def kernels_of(args: argparse.Namespace) -> str | dict[str, str]:
    if (args.enable_modulate_kernel, args.enable_layernorm_kernel) == ("auto", "auto"):
        return args.kernels
    off = {*(MODULATES if args.enable_modulate_kernel == "off" else ())}
    off |= {*(NORMALISES if args.enable_layernorm_kernel == "off" else ())}
    on = {*(MODULATES if args.enable_modulate_kernel == "on" else ())}
    on |= {*(NORMALISES if args.enable_layernorm_kernel == "on" else ())}
    return dict.fromkeys(off, "reference") | dict.fromkeys(on - off, "triton")


def attention_of(args: argparse.Namespace, on_gpu: bool) -> str:
    if args.enable_flashattn == "auto":
        return args.attention
    if args.enable_flashattn == "off":
        return "sdpa-math"
    if not on_gpu:
        raise ValueError("--enable_flashattn on: flash kernels need a GPU; take auto")
    return "sdpa-flash"


def train_config(args: argparse.Namespace, on_gpu: bool, distributed: bool) -> opendit.BoosterConfig:
    """What opendit is asked for in training: its recipe "train" on GPUs, unless a flag says otherwise."""
    compile = bool(args.compile)
    checkpointing = {"auto": "selective" if on_gpu else False, "off": False}.get(
        args.grad_checkpoint, args.grad_checkpoint
    )
    plugin = ("ddp" if distributed else None) if args.plugin == "auto" else args.plugin
    return opendit.BoosterConfig(
        kernels=kernels_of(args),
        attention=attention_of(args, on_gpu),
        sequence_parallel=args.sequence_parallel_type or "auto",
        compile=compile,
        cuda_graphs=on_gpu and not compile,
        activation_checkpointing=checkpointing,
        precision=precision_of(args, on_gpu),
        plugin=plugin,
        ema=opendit.EMA(decays=args.ema_decay, warmup=True),
    )


def sample_config(args: argparse.Namespace, on_gpu: bool) -> opendit.BoosterConfig:
    """What opendit is asked for in sampling: its recipe "sample", but for what a flag says otherwise."""
    precision = precision_of(args, on_gpu)
    return opendit.BoosterConfig(
        sampling=True,
        kernels=kernels_of(args),
        attention=attention_of(args, on_gpu),
        sequence_parallel=args.sequence_parallel_type or "auto",
        compile=bool(args.compile),
        cuda_graphs=not args.compile,
        weights="inherit" if precision == "fp32" else precision,
        precision="fp32" if precision == "fp32" else "inherit",
        cfg_parallel=args.cfg_parallel,
    )


def precision_of(args: argparse.Namespace, on_gpu: bool) -> str:
    return ("bf16" if on_gpu else "fp32") if args.mixed_precision == "auto" else args.mixed_precision


def add_sample_options(parser: OneLineParser, kind: str) -> None:
    add = adder(parser)
    add(
        "--checkpoint",
        "--ckpt",
        type=Path,
        required=kind != "image",
        help="a folder written by train.py, a .safetensors or a .pt file"
        + ("; default: one that comes with the project" if kind == "image" else ""),
    )
    add("--classes", type=whole_number, nargs="+", help="class numbers, one row each (default: the first ten)")
    add("--prompts", nargs="+", metavar="TEXT", help="what to draw, one row each, by a model that reads texts")
    add("--negative_prompt", metavar="TEXT", help="what to be guided away from (default: the model's null)")
    add(
        "--per_class", "--per_prompt", type=partial(positive_int, limit=1_000_000), default=10 if kind == "image" else 1
    )
    add("--batch_size", type=positive_int, default=64 if kind == "image" else 4, help="drawn at once, per process")
    add("--cfg_scale", type=positive_float, help="default: 2 for pixels, 4 for latents; 1: no guidance")
    add("--cfg_interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="guide only while the noise level t is in it (t: 1 is noise, 0 the sample)")  # fmt: skip
    add("--sampler", choices=samplers(), help="default: flow heun, others ddim")
    add("--steps", "--num_sampling_steps", type=positive_int, help="default: flow 10, others 50")
    add("--vae", help="that decodes latents: a diffusers name or a folder (default: the one it was trained with)")
    add("--text_encoder", help="default: the one it was trained with")
    add("--cfg_parallel", action="store_true",
        help="two processes share each batch: with and without the condition")  # fmt: skip
    add("--cache_psnr", type=positive_float, metavar="DB",
        help="reuse blocks' results between steps, down to this PSNR to samples without (30, say)")  # fmt: skip
    add("--cache_distance", type=positive_float, metavar="D",
        help="likewise, by the relative error of what is reused (0.05, say)")  # fmt: skip
    add("--out_dir", type=named_path, help="a file per sample and captions.jsonl, for eval.sh, instead of one picture")
    add_device_options(parser)
    add_opendit_options(parser)


def shipped_checkpoint() -> Path:
    """What there is to draw from without training or a download."""
    found = next((folder for folder in SHIPPED if (folder / "model.safetensors").is_file()), None)
    if found is None:
        raise ValueError(f"--checkpoint: is needed; {SHIPPED[0].parent} holds none")
    return found


def check_sample_options(parser: OneLineParser, args: argparse.Namespace) -> None:
    check_opendit_options(parser, args)
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("cfg_parallel", "cache_psnr", "cache_distance"):
        if getattr(args, name) and args.no_accelerate:
            parser.error(f"argument --{name}: is opendit's and contradicts --no_accelerate")
        if getattr(args, name) and name != "cfg_parallel" and args.compile:
            parser.error(f"argument --{name}: compiled blocks can't be left out; leave one of it and --compile out")
    if args.cache_psnr and args.cache_distance:
        parser.error("argument --cache_distance: contradicts --cache_psnr; name one budget")
    if args.cfg_parallel and world % (2 * args.sequence_parallel_size):
        parser.error(
            f"argument --cfg_parallel: needs {2 * args.sequence_parallel_size} processes or a multiple, not {world}: "
            "start it under torchrun"
        )
    if args.cfg_parallel and args.cfg_scale == 1:
        parser.error("argument --cfg_parallel: means nothing with --cfg_scale 1, which is no guidance")
    low, high = args.cfg_interval
    if not 0 <= low < high <= 1:
        parser.error(f"argument --cfg_interval: {low} {high} is not within 0 … 1, low end first")
    if args.out and args.out_dir:
        parser.error("argument --out: contradicts --out_dir; samples go to one of them")
    if args.classes and args.prompts:
        parser.error("argument --prompts: contradicts --classes; a model takes one of them")
    if args.negative_prompt is not None and args.cfg_scale == 1:
        parser.error("argument --negative_prompt: means nothing with --cfg_scale 1, which is no guidance")
    if args.no_accelerate and args.mixed_precision == "fp16":
        parser.error("argument --mixed_precision: fp16 without opendit is not supported; take bf16 or fp32")
