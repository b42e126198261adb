"""What a run leaves behind: generated images in a grid and their verdict, the loss curve, the closing lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from examples.image.judge import judge_digits
from examples.image.speed import format_table

if TYPE_CHECKING:
    from examples.run import Run

matplotlib.use("Agg")  # no display needed; it has to come before pyplot
import matplotlib.pyplot as plt


def repeated(cond: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """Each row `times` times, one after the other."""
    return {name: value.repeat_interleave(times, dim=0) for name, value in cond.items()}


def grid_of(images: Tensor, columns: int, min_side: int = 48) -> Tensor:
    """Bytes [H, W, 3] of `images` [N, C, I, I] in [−1, 1], row by row.

    Small ones are enlarged smoothly to at least `min_side` pixels; of more than three channels, the first are shown.
    """
    images = images.detach().float().cpu()
    scale = max(1, -(-min_side // images.shape[-1]))
    if scale > 1:
        images = F.interpolate(images, scale_factor=scale, mode="bicubic")
    images = F.pad(((images.clamp(-1, 1) + 1) * 127.5).round(), (0, 2, 0, 2), value=96)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[2] - rows[-1].shape[2]), value=96)
    return torch.cat(rows, dim=1).byte().permute(1, 2, 0).contiguous()


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    Image.fromarray(grid_of(images, columns).numpy()).save(path)


def save_image(path: Path, image: Tensor) -> None:
    """`image` [C, I, I] in [−1, 1] as it is."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    Image.fromarray(pixels.expand(-1, -1, 3).numpy() if len(image) == 1 else pixels[..., :3].numpy()).save(path)


def save_loss_curve(path: Path, losses: list[float], first: int = 0) -> None:
    """`first`: how many steps came before, in the run that this one went on from."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(first + 1, first + len(losses) + 1), losses, linewidth=0.5, alpha=0.4, label="each step")
    window = max(1, len(losses) // 50)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
    axes.plot(range(first + window, first + len(losses) + 1), smooth, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sample_and_judge(run: Run, path: Path) -> dict[str, float]:
    """A grid with one row per condition (the first ten); digits are also classified."""
    args = run.args
    digits = args.data_path == "digits" and args.text_encoder is None
    rows, per_row = len(next(iter(run.shown.values()))), 20 if digits else 8
    images = run.draw(repeated(run.shown, per_row), batch_size=256)
    if not images.isfinite().all():
        raise FloatingPointError("the generated images are not finite; try a lower --lr or --cfg_scale")
    columns = min(10, per_row)
    if run.process.is_main:
        save_grid(path, images.view(rows, per_row, *images.shape[1:])[:, :columns].flatten(0, 1), columns)
    return judge_digits(images, run.shown["y"].repeat_interleave(per_row)) if digits else {}


def print_summary(metrics: dict[str, Any], folder: Path) -> None:
    args = metrics["arguments"]
    print(f"loss {metrics['loss_first_20']:.4f} → {metrics['loss_last_20']:.4f} in {metrics['seconds']:.0f} s")
    if unreadable := metrics["unreadable_files"]:
        print(f"{len(unreadable)} files could not be read and were skipped; metrics.json names them")
    if "requested_class_share" in metrics:
        print(
            f"{metrics['requested_class_share']:.1%} of the generated digits are what they were asked to be, says a "
            f"classifier that is right on {metrics['classifier_held_out_accuracy']:.1%} of held-out real ones"
        )
    if "speed" in metrics:
        batch = f"batch {args['batch_size']} × {metrics['processes']}"
        print(f"\nTraining step on {metrics['device']}, {batch}, {args['mixed_precision']}:")
        print(format_table(metrics["speed"], args["compare_steps"]))
    samples = "samples.png" if args["kind"] == "image" else "samples.gif"
    print(f"\nwrote {folder}/: {samples}, loss.png, model.safetensors, config.json, metrics.json, log.jsonl")
