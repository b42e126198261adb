"""What image/sample.py and video/sample.py share: from a checkpoint and settings to samples in pixels.

A sample is decided by the seed and its number, in whatever batch, on whichever process it is drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import opendit
from examples.common import Process, autocast
from examples.diffusion import SAMPLERS, sample, timesteps_of
from examples.diffusion.conditions import rows
from examples.encoding import Encoder
from examples.options import precision_of

# So many samples are drawn to calibrate a step cache, whatever the batch size and the number of processes.
CALIBRATED = 4


class Drawing:
    """What is to be drawn: conditions, one row per sample. Raises ValueError where settings and checkpoint disagree."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, config: dict[str, Any], process: Process):
        self.args, self.model, self.process, self.device = args, model, process, process.device
        self.objective = config["objective"]
        fitting = SAMPLERS[self.objective]
        self.sampler = args.sampler or fitting[0]
        if self.sampler not in fitting:
            raise ValueError(f"--sampler {args.sampler}: a {self.objective} checkpoint takes {' or '.join(fitting)}")
        self.steps = args.steps or (10 if self.objective == "flow" else 50)
        if self.objective != "flow" and self.steps > 1000:
            raise ValueError(f"--steps {self.steps}: the {self.objective} objective has 1000 steps")
        self.on_pixels = config["pixels"]
        text = args.text_encoder or config.get("text_encoder")
        reads_texts = model.text_dim is not None
        if args.prompts and not reads_texts:
            raise ValueError("--prompts: this checkpoint takes classes (--classes)")
        if args.classes and reads_texts:
            raise ValueError("--classes: this checkpoint takes texts (--prompts)")
        if args.negative_prompt is not None and not reads_texts:
            raise ValueError("--negative_prompt: this checkpoint takes classes, not texts")
        if args.text_encoder and not reads_texts:
            raise ValueError("--text_encoder: this checkpoint takes classes, not texts")
        if args.vae and self.on_pixels:
            raise ValueError("--vae: this checkpoint makes pixels, there is nothing to decode")
        if reads_texts and not args.prompts:
            raise ValueError("--prompts: is needed, this checkpoint takes texts")
        if reads_texts and not text:
            raise ValueError("--text_encoder: is needed, the checkpoint does not say which it was trained with")
        vae = None if self.on_pixels else args.vae or config.get("vae")
        length = None if args.text_encoder else config.get("text_length")
        self.encoder = Encoder(vae, text if reads_texts else None, config["architecture"], [], self.device, length)
        unconditional = getattr(model, "extras", None) == 1  # Latte's, of timesteps alone
        if unconditional and args.cfg_scale not in (None, 1):
            raise ValueError(f"--cfg_scale {args.cfg_scale}: this checkpoint has no condition to be guided by")
        # A negative prompt is something to be guided away from, whatever the training dropped.
        nothing_dropped = config["model"].get("class_dropout_prob") == 0 and args.negative_prompt is None
        if nothing_dropped and args.cfg_scale not in (None, 1):
            raise ValueError(
                f"--cfg_scale {args.cfg_scale}: this checkpoint was trained with --label_drop 0, which leaves nothing "
                "to be guided by; take 1"
            )
        default = 2.0 if self.on_pixels else 4.0
        self.cfg_scale = 1.0 if unconditional or nothing_dropped else args.cfg_scale or default
        # As the samples of the published DiTs were made: three of four channels are guided.
        self.guided_channels = 3 if config.get("published") == "DiT" else None
        self.null = None
        if reads_texts:
            self.prompts = prompts = [prompt for prompt in args.prompts for _ in range(args.per_class)]
            self.cond = self.encoder.captions(prompts)
            if args.negative_prompt is not None:
                self.null = self.encoder.captions([args.negative_prompt] * len(prompts))
        else:
            classes = args.classes or list(range(min(10, model.num_classes)))
            if max(classes) >= model.num_classes:
                raise ValueError(f"--classes {max(classes)}: the checkpoint knows 0 … {model.num_classes - 1}")
            self.labels = [label for label in classes for _ in range(args.per_class)]
            self.cond = self.encoder.labels(self.labels)
        self.total = len(next(iter(self.cond.values())))
        self.timesteps = timesteps_of(self.sampler, self.steps)
        if args.cache_psnr and not self.on_pixels and self.encoder.vae_name is None:
            raise ValueError("--cache_psnr: the checkpoint makes latents; name a --vae, or take --cache_distance")
        self.cache: opendit.StepCache | None = None

    def draw(self) -> tuple[Tensor, Tensor]:
        """Samples in pixels and as the model made them, all of them on every process."""
        ranks = opendit.data_parallel_size(self.model)
        mine = torch.cat(
            [torch.empty(0, *self.model.sample_shape, device=self.device), *(x for _, x in self._shares())]
        )
        if ranks > 1:
            mine = _of_all(mine, -(-self.total // ranks), self.total, ranks, self.process.world // ranks)
        return self.encoder.pixels(mine), mine

    def files(self, folder: Path, write: Callable[[Path, Tensor], None], suffix: str, classes: list[str]) -> None:
        """A file per sample, written by the process that draws it, and captions.jsonl: what `examples.data` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        sharing = self.process.world // opendit.data_parallel_size(self.model)
        bar = tqdm(total=self.total, desc="draw", disable=not self.process.is_main)
        for start, latents in self._shares():
            pixels = self.encoder.pixels(latents).cpu()
            if not pixels.isfinite().all():
                raise FloatingPointError("samples are not finite; try a lower --cfg_scale")
            if self.process.rank % sharing == 0:  # processes that share a sequence have the same samples
                for i, one in enumerate(pixels):
                    write(folder / f"{start + i:06d}{suffix}", one)
            bar.update(len(pixels) * opendit.data_parallel_size(self.model))
        bar.close()
        if self.process.is_main:
            with (folder / "captions.jsonl").open("w") as lines:
                for i in range(self.total):
                    lines.write(json.dumps({"file": f"{i:06d}{suffix}", **self._said(i, classes)}) + "\n")

    def _said(self, i: int, classes: list[str]) -> dict[str, Any]:
        """The class by its number in training: names would be numbered anew among those that happen to be drawn."""
        if self.null is not None or self.encoder.text_name is not None:
            return {"caption": self.prompts[i]}
        label = self.labels[i]
        return {"class": label, **({"class_name": classes[label]} if label < len(classes) else {})}

    def _shares(self) -> Iterator[tuple[int, Tensor]]:
        """This process's part of the samples, batch by batch: the first one's number, and the batch."""
        rank, ranks = opendit.data_parallel_rank(self.model), opendit.data_parallel_size(self.model)
        share = -(-self.total // ranks)
        first, last = min(self.total, rank * share), min(self.total, (rank + 1) * share)
        precision = precision_of(self.args, self.device.type == "cuda")
        if (self.args.cache_psnr or self.args.cache_distance) and self.cache is None:
            self._calibrate()
        with autocast(self.device, precision if self.args.no_accelerate else "fp32"), self._running():
            for start in range(first, last, self.args.batch_size):
                yield start, self._part(start, min(last, start + self.args.batch_size))

    def _running(self) -> contextlib.AbstractContextManager[Any]:
        """What all steps have in common is computed once (compiled blocks compute it in each)."""
        if self.args.no_accelerate or self.args.compile:
            return contextlib.nullcontext()
        return opendit.sampling(self.model, self.timesteps, self.cache)

    def _calibrate(self) -> None:
        """The cheapest step cache within the budget, measured on a few samples of those that are drawn."""
        stop = min(CALIBRATED, self.total)
        self.cache = opendit.calibrate(
            self.model,
            lambda: self.encoder.pixels(self._part(0, stop)),
            self.timesteps,
            psnr=self.args.cache_psnr,
            distance=self.args.cache_distance,
        )
        if self.process.is_main:
            print(f"step cache: {self.cache.report()}", flush=True)

    def _part(self, start: int, stop: int) -> Tensor:
        return sample(
            self.model,
            rows(self.cond, start, stop),
            null=None if self.null is None else rows(self.null, start, stop),
            sampler=self.sampler,
            objective=self.objective,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            interval=tuple(self.args.cfg_interval),
            seed=self.args.global_seed,
            first=start,
            clip=self.on_pixels,
            guided_channels=self.guided_channels,
        )


def _of_all(mine: Tensor, share: int, total: int, ranks: int, sp: int) -> Tensor:
    """Everyone's samples in order; processes that share a sequence have the same ones, and stand side by side."""
    padded = torch.cat([mine, mine.new_zeros(share - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(ranks * sp)]
    dist.all_gather(parts, padded)
    return torch.cat(parts[::sp])[:total]
