"""A checkpoint to hand on: bf16 weights, their config, and a card that says what they are. `sample.py` reads it.

python examples/models/export.py outputs/digits-flow examples/checkpoints/digits --title "DiT for digits" --card card.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `examples`

import torch
from torch import Tensor

from examples.models.checkpoint import load_checkpoint, save_checkpoint

CARD = """# {title}

{text}

| | |
|---|---|
| parameters | {parameters:,}, stored in bf16 ({megabytes:.1f} MB) |
| architecture | {architecture}, `{model}` |
| objective | {objective} |

`model.safetensors` and `config.json` are read by `examples/image/sample.py --checkpoint FOLDER`.
"""


def export(folder: Path, state: dict[str, Tensor], config: dict[str, Any], title: str, text: str) -> None:
    """Writes model.safetensors, config.json and README.md; `text` is Markdown: data, training, measurements, limits."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    save_checkpoint(folder, half, config)
    card = CARD.format(
        title=title,
        text=text.strip(),
        parameters=sum(value.numel() for value in state.values()),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        architecture=config.get("architecture", "DiT"),
        model=json.dumps(config["model"]),
        objective=config["objective"],
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder that train.py wrote")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--card", type=Path, required=True, help="a Markdown file: data, training, measurements")
    args = parser.parse_args()
    model, config = load_checkpoint(args.checkpoint)
    with torch.no_grad():
        export(args.folder, model.state_dict(), config, args.title, args.card.read_text())


if __name__ == "__main__":
    main()
