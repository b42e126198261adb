"""`python -m opendit verify PACKAGE.MODULE:FUNCTION`: certifies a model from the command line.

FUNCTION takes nothing and returns a mapping of `opendit.verify`'s arguments: `model`, `batch`, and what else is wanted
of `loss`, `optimizer`, `ema`. Exit status: 0 certified, 1 not certified, 2 the request can't be carried out.

    torchrun --nproc-per-node 2 -m opendit verify training:for_verify --sp-size 2 --certificate certificate.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import opendit

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m opendit", description="opendit's command line")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare the accelerated model with the plain one")
    verify.add_argument("target", help="PACKAGE.MODULE:FUNCTION, which returns verify's arguments as a mapping")
    verify.add_argument("--sp-size", type=int, default=1, help="processes that share a sequence")
    verify.add_argument("--config", default=None, help="a recipe's name, or a JSON object of BoosterConfig's fields")
    verify.add_argument("--autocast", choices=sorted(_LOW), default=None, help="compare in this precision as well")
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument("--certificate", type=Path, default=None, help="where to write the JSON certificate")
    given = parser.parse_args(arguments)
    try:
        report = opendit.verify(
            **_arguments(given.target),
            booster_cfg=_config(given.config),
            sp_size=given.sp_size,
            autocast=_LOW.get(given.autocast),
            seed=given.seed,
            certificate=given.certificate,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0 if report else 1


def _arguments(target: str) -> dict[str, Any]:
    module, _, name = target.partition(":")
    sys.path.insert(0, "")  # as `python script.py` would find it
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"target: got {target!r}; allowed: PACKAGE.MODULE:FUNCTION that can be imported ({error})"
        ) from error
    found = function()
    if not isinstance(found, Mapping) or not {"model", "batch"} <= set(found):
        raise TypeError(f"target: {target} returned {type(found).__name__}; allowed: a mapping with model and batch")
    return dict(found)


def _config(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config: got {text!r}; allowed: a recipe's name or a JSON object ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
