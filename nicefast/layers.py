"""The modules a flow is built from: conditioner, additive coupling, scaling.

Couplings and scaling map ``(x, context=None) -> (y, log_det)`` and have an ``inverse`` of the same
form; forward is data -> latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import functional as F  # noqa: N812
from .ops import check_log_scale
from .partition import Partition
from .reference import ACTIVATIONS, at_least_float32


class MLP(nn.Module):
    """Multi-layer perceptron ``linear(activation(... linear([x; context])))``.

    The usual conditioner; its layers are ordinary ``nn.Linear`` in ``.linears``.

    Args:
        in_features: C, features of x.
        hidden: widths of the hidden layers; ``()`` leaves one linear layer.
        out_features: S.
        activation: one of relu, leaky_relu (slope 0.01), tanh, gelu, silu, elu.
        context: features of the context, 0 for none.
        dropout: probability with which, in training mode, each hidden unit is dropped after its
            activation; the density is then that of a random sub-network.

    Shapes: x (..., C), context (..., K) -> (..., S). Inputs are brought to the weights' dtype.

    Raises:
        ValueError: a width below 1, an unknown activation, a dropout outside [0, 1), a context
            that is missing or unexpected.

    >>> import torch, nicefast as nf
    >>> nf.MLP(3, (16, 16), 2, activation="silu")(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """

    linears: nn.ModuleList

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: str = "relu",
        context: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if isinstance(hidden, int):
            hidden = (hidden,)
        widths = [in_features, *hidden, out_features]
        if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(
                f"in_features, hidden and out_features must be integers >= 1, "
                f"got {in_features!r}, {tuple(hidden)!r}, {out_features!r}"
            )
        if not isinstance(context, int) or context < 0:
            raise ValueError(f"context must be an integer >= 0, got {context!r}")
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.context, self.dropout = activation, context, float(dropout)
        widths[0] += context
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = cast("list[nn.Linear]", list(self.linears))
        x = x.to(first.weight.dtype)
        if (context is None) != (self.context == 0):
            raise ValueError(
                f"context must have {self.context} features, got none"
                if context is None
                else f"context was given ({tuple(context.shape)}) to an MLP without context"
            )
        if context is None:
            h = first(x)
        else:
            # two products instead of a cat of the data with its context
            w, w_context = first.weight.split((self.in_features, self.context), 1)
            h = nn.functional.linear(x, w) + nn.functional.linear(
                context.to(x.dtype), w_context, first.bias
            )
        activate = ACTIVATIONS[self.activation]
        for linear in others:
            h = activate(h)
            if self.drops:
                h = _dropout(h, self.dropout)
            h = linear(h)
        return h

    @property
    def drops(self) -> bool:
        """Whether a call drops units: with ``dropout``, in training mode."""
        return self.training and self.dropout > 0

    def extra_repr(self) -> str:
        rest = {"context": self.context, "dropout": self.dropout}
        return ", ".join(
            (f"activation={self.activation}", *(f"{k}={v}" for k, v in rest.items() if v))
        )


class AdditiveCoupling(nn.Module):
    """Additive coupling: ``y1 = x1``, ``y2 = x2 + m(x1)``; log |det| = 0.

    Any module will do as the conditioner m: it is called as ``m(x1)``, or ``m(x1, context)`` where
    a context is given, and returns one value for each shifted feature. It needs no inverse
    (Dinh et al. 2014, section 3.2).

    Args:
        partition: which features condition and which are shifted.
        conditioner: maps (..., C) to (..., S).

    Shapes: ``(x (..., D), context) -> (y (..., D), log_det (...))``. log_det is an expanded zero.
    Errors as in :func:`nicefast.functional.additive_coupling`.

    >>> import torch, nicefast as nf
    >>> p = nf.Partition.half(4)
    >>> layer = nf.AdditiveCoupling(p, torch.nn.Linear(2, 2))
    >>> y, log_det = layer(torch.ones(3, 4))
    >>> torch.allclose(layer.inverse(y)[0], torch.ones(3, 4))
    True
    """

    def __init__(self, partition: Partition, conditioner: nn.Module) -> None:
        super().__init__()
        if not isinstance(partition, Partition):
            raise TypeError(
                f"partition must be a nicefast.Partition, got {type(partition).__name__}"
            )
        if not isinstance(conditioner, nn.Module):
            raise TypeError(
                f"conditioner must be a torch.nn.Module, got {type(conditioner).__name__}"
            )
        self.partition = partition
        self.conditioner = conditioner

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, x1 = F.split_features(x, self.partition)
        y = F.additive_coupling(x, self._shift(x1, context), self.partition)
        return y, _zero_log_det(y)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, y1 = F.split_features(y, self.partition)
        x = F.additive_coupling(y, self._shift(y1, context), self.partition, inverse=True)
        return x, _zero_log_det(x)

    @torch.no_grad()
    def inverse_(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """:meth:`inverse` written over ``y``, for inference; records no gradient."""
        y1 = F.split_features(y, self.partition)[1]
        return F.additive_coupling_(y, self._shift(y1, context), self.partition, inverse=True)

    def _shift(self, x1: Tensor, context: Tensor | None) -> Tensor:
        return self.conditioner(x1) if context is None else self.conditioner(x1, context)

    def extra_repr(self) -> str:
        return repr(self.partition)


class Scaling(nn.Module):
    """Diagonal scaling ``z = exp(log_scale) * h``, ``log_det = sum(log_scale)``.

    The one layer that changes volume (Dinh et al. 2014, section 3.3). Starts as the identity.

    Shapes: ``(h (..., D)) -> (z (..., D), log_det (...))``. ValueError for another number of
    features and, on the CPU, for a non-finite ``log_scale``.

    >>> import torch, nicefast as nf
    >>> nf.Scaling(3)(torch.ones(2, 3))[1]
    tensor([0., 0.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        if not isinstance(features, int) or features < 1:
            raise ValueError(f"features must be an integer >= 1, got {features!r}")
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, h: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = self._checked("h", h)
        return h * s.exp(), s.sum().expand(h.shape[:-1])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = self._checked("z", z)
        return z * (-s).exp(), (-s.sum()).expand(z.shape[:-1])

    def _checked(self, name: str, x: Tensor) -> Tensor:
        """log_scale in at least float32, after a look at both."""
        features = self.log_scale.shape[0]
        if x.ndim < 1 or x.shape[-1] != features:
            raise ValueError(
                f"{name} must have {features} features in its last dimension, "
                f"got shape {tuple(x.shape)}"
            )
        check_log_scale(self.log_scale)
        return self.log_scale.to(at_least_float32(self.log_scale.dtype, x.dtype))

    def extra_repr(self) -> str:
        return str(self.log_scale.shape[0])


def _dropout(h: Tensor, p: float) -> Tensor:
    """Dropout; on the CPU, p to a multiple of 2^-16: a quarter of a random word decides for a unit,
    where PyTorch's own draw takes several times as long (it does not use threads)."""
    if (
        h.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return nn.functional.dropout(h, p)
    kept = max(1, round((1 - p) * 2**16))
    words = torch.empty(-(-h.numel() // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1)
    mask = words.view(torch.int16)[: h.numel()] < kept - 2**15
    return h * mask.view(h.shape).to(h.dtype).mul_(2**16 / kept)


def _zero_log_det(y: Tensor) -> Tensor:
    """An expanded zero of the batch shape: nothing to add up, nothing to keep."""
    return y.new_zeros((), dtype=at_least_float32(y.dtype)).expand(y.shape[:-1])
