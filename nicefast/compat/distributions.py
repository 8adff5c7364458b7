"""torch.distributions: coupling and scaling as Transforms, the logistic prior as a Distribution.

Transforms run from base to data, as :class:`torch.distributions.TransformedDistribution` has them:
from latent to data, nicefast's inverse. A whole flow is ``flow.distribution()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..layers import AdditiveCoupling
from ..partition import Partition
from ..priors import Logistic

__all__ = ["CouplingTransform", "Logistic", "ScalingTransform"]


class CouplingTransform(Transform):
    """Additive coupling from latent to data: ``x1 = z1``, ``x2 = z2 - m(z1)``; log |det| = 0.

    ``.inv`` is nicefast's forward. Shapes (..., D); the event has one dimension.

    Args:
        partition: which features condition and which are shifted.
        conditioner: m, maps (..., C) to (..., S), or with a context (..., C), (..., K) to it.
        context: handed on to the conditioner, if given.
        cache_size: 0 or 1, as for any Transform.

    >>> import torch, nicefast as nf
    >>> from nicefast.compat.distributions import CouplingTransform, Logistic
    >>> t = CouplingTransform(nf.Partition.half(4), nf.MLP(2, (8,), 2))
    >>> base = torch.distributions.Independent(Logistic(torch.zeros(4), torch.ones(4)), 1)
    >>> d = torch.distributions.TransformedDistribution(base, [t])
    >>> d.log_prob(d.rsample((3,))).shape
    torch.Size([3])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        partition: Partition,
        conditioner: nn.Module,
        context: Tensor | None = None,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size)
        self.layer, self.context = AdditiveCoupling(partition, conditioner), context

    def with_cache(self, cache_size: int = 1) -> CouplingTransform:
        if cache_size == self._cache_size:
            return self
        layer = self.layer
        return CouplingTransform(layer.partition, layer.conditioner, self.context, cache_size)

    def _call(self, z: Tensor) -> Tensor:
        return self.layer.inverse(z, self.context)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        return self.layer(x, self.context)[0]  # type: ignore[no-any-return]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])


class ScalingTransform(Transform):
    """Diagonal scaling from latent to data: ``x = exp(-log_scale) z``, log |det| = -sum(log_scale).

    ``.inv`` is nicefast's forward. Shapes (..., D); the event has one dimension. ValueError where
    it is not of the D features of ``log_scale``.

    >>> import torch
    >>> from nicefast.compat.distributions import ScalingTransform
    >>> t = ScalingTransform(torch.tensor([0.0, 1.0]))
    >>> t.log_abs_det_jacobian(torch.zeros(3, 2), t(torch.zeros(3, 2)))
    tensor([-1., -1., -1.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, log_scale: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        if not isinstance(log_scale, Tensor) or log_scale.ndim != 1:
            shown: Any = tuple(log_scale.shape) if isinstance(log_scale, Tensor) else log_scale
            raise ValueError(f"log_scale must be a tensor of shape (D,), got {shown!r}")
        self.log_scale = log_scale

    def with_cache(self, cache_size: int = 1) -> ScalingTransform:
        return self if cache_size == self._cache_size else type(self)(self.log_scale, cache_size)

    def _call(self, z: Tensor) -> Tensor:
        return self._checked("z", z) * torch.exp(-self.log_scale)

    def _inverse(self, x: Tensor) -> Tensor:
        return self._checked("x", x) * torch.exp(self.log_scale)

    def _checked(self, name: str, values: Tensor) -> Tensor:
        if values.shape[-1:] != self.log_scale.shape:  # broadcast, its log |det| would be another
            raise ValueError(
                f"{name} must have shape (..., {len(self.log_scale)}), one value for each of "
                f"log_scale, got {tuple(values.shape)}"
            )
        return values

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._checked("x", x)
        return (-self.log_scale.sum()).expand(x.shape[:-1])
