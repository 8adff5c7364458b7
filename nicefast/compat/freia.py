"""FrEIA: `NICECouplingBlock`, fast, with the same arguments, parameters and results; nicefast's
coupling and scaling as its modules. FrEIA 0.2 has no base distributions: `log_prob` of the latents
is the torch Distribution :class:`nicefast.priors.Logistic`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from FrEIA.modules import InvertibleModule
from FrEIA.modules import coupling_layers as theirs
from torch import Tensor, nn

from .. import layers
from ..partition import Partition
from .coupling import is_overridden, is_traced

_STEPS = ("_coupling1", "_coupling2")  # what of theirs its own forward calls


class NICECouplingBlock(theirs.NICECouplingBlock):  # type: ignore[misc]
    """:class:`FrEIA.modules.NICECouplingBlock`: ``y1 = x1 + F(x2)``, then ``y2 = x2 + G(y1)``.

    Without gradients both halves are written straight into the output, with no cat.
    ``((x,), c, rev, jac) -> ((y,), 0.0)``, x (N, C, ...) split along dimension 1.

    >>> import torch
    >>> from nicefast.compat.freia import NICECouplingBlock
    >>> block = NICECouplingBlock([(4,)], subnet_constructor=torch.nn.Linear)
    >>> x = torch.randn(5, 4)
    >>> (y,), log_det = block((x,))
    >>> torch.allclose(block((y,), rev=True)[0][0], x, atol=1e-6), log_det
    (True, 0.0)
    """

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], float]:
        given = x[0]
        # out= has no gradients
        if is_traced(given) or torch.is_grad_enabled() or is_overridden(self, _STEPS):
            return super().forward(x, c, rev, jac)  # type: ignore[no-any-return]
        y = torch.empty_like(given, memory_format=torch.contiguous_format)
        sizes = [self.split_len1, self.split_len2]
        (x1, x2), (out1, out2) = given.split(sizes, 1), y.split(sizes, 1)
        if rev:
            y2 = _into(out2, torch.sub, x2, self._shift(self.G, x1, c))
            y1 = _into(out1, torch.sub, x1, self._shift(self.F, y2, c))
        else:
            y1 = _into(out1, torch.add, x1, self._shift(self.F, x2, c))
            y2 = _into(out2, torch.add, x2, self._shift(self.G, y1, c))
        return (y if y1 is out1 and y2 is out2 else torch.cat((y1, y2), 1),), 0.0

    def _shift(self, net: nn.Module, features: Tensor, c: Sequence[Tensor]) -> Tensor:
        shift: Tensor = net(torch.cat([features, *c], 1) if self.conditional else features)
        return shift


def _into(out: Tensor, call: Callable[..., Tensor], x: Tensor, shift: Tensor) -> Tensor:
    """``call(x, shift)``, written into ``out`` where it fits: same shape, no wider dtype."""
    narrow = shift.dtype == x.dtype or torch.promote_types(x.dtype, shift.dtype) == x.dtype
    return call(x, shift, out=out) if narrow and shift.shape == x.shape else call(x, shift)


def recognise(module: nn.Module) -> type[nn.Module] | str:
    """The class that is to take a coupling's place, or why none does."""
    if not isinstance(module, theirs.NICECouplingBlock):
        return "not additive"
    if type(module) is not theirs.NICECouplingBlock:
        return "a subclass, whose overrides would be lost"
    if not module.split_len1 or not module.split_len2:
        return "one side of its split is empty"
    return NICECouplingBlock


class _Layer(InvertibleModule):  # type: ignore[misc]
    """A layer of nicefast over events of any shape, flattened row by row; the one condition, if
    there is one, is its context (N, K)."""

    layer: nn.Module

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        rows, context = x[0].flatten(1), c[0] if c else None
        call = self.layer.inverse if rev else self.layer
        y, log_det = call(rows, context)  # type: ignore[operator]
        return (y.view(x[0].shape),), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return input_dims


def _features(dims_in: Sequence[Sequence[int]]) -> int:
    if len(dims_in) != 1:
        raise ValueError(f"dims_in must be of one input, got {len(dims_in)}")
    return torch.Size(dims_in[0]).numel()


class AdditiveCoupling(_Layer):
    """:class:`nicefast.AdditiveCoupling` as a FrEIA module: forward is data -> latent.

    ``partition`` splits the features of ``dims_in``, flattened row by row; a condition is the
    conditioner's context. ValueError where their numbers differ.

    >>> import torch, nicefast as nf
    >>> from FrEIA.framework import SequenceINN
    >>> from nicefast.compat.freia import AdditiveCoupling, Scaling
    >>> inn = SequenceINN(4)
    >>> half, m = nf.Partition.half(4), nf.MLP(2, (8,), 2)
    >>> inn.append(AdditiveCoupling, partition=half, conditioner=m); inn.append(Scaling)
    >>> z, log_det = inn(torch.randn(3, 4))
    >>> z.shape, log_det.shape
    (torch.Size([3, 4]), torch.Size([3]))
    """

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] = (),
        *,
        partition: Partition,
        conditioner: nn.Module,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if _features(dims_in) != partition.features:
            raise ValueError(
                f"partition must split {_features(dims_in)} features, as dims_in has, "
                f"got {partition.features} ({partition})"
            )
        self.layer = layers.AdditiveCoupling(partition, conditioner)


class Scaling(_Layer):
    """:class:`nicefast.Scaling` as a FrEIA module: ``log_det = sum(log_scale)`` forward, and its
    negative in reverse (FrEIA 0.2's own LearnedElementwiseScaling has the same sign both ways)."""

    def __init__(
        self, dims_in: Sequence[Sequence[int]], dims_c: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__(dims_in, dims_c)
        self.layer = layers.Scaling(_features(dims_in))
