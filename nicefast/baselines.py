"""The simple answers to the question a flow answers: Gaussians fitted by maximum likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_type


@dataclass(frozen=True)
class Gaussian:
    """A normal density ``N(mean, L L^T)`` over rows of D features, in float64.

    Made by :meth:`full` or :meth:`diagonal`, which fit by exact maximum likelihood: the mean and
    the covariance (divided by N) of the rows, without any ridge.

    Attributes:
        mean: (D,).
        scale: the Cholesky factor L (D, D) of the covariance, or the standard deviations (D,).

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
    >>> Gaussian.diagonal(x).mean
    tensor([1., 2.], dtype=torch.float64)
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def full(cls, x: Tensor) -> Gaussian:
        """Fit mean and full covariance to ``x`` (N, ...), flattened to (N, D).

        Raises ValueError where the covariance is singular: the likelihood then has no maximum.
        """
        rows = _rows(x)
        mean = rows.mean(0)
        centred = rows - mean
        covariance = centred.T @ centred / len(rows)
        # Judged on the correlations, so that the features' units do not matter.
        deviations = covariance.diagonal().sqrt()
        spectrum = torch.linalg.eigvalsh(covariance / torch.outer(deviations, deviations))
        if len(rows) <= len(mean) or spectrum[0] <= len(mean) * _EPS * spectrum[-1]:
            raise ValueError(
                f"the covariance of {len(rows)} rows of {len(mean)} features is singular: "
                "some features are linear functions of the others, or the rows are too few"
            )
        return cls(mean, torch.linalg.cholesky(covariance))

    @classmethod
    def diagonal(cls, x: Tensor) -> Gaussian:
        """Fit mean and variances to ``x`` (N, ...); ValueError where a feature is constant."""
        rows = _rows(x)
        return cls(rows.mean(0), rows.std(0, correction=0))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each row of ``x`` (N, ...), in nats: (N,) float64.

        Raises ValueError for rows with another number of features than were fitted.
        """
        rows = _flat(x)
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"x must have {len(self.mean)} features, got shape {tuple(x.shape)}")
        centred = rows - self.mean
        if self.scale.ndim == 1:
            u, log_det = centred / self.scale, self.scale.log().sum()
        else:
            u = torch.linalg.solve_triangular(self.scale, centred.T, upper=False).T
            log_det = self.scale.diagonal().log().sum()
        return -0.5 * u.square().sum(1) - log_det - 0.5 * len(self.mean) * math.log(2 * math.pi)


_EPS = torch.finfo(torch.float64).eps


def _flat(x: Tensor) -> Tensor:
    """``x`` as (N, D) in float64."""
    check_type("x", x, Tensor, "a torch.Tensor")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, ...), got {tuple(x.shape)}")
    return x.double().flatten(1)


def _rows(x: Tensor) -> Tensor:
    """``x`` as (N, D) in float64, or a ValueError where no density can be fitted to it."""
    rows = _flat(x)
    if len(rows) < 2 or not rows.isfinite().all():
        raise ValueError(f"x must be two or more rows of finite values, got {tuple(x.shape)}")
    constant = (rows.amin(0) == rows.amax(0)).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:5])) + (", ..." if len(constant) > 5 else "")
        raise ValueError(f"the covariance is singular: constant features (index {shown})")
    return rows
