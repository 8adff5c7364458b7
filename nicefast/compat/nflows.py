"""nflows: its `AdditiveCouplingTransform`, fast, with the same arguments, parameters and results;
nicefast's coupling and scaling as its Transforms, the logistic prior as a Distribution of it."""

from __future__ import annotations

import functools
from math import prod

import numpy as np
import torch
from nflows.distributions.base import Distribution
from nflows.transforms import coupling as theirs
from nflows.transforms.base import Transform
from nflows.utils import torchutils
from torch import Tensor, nn

from .. import layers
from ..partition import Partition
from ..priors import Logistic as _Logistic
from ..reference import prior_log_prob
from .coupling import contents, couple, is_overridden, is_traced, partition_of, zero_log_det


class AdditiveCouplingTransform(theirs.AdditiveCouplingTransform):  # type: ignore[misc]
    """:class:`nflows.transforms.AdditiveCouplingTransform`, its features moved in one pass.

    ``mask > 0`` is shifted, ``mask <= 0`` conditions; inputs (N, D) or (N, C, H, W), split along
    dimension 1; ``(inputs, context=None) -> (outputs, logabsdet (N,))``, also of ``inverse``. A
    conditioner that writes over its input does not change the outputs, as it does in nflows.

    >>> import torch
    >>> from nicefast.compat.nflows import AdditiveCouplingTransform
    >>> layer = AdditiveCouplingTransform([0, 1], lambda i, o: lambda x, context: 2 * x)
    >>> layer(torch.tensor([[1.0, 5.0]]))[0]
    tensor([[1., 7.]])
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._both(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._both(inputs, context, True)

    def _both(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        fits = inputs.dim() in (2, 4) and inputs.shape[1] == self.features
        call = super().inverse if inverse else super().forward
        given, moved = self.identity_features, self.transform_features
        if (
            not fits
            or is_traced(inputs, given, moved)
            or self.unconditional_transform is not None
            or is_overridden(self, _STEPS)
        ):
            return call(inputs, context)  # or its own error
        if not given.device == moved.device == _CPU:
            y = self._indexed(inputs, context, inverse)
        else:
            event = tuple(inputs.shape[1:])
            sides = ((contents(side), side.dtype) for side in (given, moved))
            partition = _split(event, *sides)
            if partition is None:
                return call(inputs, context)
            y = couple(
                inputs,
                partition,
                lambda x1: self.transform_net(x1, context),
                (len(given), *event[1:]),
                inverse,
            )
        return y, zero_log_det(inputs)

    def _indexed(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        """Without a look at the indices, for which a device would have to be waited for."""
        shift = self.transform_net(inputs[:, self.identity_features], context)
        y, x2 = inputs.clone(), inputs[:, self.transform_features]
        y[:, self.transform_features] = x2 - shift if inverse else x2 + shift
        return y


# what of theirs its own forward and inverse call
_STEPS = ("_coupling_transform_forward", "_coupling_transform_inverse", "_scale_and_shift")
_CPU = torch.device("cpu")
_Side = tuple[bytes, torch.dtype]


@functools.lru_cache(maxsize=256)
def _split(event: tuple[int, ...], given: _Side, moved: _Side) -> Partition | None:
    """The partition of rows of shape ``event`` by the indices of the channels that condition and
    of those that are shifted; None where they are not both ascending, or not all channels."""
    if not given[1] == moved[1] == torch.int64:
        return None
    conditioning, shifted = (np.frombuffer(side[0], np.int64).tolist() for side in (given, moved))
    if sorted(conditioning) != conditioning or sorted(shifted) != shifted:
        return None
    if sorted(conditioning + shifted) != list(range(event[0])):
        return None
    known = set(conditioning)
    return partition_of(b"".join(bytes([i in known]) * prod(event[1:]) for i in range(event[0])))


def recognise(module: nn.Module) -> type[nn.Module] | str:
    """The class that is to take a coupling's place, or why none does."""
    if not isinstance(module, theirs.AdditiveCouplingTransform):
        return "not additive"
    if type(module) is not theirs.AdditiveCouplingTransform:
        return "a subclass, whose overrides would be lost"
    if module.unconditional_transform is not None:
        return "its conditioning features have a transform of their own"
    if not module.num_identity_features or not module.num_transform_features:
        return "one side of its mask is empty"
    return AdditiveCouplingTransform


class AdditiveCoupling(layers.AdditiveCoupling, Transform):  # type: ignore[misc]
    """:class:`nicefast.AdditiveCoupling` as an nflows Transform.

    >>> import torch, nicefast as nf
    >>> from nflows.transforms import CompositeTransform
    >>> from nicefast.compat.nflows import AdditiveCoupling, Scaling
    >>> layer = AdditiveCoupling(nf.Partition.half(4), nf.MLP(2, (8,), 2))
    >>> CompositeTransform([layer, Scaling(4)])(torch.randn(3, 4))[1].shape
    torch.Size([3])
    """


class Scaling(layers.Scaling, Transform):  # type: ignore[misc]
    """:class:`nicefast.Scaling` as an nflows Transform, see :class:`AdditiveCoupling`."""


class Logistic(Distribution):  # type: ignore[misc]
    """The standard logistic prior over events of ``shape``, as an nflows Distribution.

    ``log p(z) = sum_d -softplus(z_d) - softplus(-z_d)``, in nats; samples are never infinite. A
    context is ignored but for its size and device, as nflows' StandardNormal does.

    >>> import torch
    >>> from nicefast.compat.nflows import Logistic
    >>> Logistic((2,)).log_prob(torch.zeros(3, 2))
    tensor([-2.7726, -2.7726, -2.7726])
    """

    def __init__(self, shape: tuple[int, ...] | torch.Size) -> None:
        super().__init__()
        self._shape = torch.Size(shape)
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        if inputs.shape[1:] != self._shape:
            raise ValueError(
                f"inputs must have shape (N, {', '.join(map(str, self._shape))}), "
                f"got {tuple(inputs.shape)}"
            )
        return prior_log_prob(inputs, "logistic").flatten(1).sum(1)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        like = self._like if context is None else self._like.to(context.device)
        rows = num_samples * (1 if context is None else len(context))
        drawn = _Logistic(like, torch.ones_like(like)).sample((rows, *self._shape))
        if context is None:
            return drawn
        return torchutils.split_leading_dim(drawn, [len(context), num_samples])  # type: ignore[no-any-return]

    def _mean(self, context: Tensor | None) -> Tensor:
        if context is None:
            return self._like.new_zeros(self._shape)
        return context.new_zeros(len(context), *self._shape)
