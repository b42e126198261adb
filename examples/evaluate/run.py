"""One pass over generated samples, one over real ones (or their statistics from a file), and the figures from both.

Processes share the samples, each of which is counted once; sums are added up at the end. Nothing is said about a
sample that can't be read but that it was skipped, and how many were.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.common import Process
from examples.data import Latents, OneByOne, Samples, open_data
from examples.evaluate.features import ClipImages, Extractor
from examples.evaluate.metrics import InceptionScore, Moments, frechet_distance, gather_rows, precision_recall
from examples.evaluate.npz import NpzImages

METRICS = ("frechet", "precision_recall", "inception_score", "clip", "accuracy")


def open_samples(path: Path, image_size: int, num_frames: int = 1, frame_interval: int = 1) -> Samples | NpzImages:
    """Whatever `open_data` reads, decoded; or an .npz of images."""
    if path.suffix == ".npz":
        if num_frames > 1:
            raise ValueError(f"num_frames: got {num_frames}; {path} holds images")
        return NpzImages(path, image_size)
    data = open_data(path, image_size=image_size, num_frames=num_frames, frame_interval=frame_interval)
    if isinstance(data, Latents):
        raise ValueError(f"{path} holds latents; allowed: images or clips")
    return data


class Pass:
    """What one pass over a data set collects, of all processes together after `finish`."""

    def __init__(
        self,
        data: Samples | NpzImages,
        extractor: Extractor,
        metrics: set[str],
        process: Process,
        *,
        clip: ClipImages | None = None,
        classifier: Extractor | None = None,
    ):
        self.data, self.extractor, self.metrics, self.process = data, extractor, metrics, process
        self.clip, self.classifier = clip, classifier
        frames = (data.num_frames,) if data.num_frames > 1 else ()
        blank = torch.zeros(1, *frames, 3, data.image_size, data.image_size, dtype=torch.uint8, device=process.device)
        features, logits = extractor(blank)
        self.moments = Moments(features.shape[1], process.device)
        self.rows: list[Tensor] = []
        self.inception = None if logits is None else InceptionScore(logits.shape[1], process.device)
        # Of the conditions: samples, CLIP similarity, nearest caption is the own one, predicted class is the asked one.
        self.conditions = torch.zeros(4, dtype=torch.float64, device=process.device)
        self.unreadable: dict[int, str] = {}

    @property
    def skipped(self) -> list[str]:
        return self.data.unlisted + [self.unreadable[i] for i in sorted(self.unreadable)]

    def run(self, batch_size: int, workers: int, name: str) -> Pass:
        device = self.process.device
        captions = list(dict.fromkeys(self.data.captions or ())) if self.clip else []
        texts = self.clip.text(captions) if self.clip else None
        number = {caption: i for i, caption in enumerate(captions)}
        for samples in self._batches(batch_size, workers, name):
            self.unreadable |= {sample["id"]: sample["why"] for sample in samples if "why" in sample}
            samples = [sample for sample in samples if "why" not in sample]
            if not samples:
                continue
            pixels = torch.stack([sample["pixels"] for sample in samples]).to(device)
            pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)
            features, logits = self.extractor(pixels)
            self.moments.add(features)
            if "precision_recall" in self.metrics:
                self.rows.append(features.float())
            if self.inception and logits is not None:
                self.inception.add(logits, torch.tensor([sample["id"] for sample in samples]))
            self.conditions[0] += len(samples)
            if self.clip:
                own = torch.tensor([number[sample["caption"]] for sample in samples], device=device)
                images = self.clip(pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3])
                if pixels.ndim == 5:
                    images = torch.nn.functional.normalize(images.mean(1), dim=-1)
                similar = images @ texts.T
                self.conditions[1] += (100 * similar.gather(1, own[:, None])).clamp(min=0).sum()
                self.conditions[2] += (similar.argmax(1) == own).sum()
            if self.classifier:
                asked = torch.tensor([sample["label"] for sample in samples], device=device)
                self.conditions[3] += (self.classifier(pixels)[1].argmax(-1) == asked).sum()
        return self._finish()

    def _batches(self, batch_size: int, workers: int, name: str) -> Iterator[list[dict[str, Any]]]:
        mine = range(self.process.rank, len(self.data), self.process.world)
        groups = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
        loader = DataLoader(OneByOne(self.data), batch_sampler=groups, num_workers=workers, collate_fn=list)
        with tqdm(total=len(mine), desc=name, unit="sample", disable=not self.process.is_main) as bar:
            for samples in loader:
                yield samples
                bar.update(len(samples))

    def _finish(self) -> Pass:
        self.moments.over_processes()
        if self.inception:
            self.inception.over_processes()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.conditions)
            parts: list[Any] = [None] * self.process.world
            torch.distributed.all_gather_object(parts, self.unreadable)
            self.unreadable = {i: why for part in parts for i, why in part.items()}
        if "precision_recall" in self.metrics:
            width = len(self.moments.sum)
            self.all_rows = gather_rows(torch.cat([torch.empty(0, width, device=self.process.device), *self.rows]))
        return self


def report(generated: Pass, real: Pass | None, statistics: dict[str, Any] | None) -> dict[str, Any]:
    """The figures, each beside what it was measured with."""
    extractor, metrics = generated.extractor, generated.metrics
    found: dict[str, Any] = {
        "features": extractor.name_for(generated.data.num_frames),
        "generated": int(generated.moments.n),
        "skipped": generated.skipped,
    }
    if "frechet" in metrics:
        if statistics:
            mean, covariance = (torch.from_numpy(statistics[key]).to(generated.moments.sum) for key in ("mu", "sigma"))
            found["real"] = statistics.get("n", "unknown")
        else:
            mean, covariance = real.moments.mean_and_covariance()
            found["real"] = int(real.moments.n)
            found["skipped_real"] = real.skipped
        distance = frechet_distance(*generated.moments.mean_and_covariance(), mean, covariance)
        standard = extractor.standard_for(generated.data.num_frames)
        # Only the standard network's distance has the name by which papers quote it.
        found[standard.lower() if standard else "frechet_distance_of_other_features"] = distance
    if "precision_recall" in metrics:
        precision, recall = precision_recall(real.all_rows, generated.all_rows)
        found |= {"precision": precision, "recall": recall, "neighbours": 3}
    if "inception_score" in metrics:
        score, spread = generated.inception.score()
        found |= {"inception_score": score, "inception_score_spread": spread}
    samples, similarity, nearest, right = generated.conditions.tolist()
    if "clip" in metrics:
        found |= {"clip": generated.clip.folder, "clip_score": similarity / samples}
        found["caption_found_by_clip"] = nearest / samples
        found["captions"] = len(set(generated.data.captions))
    if "accuracy" in metrics:
        found |= {"classifier": generated.classifier.name, "class_accuracy": right / samples}
    return found


def check_conditions(data: Samples | NpzImages, metrics: set[str]) -> None:
    if "clip" in metrics and data.captions is None:
        raise ValueError("metrics: clip takes captions, which --generated has not. Add a captions.jsonl to it")
    if "accuracy" in metrics and data.labels is None:
        raise ValueError("metrics: accuracy takes classes, which --generated has not. Sort it into sub-folders")


def save_statistics(path: Path, made: Pass) -> None:
    """`mu` and `sigma` as pytorch-fid and ADM keep them, and what they are of."""
    mean, covariance = made.moments.mean_and_covariance()
    about = json.dumps({"features": made.extractor.name_for(made.data.num_frames), "n": int(made.moments.n)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, mu=mean.cpu().numpy(), sigma=covariance.cpu().numpy(), about=about)


def load_statistics(path: Path, extractor: Extractor, num_frames: int = 1) -> dict[str, Any]:
    """Raises where they are of other features. Files that don't say are pytorch-fid's or ADM's, and so FID's."""
    name = extractor.name_for(num_frames)
    try:
        with np.load(path, allow_pickle=False) as file:
            found: dict[str, Any] = {key: file[key] for key in ("mu", "sigma")}
            about = json.loads(str(file["about"])) if "about" in file.files else None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"real_stats: {path} does not hold mu and sigma: {error}") from error
    if about is None and extractor.standard_for(num_frames) != "FID":
        raise ValueError(f"real_stats: {path} does not say of which features; {name} takes its own. Use --save_stats")
    if about and about["features"] != name:
        raise ValueError(f"real_stats: {path} is of {about['features']}, not of {name}. Make it again")
    return found | (about or {})
