"""Gaussians with a sampler, and the mixture of scikit-learn as a density of tensors."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from nicefast.baselines import Gaussian

from .training import Watch

COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 45, 70)
KINDS = (("full", 1e-3), ("full", 1e-4), ("diag", 1e-6))  # covariance, what is added to it


def covariance_parameters(features: int) -> int:
    """D(D+1)/2, the free entries of a symmetric matrix.

    >>> covariance_parameters(32 * 32 * 3)
    4720128
    """
    return features * (features + 1) // 2


def parameters(features: int, covariance: str = "full", components: int = 1) -> int:
    """Free parameters of so many Gaussians and their weights, ``covariance`` full or diag."""
    each = covariance_parameters(features) if covariance == "full" else features
    return components * (features + each) + components - 1


def sample(fitted: Gaussian, n: int, generator: torch.Generator) -> Tensor:
    """``mean + L eps``: (n, D) float64."""
    noise = torch.randn(n, len(fitted.mean), generator=generator, dtype=torch.float64)
    return fitted.mean + (
        noise @ fitted.scale.T if fitted.scale.ndim == 2 else noise * fitted.scale
    )


class Mixture:
    """Maximum likelihood by expectation-maximisation, on standardised features.

    Candidates, from few components to many, are fitted in turn until the time is over, or until
    ``steps`` of them have been; the one with the best validation likelihood stays.
    """

    def __init__(
        self, train: Tensor, validation: Tensor, seed: int, seconds: float, steps: int | None
    ) -> None:
        watch = Watch()
        rows = train.double().flatten(1)
        self.mean, self.deviation = rows.mean(0), rows.std(0)
        standard = ((rows - self.mean) / self.deviation).numpy()
        best, tried_so_far = -float("inf"), 0
        self.covariance = ""
        self.fitted: Any = None
        for components in COMPONENTS:
            for covariance, ridge in KINDS:
                over = watch.seconds >= seconds if steps is None else tried_so_far >= steps
                if tried_so_far and over:
                    break
                tried = GaussianMixture(
                    components, covariance_type=covariance, reg_covar=ridge, random_state=seed
                ).fit(standard)
                tried_so_far += 1
                held = tried.score(self._standard(validation))
                if held > best:
                    best, self.fitted, self.covariance = held, tried, covariance
        self.spent = watch.spent(tried_so_far, tried_so_far * len(rows))

    def _standard(self, x: Tensor) -> Any:
        return ((x.double().flatten(1) - self.mean) / self.deviation).numpy()

    @property
    def components(self) -> int:
        return len(self.fitted.weights_)

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,) float64, nats."""
        found = torch.from_numpy(self.fitted.score_samples(self._standard(x)))
        return found - self.deviation.log().sum()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """A component by its weight, then a Gaussian: (n, D) float64."""
        means, weights = (torch.from_numpy(v) for v in (self.fitted.means_, self.fitted.weights_))
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64)
        drawn = torch.empty_like(noise)
        for k in chosen.unique().tolist():
            mine, covariance = chosen == k, torch.from_numpy(self.fitted.covariances_[k])
            if self.covariance == "full":
                drawn[mine] = means[k] + noise[mine] @ torch.linalg.cholesky(covariance).T
            else:
                drawn[mine] = means[k] + noise[mine] * covariance.sqrt()
        return self.mean + drawn * self.deviation
