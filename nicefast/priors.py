"""The factorised priors of a NICE flow, as torch distributions.

Logistic, ``log p(z) = -softplus(z) - softplus(-z)``, and normal (Dinh et al. 2014, section 3.4).
A flow's own log-density goes through the fused kernel; these are for everything else: sampling,
quantiles, entropies, goodness-of-fit tests.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from .checks import check_type
from .reference import check_prior

_Shape = torch.Size | list[int] | tuple[int, ...]


class Logistic(Distribution):
    """Logistic distribution.

    ``log p(z) = -softplus(u) - softplus(-u) - log(scale)``, ``u = (z - loc) / scale``, in nats.

    Finite for every finite input; samples are never infinite. Shapes and dtypes follow ``loc`` and
    ``scale``, broadcast together. ValueError for a scale that is not positive.

    >>> import torch, nicefast as nf
    >>> nf.priors.Logistic(0.0, 1.0).log_prob(torch.tensor(1e4))
    tensor(-10000.)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        for name, given in (("loc", loc), ("scale", scale)):
            check_type(name, given, (Real, Tensor), "a number or a tensor")
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: _Shape, _instance: Logistic | None = None) -> Logistic:
        new = self._get_checked_instance(Logistic, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(Logistic, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """``(pi scale)^2 / 3``."""
        return (math.pi * self.scale) ** 2 / 3

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        u = (value - self.loc) / self.scale
        return logsigmoid(u) + logsigmoid(-u) - self.scale.log()

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:
        """``loc + scale (log u - log(1 - u))``; u is kept away from 0 and 1, so never infinite."""
        shape = self._extended_shape(torch.Size(sample_shape))
        work = torch.float64 if self.loc.dtype == torch.float64 else torch.float32
        eps = torch.finfo(work).eps
        u = torch.rand(shape, dtype=work, device=self.loc.device).clamp_(eps / 4, 1 - eps / 2)
        return self.loc + self.scale * torch.logit(u).to(self.loc.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return torch.sigmoid((value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        return self.loc + self.scale * torch.logit(value)

    def entropy(self) -> Tensor:
        """``log(scale) + 2`` nats."""
        return self.scale.log() + 2


_CLASSES: dict[str, type[Logistic] | type[Normal]] = {"logistic": Logistic, "normal": Normal}


def standard(
    prior: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Logistic | Normal:
    """The standard prior of that name (location 0, scale 1), one-dimensional.

    >>> import nicefast as nf
    >>> nf.priors.standard("normal").stddev
    tensor(1.)
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    return _CLASSES[check_prior(prior)](zero, torch.ones_like(zero))
