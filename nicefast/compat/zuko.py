"""zuko: its `GeneralCouplingTransform` of `AdditiveTransform`, fast, with the same parameters and
results; nicefast's coupling, scaling and logistic prior as its lazy classes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Transform
from zuko import transforms
from zuko.flows import coupling as theirs
from zuko.lazy import Flow, LazyTransform, UnconditionalDistribution
from zuko.utils import broadcast

from ..checks import check_count
from ..fingerprint import Fingerprinted
from ..layers import describe_coupling
from ..partition import Partition
from ..priors import Logistic as _Logistic
from .coupling import contents, indices, is_overridden, is_traced, partition_of, shifted, split
from .distributions import CouplingTransform as _CouplingTransform
from .distributions import ScalingTransform as _ScalingTransform

_ADDITIVE: dict[str, Any] = {"univariate": transforms.AdditiveTransform, "shapes": [()]}


class CouplingTransform(transforms.CouplingTransform):  # type: ignore[misc]
    """One coupling under one context: ``y_b = x_b + hyper([x_a; c])``, rows of any batch shape.

    ``of`` is the lazy coupling, ``partition`` the one that its mask says.
    """

    def __init__(
        self, of: theirs.GeneralCouplingTransform, partition: Partition, c: Tensor | None
    ) -> None:
        Transform.__init__(self)  # theirs would look for the mask's indices in every call
        self.of, self.partition, self.context, self.meta = of, partition, c, partial(of.meta, c)
        device = of.mask.device
        self._sides = indices(partition, device, True), indices(partition, device, False)

    @property
    def idx_a(self) -> Tensor:
        return self._sides[0].clone()  # the memory of our own is shared

    @property
    def idx_b(self) -> Tensor:
        return self._sides[1].clone()

    def _is_plain(self, x: Tensor) -> bool:
        return not is_traced(x) and why_not(self.of) is None

    def _call(self, x: Tensor) -> Tensor:
        return self._shifted(x, False) if self._is_plain(x) else super()._call(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._shifted(y, True) if self._is_plain(y) else super()._inverse(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._is_plain(x):
            return super().log_abs_det_jacobian(x, y)
        return torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_plain(x):
            return super().call_and_ladj(x)  # type: ignore[no-any-return]
        return self._shifted(x, False), self.log_abs_det_jacobian(x, x)

    def _shifted(self, x: Tensor, inverse: bool) -> Tensor:
        rows, x1 = split(x, self.partition)
        if self.context is not None:
            x1 = torch.cat(broadcast(x1, self.context, ignore=1), dim=-1)
        return shifted(rows, self.of.hyper(x1), self.partition, inverse)


class GeneralCouplingTransform(theirs.GeneralCouplingTransform):  # type: ignore[misc]
    """:class:`zuko.flows.coupling.GeneralCouplingTransform` of ``AdditiveTransform``, its features
    moved in one pass.

    Called with a context c (..., K) or None it gives a transform from data to latent; mask True
    conditions. A conditioner that writes over its input does not change y_a, as it does in zuko.

    In training mode, dropout in the conditioner draws its units anew in each call of it, as in
    zuko. ``log_abs_det_jacobian``, and ``call_and_ladj`` of the inverse, call the conditioner once
    less than zuko does, since the log-determinant is 0: random numbers that are drawn later, and
    running statistics of a BatchNorm, then differ from zuko's. Call ``eval()`` to compare.

    >>> import torch
    >>> from zuko.transforms import AdditiveTransform
    >>> from nicefast.compat.zuko import GeneralCouplingTransform
    >>> layer = GeneralCouplingTransform(3, univariate=AdditiveTransform, shapes=[()])
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(layer().inv(layer()(x)), x, atol=1e-6)
    True
    """

    def forward(self, c: Tensor | None = None) -> Transform:
        mask = self.mask
        known = mask.dtype == torch.bool and mask.dim() == 1
        if not known or is_traced(mask) or why_not(self) is not None:
            return super().forward(c)
        partition = partition_of(contents(mask))
        return super().forward(c) if partition is None else CouplingTransform(self, partition, c)


def why_not(module: theirs.GeneralCouplingTransform) -> str | None:
    """Why a coupling is not additive, if it is not."""
    if is_overridden(module, ("meta",)):
        return "it has a method of its own: meta"
    if module.univariate is not transforms.AdditiveTransform:
        name = getattr(module.univariate, "__name__", type(module.univariate).__name__)
        return f"not additive: its univariate transform is {name}"
    if [tuple(shape) for shape in module.shapes] != [()]:
        return f"its transform has parameters of the shapes {list(module.shapes)}, expected [()]"
    return None


def recognise(module: nn.Module) -> type[nn.Module] | str:
    """The class that is to take a coupling's place, or why none does."""
    if type(module) is not theirs.GeneralCouplingTransform:
        return "a subclass, whose overrides would be lost"
    return why_not(module) or GeneralCouplingTransform


class AdditiveCoupling(Fingerprinted, LazyTransform):  # type: ignore[misc]
    """Additive coupling from data to latent as a lazy transform of zuko; the conditioner is called
    as ``m(x1)``, or ``m(x1, c)`` under a context c (..., K).

    >>> import torch, zuko, nicefast as nf
    >>> from nicefast.compat.zuko import AdditiveCoupling, Logistic, Scaling
    >>> layer = AdditiveCoupling(nf.Partition.half(4), nf.MLP(2, (8,), 2))
    >>> zuko.lazy.Flow([layer, Scaling(4)], Logistic(4))().log_prob(torch.randn(3, 4)).shape
    torch.Size([3])
    """

    def __init__(self, partition: Partition, conditioner: nn.Module) -> None:
        super().__init__()
        self.partition, self.conditioner = partition, conditioner

    says = "partition"

    def described(self) -> str:
        return describe_coupling(self.partition)

    def forward(self, c: Tensor | None = None) -> Transform:
        return _CouplingTransform(self.partition, self.conditioner, c).inv


class Scaling(LazyTransform):  # type: ignore[misc]
    """Diagonal scaling ``z = exp(log_scale) h`` as a lazy transform of zuko; a context is ignored.

    See :class:`AdditiveCoupling`. ValueError for features < 1.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        features = check_count("features", features, 1)
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, c: Tensor | None = None) -> Transform:
        return _ScalingTransform(self.log_scale).inv


class Logistic(UnconditionalDistribution):  # type: ignore[misc]
    """The standard logistic prior over ``features`` features, as the base of a zuko Flow.

    ``log p(z) = sum_d -softplus(z_d) - softplus(-z_d)``, in nats; samples are never infinite.

    >>> import torch
    >>> from nicefast.compat.zuko import Logistic
    >>> Logistic(2)().log_prob(torch.zeros(3, 2))
    tensor([-2.7726, -2.7726, -2.7726])
    """

    def __init__(self, features: int) -> None:
        super().__init__(_rows, torch.zeros(features), torch.ones(features), buffer=True)


def _rows(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(_Logistic(loc, scale), 1)


class NICE(Flow):  # type: ignore[misc]
    """NICE as a flow of zuko: additive couplings, a scaling and the logistic prior.

    :class:`zuko.flows.NICE` has affine couplings and a normal base; this has those of the paper
    (Dinh et al. 2014, sections 3.2 to 3.4), and goes through :func:`nicefast.convert`.

    Args:
        features: D.
        context: features of the context, 0 for none.
        transforms: how many couplings.
        randmask: random masks; else odd and even features condition in turn.
        kwargs: of :class:`zuko.nn.MLP`, as ``hidden_features`` and ``activation``.

    Called with a context c (..., K) or None it gives a distribution of x (..., D). ValueError for
    fewer than 2 features.

    >>> import torch
    >>> from nicefast.compat.zuko import NICE
    >>> flow = NICE(3, context=2, hidden_features=(16, 16))
    >>> flow(torch.randn(5, 2)).log_prob(torch.randn(5, 3)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        randmask: bool = False,
        **kwargs: Any,
    ) -> None:
        if features < 2:
            raise ValueError(f"features must be at least 2, got {features!r}")
        couplings = []
        for i in range(transforms):
            order = torch.randperm(features) if randmask else torch.arange(features)
            mask = order % 2 == i % 2
            couplings.append(
                GeneralCouplingTransform(features, context, mask, **_ADDITIVE, **kwargs)
            )
        super().__init__([*couplings, Scaling(features)], Logistic(features))
