"""normflows: its `AffineCoupling` and `AffineCouplingBlock` with scale=False and its
`MaskedAffineFlow` with s=None, fast; nicefast's coupling, scaling and logistic prior as its
classes. A Flow's forward is latent -> data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from normflows.distributions import BaseDistribution
from normflows.flows import reshape
from normflows.flows.affine import coupling as theirs
from normflows.flows.base import Flow
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import layers
from ..layers import runs_more_than_forward
from ..partition import Partition
from ..priors import Logistic as _Logistic
from ..reference import prior_log_prob
from ..runtime import backend
from .coupling import couple, is_traced, zero_log_det
from .parts import Event, normflows_half


class AffineCoupling(theirs.AffineCoupling):  # type: ignore[misc]
    """:class:`normflows.flows.AffineCoupling` with ``scale=False``: halves z = [z1, z2], in and out
    apart. One sum and no branches: there are no features to move.

    >>> import torch
    >>> from nicefast.compat.normflows import AffineCoupling
    >>> z = [torch.randn(3, 2), torch.randn(3, 2)]
    >>> (z1, z2), log_det = AffineCoupling(torch.nn.Linear(2, 2), scale=False)(z)
    >>> z1 is z[0], log_det
    (True, tensor([0., 0., 0.]))
    """

    def forward(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        if self.scale:
            return super().forward(z)
        z1, z2 = z
        z2 = z2 + self.param_map(z1)
        return [z1, z2], zero_log_det(z2)

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        if self.scale:
            return super().inverse(z)
        z1, z2 = z
        z2 = z2 - self.param_map(z1)
        return [z1, z2], zero_log_det(z2)


class AffineCouplingBlock(theirs.AffineCouplingBlock):  # type: ignore[misc]
    """:class:`normflows.flows.AffineCouplingBlock` with ``scale=False``, its features moved in one
    pass: z (N, C, ...) split along dimension 1 or as a checkerboard.

    >>> import torch
    >>> from nicefast.compat.normflows import AffineCouplingBlock
    >>> layer = AffineCouplingBlock(torch.nn.Linear(2, 2), scale=False)
    >>> z = torch.randn(3, 4)
    >>> torch.allclose(layer.inverse(layer(z)[0])[0], z, atol=1e-6)
    True
    """

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(z, True)

    def _both(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        # its parts are not called here: hooks may have come to them, and others in their place
        plain = not is_traced(z) and not _has_any_global_hook() and _block(self.flows) is None
        found = _split(self.flows[0].mode, tuple(z.shape[1:])) if plain else None
        if found is None:
            call = super().inverse if inverse else super().forward  # or its own error
            return call(z)
        mode, coupling = self.flows[0].mode, self.flows[1]
        if mode.startswith("channel") and not backend.uses_kernels(z.device):
            return _beside(z, coupling.param_map, mode, inverse), zero_log_det(z)
        partition, shape = found
        # theirs too hands a view to the conditioner
        y = couple(z, partition, coupling.param_map, shape, inverse, view=True)
        return y, zero_log_det(z)


def _beside(z: Tensor, conditioner: nn.Module, mode: str, inverse: bool) -> Tensor:
    """Of two halves that lie side by side no copy can be saved here, only calls."""
    first, second = z.chunk(2, dim=1)
    z1, z2 = (second, first) if mode == "channel_inv" else (first, second)
    shift = conditioner(z1)
    y2 = z2 - shift if inverse else z2 + shift
    return torch.cat((y2, z1) if mode == "channel_inv" else (z1, y2), 1)


@functools.lru_cache(maxsize=256)
def _split(mode: str, event: Event) -> tuple[Partition, Event] | None:
    """The partition of rows of shape ``event`` by a split of normflows, and the shape of z1; None
    where the library has an error, or one side is empty."""
    if mode not in ("channel", "channel_inv", "checkerboard", "checkerboard_inv") or not event:
        return None
    if event[0] == 1 if mode.startswith("channel") else event[-1] % 2:
        return None
    conditioning, shape = normflows_half(mode, event)
    mask = torch.zeros(torch.Size(event).numel(), dtype=torch.bool, device="cpu")
    mask[conditioning] = True
    return Partition.from_mask(mask), shape


class MaskedAffineFlow(theirs.MaskedAffineFlow):  # type: ignore[misc]
    """:class:`normflows.flows.MaskedAffineFlow` with ``s=None``, its features moved in one pass.

    b = 1 conditions; the full-width ``t`` sees ``b * z``. A shift that is not finite gives NaN, as
    theirs.

    >>> import torch
    >>> from nicefast.compat.normflows import MaskedAffineFlow
    >>> layer = MaskedAffineFlow(torch.tensor([1.0, 0.0]), torch.nn.Linear(2, 2))
    >>> z = torch.randn(3, 2)
    >>> torch.equal(layer(z)[0][:, 0], z[:, 0])
    True
    """

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(z, True)

    def _both(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        b = self.b
        if is_traced(z) or why_not_masked(self) is not None or z.shape[1:] != b.shape[1:]:
            call = super().inverse if inverse else super().forward
            return call(z)
        masked = b * z
        shift = self.t(masked).nan_to_num(torch.nan, torch.nan, torch.nan)
        y = torch.addcmul(masked, 1 - b, z - shift if inverse else z + shift)
        return y, zero_log_det(masked)


def why_not_masked(module: theirs.MaskedAffineFlow) -> str | None:
    """Why a masked flow is not additive, if it is not."""
    if module.__dict__.get("s") is not torch.zeros_like:
        return "not additive: s is given"
    if not isinstance(module._modules.get("t"), nn.Module):
        return "t is no module"
    return None


def recognise(module: Any) -> type[nn.Module] | str:
    """The class that is to take a coupling's place, or why none does."""
    kind = type(module)
    if kind is theirs.AffineCouplingBlock:
        return _block(module.flows) or AffineCouplingBlock
    if kind is theirs.AffineCoupling:
        return "not additive: it scales" if module.scale else AffineCoupling
    if kind is theirs.MaskedAffineFlow:
        return why_not_masked(module) or MaskedAffineFlow
    return "a subclass, whose overrides would be lost"


def _block(flows: Sequence[Any]) -> str | None:
    """Why a block is more than a split, an additive coupling and a merge, if it is."""
    kinds = [type(flow) for flow in flows]
    inner = AffineCoupling if AffineCoupling in kinds else theirs.AffineCoupling  # fast already
    if kinds != [reshape.Split, inner, reshape.Merge]:
        found = ", ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
        return f"its parts are {found}, expected normflows' Split, AffineCoupling and Merge"
    if flows[1].scale:
        return "not additive: it scales"
    if flows[0].mode != flows[2].mode:
        return f"it splits by {flows[0].mode} and merges by {flows[2].mode}"
    if any(runs_more_than_forward(flow) or "inverse" in flow.__dict__ for flow in flows):
        return "a part of it has hooks, or a forward of its own"
    return None


class AdditiveCoupling(layers.AdditiveCoupling, Flow):  # type: ignore[misc]
    """:class:`nicefast.AdditiveCoupling` as a normflows Flow: its forward is latent -> data, which
    subtracts the shift, and its inverse data -> latent.

    >>> import normflows, torch, nicefast as nf
    >>> from nicefast.compat.normflows import AdditiveCoupling, Logistic, Scaling
    >>> layers = [Scaling(4), AdditiveCoupling(nf.Partition.half(4), nf.MLP(2, (8,), 2))]
    >>> normflows.NormalizingFlow(Logistic(4), layers).log_prob(torch.randn(3, 4)).shape
    torch.Size([3])
    """

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layers.AdditiveCoupling.inverse(self, z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layers.AdditiveCoupling.forward(self, x, context)


class Scaling(layers.Scaling, Flow):  # type: ignore[misc]
    """:class:`nicefast.Scaling` as a normflows Flow, see :class:`AdditiveCoupling`."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layers.Scaling.inverse(self, z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layers.Scaling.forward(self, x, context)


class Logistic(BaseDistribution):  # type: ignore[misc]
    """The standard logistic prior over events of ``shape``, as a base of normflows.

    ``log p(z) = sum_d -softplus(z_d) - softplus(-z_d)``, in nats; samples are never infinite.

    >>> import torch
    >>> from nicefast.compat.normflows import Logistic
    >>> z, log_prob = Logistic(2)(5)
    >>> z.shape, torch.allclose(Logistic(2).log_prob(z), log_prob)
    (torch.Size([5, 2]), True)
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def forward(self, num_samples: int = 1, context: None = None) -> tuple[Tensor, Tensor]:
        prior = _Logistic(self._like, torch.ones_like(self._like))
        z = prior.sample((num_samples, *self.shape))
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor, context: None = None) -> Tensor:
        return prior_log_prob(z, "logistic").flatten(1).sum(1)
