"""How good samples are, for all models alike, in one feature space.

Features are the leading principal components of the training rows. Precision and recall:
Kynkaanniemi et al. 2019 (arXiv 1904.06991, equations 1 and 2), k = 3. Kernel MMD: the unbiased
estimate of Gretton et al. 2012 (JMLR 13, equation 3), Gaussian kernel, its width the median
distance of training rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COMPONENTS, ROWS, NEIGHBOURS = 32, 2000, 3


class Quality(NamedTuple):
    """Share of samples among the real rows, share of real rows among samples, MMD squared."""

    precision: float
    recall: float
    mmd2: float


class Judge:
    """A feature space and a kernel, both of the training rows ``x`` (N, D)."""

    def __init__(self, x: Tensor) -> None:
        rows = x.double().flatten(1)
        self.mean = rows.mean(0)
        centred = rows - self.mean
        vectors = torch.linalg.eigh(centred.T @ centred)[1].flip(1)
        self.components = vectors[:, :COMPONENTS]
        some = self.features(x[:ROWS])
        self.width = torch.pdist(some).median().item()

    def features(self, x: Tensor) -> Tensor:
        return (x.double().flatten(1) - self.mean) @ self.components

    def __call__(self, real: Tensor, made: Tensor) -> Quality:
        a, b = self.features(real), self.features(made)
        return Quality(covered(a, b), covered(b, a), mmd2(a, b, self.width))


def covered(support: Tensor, points: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of points that lie within the k-th neighbour's distance of some row of the support.

    With real rows as support and samples as points this is precision; the other way, recall.
    ValueError where the support has no k neighbours for each row.
    """
    if len(support) <= k:
        raise ValueError(f"support must have more than {k} rows, got {len(support)}")
    radii = _distances(support, support).kthvalue(k + 1, 1).values  # the nearest is the row itself
    return (_distances(points, support) <= radii).any(1).double().mean().item()


def mmd2(x: Tensor, y: Tensor, width: float) -> float:
    """Squared maximum mean discrepancy, without bias: it may fall below zero.

    >>> round(mmd2(torch.zeros(3, 1), torch.full((3, 1), 9.0), 1.0), 6)
    2.0
    """

    def within(a: Tensor) -> Tensor:
        kernel, n = _kernel(a, a, width), len(a)
        return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))

    return (within(x) + within(y) - 2 * _kernel(x, y, width).mean()).item()


def _kernel(a: Tensor, b: Tensor, width: float) -> Tensor:
    return torch.exp(-_distances(a, b).square() / (2 * width**2))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
