"""Metrics as sums over samples, in fp64, that processes add up and files keep.

    Fréchet     d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)                     Heusel et al. 2017, arXiv 1706.08500
    Inception   exp E[KL(p(y|x) ‖ p(y))] = exp(E[Σ p log p] − Σ p̄ log p̄)       Salimans et al. 2016, arXiv 1606.03498
    precision   share of generated samples that are as near to some real one as its k-th neighbour is; recall: the
                reverse                                                       Kynkäänniemi et al. 2019, arXiv 1904.06991

tests/examples/test_evaluate.py holds the first against torchmetrics and a closed form. torchmetrics' own needs seven
seconds to import and keeps no statistics in files; torch-fidelity needs torchvision.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Count, sum and sum of outer products of feature vectors: what a mean and a covariance take."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """[B, D]"""
        features = features.to(self.sum)
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def over_processes(self) -> Moments:
        return _sum_over_processes(self, self.n, self.sum, self.outer)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        if self.n < 2:
            raise ValueError(f"samples: got {int(self.n)}; a covariance takes at least 2")
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """tr (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and never negative."""
    values, vectors = torch.linalg.eigh(covariance1.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2.double() @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return distance.item()


class InceptionScore:
    """In `splits` parts, by a sample's id modulo `splits`; the spread between them says how sure the score is."""

    def __init__(self, classes: int, device: torch.device | str = "cpu", splits: int = 10):
        self.n = torch.zeros(splits, dtype=torch.float64, device=device)
        self.negative_entropy = torch.zeros_like(self.n)
        self.p = torch.zeros(splits, classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, ids: Tensor) -> None:
        log_p = logits.to(self.p).log_softmax(-1)
        p = log_p.exp()
        split = ids.to(self.n.device) % len(self.n)
        self.n += split.bincount(minlength=len(self.n))
        self.negative_entropy.index_add_(0, split, (p * log_p).sum(-1))
        self.p.index_add_(0, split, p)

    def over_processes(self) -> InceptionScore:
        return _sum_over_processes(self, self.n, self.negative_entropy, self.p)

    def score(self) -> tuple[float, float]:
        """Of all samples together, and the standard deviation between the splits that have any."""

        def of(n: Tensor, negative_entropy: Tensor, p: Tensor) -> Tensor:
            mean = p / n
            return (negative_entropy / n - torch.special.xlogy(mean, mean).sum()).exp()

        whole = of(self.n.sum(), self.negative_entropy.sum(), self.p.sum(0))
        used = [i for i in range(len(self.n)) if self.n[i] > 0]
        each = torch.stack([of(self.n[i], self.negative_entropy[i], self.p[i]) for i in used])
        return whole.item(), each.std(correction=0).item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, block: int = 4096) -> tuple[float, float]:
    """Features [N, D] and [M, D], all at once: distances need every pair."""
    if min(len(real), len(generated)) <= k:
        raise ValueError(
            f"samples: got {len(real)} real and {len(generated)} generated; the {k}-th neighbour takes more"
        )

    def radii(x: Tensor) -> Tensor:
        # The nearest is the point itself.
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(block)])

    def covered(x: Tensor, centres: Tensor, radius: Tensor) -> float:
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in x.split(block)]
        return torch.cat(inside).double().mean().item()

    real, generated = real.double(), generated.double()
    return covered(generated, real, radii(real)), covered(real, generated, radii(generated))


def gather_rows(rows: Tensor) -> Tensor:
    """Every process's rows [n_r, D], in the order of the ranks; n_r may differ."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _sum_over_processes(metric, *tensors: Tensor):
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return metric
