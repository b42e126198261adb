"""opendit's command line. Exit status: 0 done or certified, 1 not certified, 2 the request can't be carried out.

    python -m opendit info
    python -m opendit verify PACKAGE.MODULE:FUNCTION       certifies a model
    python -m opendit convert SOURCE TARGET --model PACKAGE.MODULE:FUNCTION
    python -m opendit bench                                what opendit gives on this machine

`verify`'s FUNCTION takes nothing and returns a mapping of `opendit.verify`'s arguments: `model`, `batch`, and what else
is wanted of `loss`, `optimizer`, `ema`. `convert`'s returns the model whose weights they are: the formats are those of
`opendit.load_weights` and `opendit.save_weights`, the names are the model's.

    torchrun --nproc-per-node 2 -m opendit verify training:for_verify --sp-size 2 --certificate certificate.json
    python -m opendit convert DiT-XL-2-256x256.pt dit.safetensors --model models:dit_xl_2
    python -m opendit bench --model DiT-B/2 --image-size 256 --batch 64 --json bench.json
    python -m opendit bench --model training:for_verify
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import opendit

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = _parser().parse_args(arguments)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "info": _info,
        "verify": _verify,
        "convert": _convert,
        "bench": _bench,
    }
    try:
        _check_files(given)
        return commands[given.command](given)
    except (ValueError, TypeError, NotImplementedError, opendit.CheckpointError) as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opendit", description="opendit's command line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="hardware, versions, what can run here and what can't, and why")
    verify = commands.add_parser("verify", help="compare the accelerated model with the plain one")
    verify.add_argument("target", help="PACKAGE.MODULE:FUNCTION, which returns verify's arguments as a mapping")
    verify.add_argument("--sp-size", type=int, default=1, help="processes that share a sequence")
    verify.add_argument("--family", default=None, help="insist on a family; 'generic' takes any model")
    verify.add_argument("--config", default=None, help="a recipe's name, or a JSON object of BoosterConfig's fields")
    verify.add_argument("--autocast", choices=sorted(_LOW), default=None, help="compare in this precision as well")
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument("--certificate", type=Path, default=None, help="where to write the JSON certificate")
    convert = commands.add_parser("convert", help="weights from one format into another, under the model's names")
    convert.add_argument("source", type=Path, help="a .safetensors, .pt or .pth file, or a folder of diffusers")
    convert.add_argument("target", type=Path, help="likewise; its ending says the format")
    convert.add_argument("--model", required=True, help="PACKAGE.MODULE:FUNCTION, which returns the model")
    convert.add_argument("--which", choices=("model", "ema"), default=None, help="of a .pt that has both; default: ema")
    bench = commands.add_parser("bench", help="time a training and a sampling step, plain, compiled and accelerated")
    bench.add_argument(
        "--model", default=None, help="DiT-S/2 … DiT-XL/8, or verify's target; default: DiT-XL/2, on a CPU DiT-Tiny/2"
    )
    bench.add_argument("--image-size", type=int, default=None, help="px of a named model; default: 256, on a CPU 64")
    bench.add_argument("--batch", type=int, default=None, help="of a named model; default: 32, on a CPU 4")
    bench.add_argument("--precision", choices=("bf16", "fp32"), default=None, help="default: bf16, on a CPU fp32")
    bench.add_argument("--step", choices=("train", "sample"), default=None, help="default: both")
    bench.add_argument(
        "--variants", nargs="+", choices=("plain", "torch.compile", "opendit"), default=None, help="default: all"
    )
    bench.add_argument("--config", default=None, help="for training: a recipe's name, or a JSON object; default: train")
    bench.add_argument("--family", default=None, help="insist on a family; 'generic' takes any model")
    bench.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    bench.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: a GPU where there is one")
    bench.add_argument("--json", type=Path, default=None, help="where to write the rows")
    return parser


def _check_files(given: argparse.Namespace) -> None:
    """Minutes of measuring must not end at a file that can't be written."""
    for flag in ("json", "certificate"):
        path = getattr(given, flag, None)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{flag}: got {str(path)!r}; allowed: a file in a folder that exists")


def _info(given: argparse.Namespace) -> int:
    from opendit import information

    print("\n".join(information.lines()))
    return 0


def _verify(given: argparse.Namespace) -> int:
    found = _result_of(given.target)
    if not isinstance(found, Mapping) or not {"model", "batch"} <= set(found):
        raise TypeError(
            f"target: {given.target} returned {type(found).__name__}; allowed: a mapping with model and batch"
        )
    report = opendit.verify(
        **found,
        booster_cfg=_config(given.config),
        sp_size=given.sp_size,
        family=given.family,
        autocast=_LOW.get(given.autocast),
        seed=given.seed,
        certificate=given.certificate,
    )
    return 0 if report else 1


def _convert(given: argparse.Namespace) -> int:
    model = _result_of(given.model)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: {given.model} returned {type(model).__name__}; allowed: a torch.nn.Module")
    opendit.load_weights(given.source, model, which=given.which)
    opendit.save_weights(given.target, model)
    print(f"{given.target}: {sum(t.numel() for t in model.state_dict().values()):,} values")
    return 0


def _bench(given: argparse.Namespace) -> int:
    from opendit import bench

    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda'; allowed: 'cpu', for torch sees no CUDA device here")
    on_gpu = torch.cuda.is_available() and given.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    if given.repeats < 1:
        raise ValueError(f"repeats: got {given.repeats}; allowed: 1 or more")
    name = given.model or ("DiT-XL/2" if on_gpu else "DiT-Tiny/2")
    if ":" in name:
        for flag in ("image_size", "batch"):
            if getattr(given, flag) is not None:
                raise ValueError(
                    f"{flag}: got {getattr(given, flag)} for {name}; allowed: with a named model. Leave it out"
                )
        found = _result_of(name)
        if not isinstance(found, Mapping):
            raise TypeError(f"model: {name} returned {type(found).__name__}; allowed: a mapping with model and batch")
        job = bench.job_of_model(name, found, device, given.family)
    else:
        size, batch = (256, 32) if on_gpu else (64, 4)
        size = size if given.image_size is None else given.image_size
        batch = batch if given.batch is None else given.batch
        job = bench.job_of_name(name, size, batch, device, given.family)
    precision = given.precision or ("bf16" if on_gpu else "fp32")
    steps = (given.step,) if given.step else ("train", "sample")
    config = "train" if given.config is None else _config(given.config)
    print(f"measuring {job.name} on {device.type}: {', '.join(steps)} …", file=sys.stderr, flush=True)
    rows = []
    for row in bench.measure(
        job,
        steps,
        tuple(given.variants or bench.VARIANTS),
        precision=precision,
        train_config=config,
        repeats=given.repeats,
    ):
        print(
            f"  {row.step}, {row.variant}: {row.refused or format(row.ms, '.2f') + ' ms'}", file=sys.stderr, flush=True
        )
        rows.append(row)
    print(bench.table(job, rows, precision))
    if given.json is not None:
        given.json.write_text(json.dumps(bench.as_json(job, rows, precision), indent=1) + "\n")
    return int(any(row.refused for row in rows))


def _result_of(target: str) -> Any:
    """What FUNCTION of PACKAGE.MODULE:FUNCTION returns."""
    module, _, name = target.partition(":")
    sys.path.insert(0, "")  # as `python script.py` would find it
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"target: got {target!r}; allowed: PACKAGE.MODULE:FUNCTION that can be imported ({error})"
        ) from error
    return function()


def _config(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config: got {text!r}; allowed: a recipe's name or a JSON object ({error})") from error


def _leave(status: int) -> None:
    """Ends the process. One of several ends at once: a thread of gloo's that lets go of a tensor while the interpreter
    is taken down aborts it, after all is said and done, and the launcher takes that for a failure.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _leave(main())
