"""The modules a flow is built from: conditioner, additive coupling, scaling.

Couplings and scaling map ``(x, context=None) -> (y, log_det)`` and have an ``inverse`` of the same
form; forward is data -> latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from . import functional as F  # noqa: N812
from .checks import (
    as_integer,
    check_choice,
    check_count,
    check_tensor,
    check_type,
    is_number,
)
from .exact import arithmetic as exact
from .exact.grid import check_grid, check_range, round_to_grid
from .fingerprint import Fingerprinted
from .ops import check_log_scale
from .partition import Partition
from .reference import ACTIVATIONS
from .runtime import watchers
from .runtime.precision import at_least_float32


class MLP(Fingerprinted):
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
        device, dtype: of the parameters; PyTorch's defaults unless given.

    Shapes: x (..., C), context (..., K) -> (..., S). Inputs are brought to the weights' dtype.

    Raises:
        TypeError: hidden holds no widths.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        if as_integer(hidden) is not None:
            hidden = (cast("int", hidden),)
        check_type("hidden", hidden, Iterable, "widths")
        hidden = tuple(hidden)
        sizes = [as_integer(width) for width in (in_features, *hidden, out_features)]
        if any(size is None or size < 1 for size in sizes):
            raise ValueError(
                f"in_features, hidden and out_features must be integers >= 1, "
                f"got {in_features!r}, {hidden!r}, {out_features!r}"
            )
        widths = cast("list[int]", sizes)
        in_features, out_features = widths[0], widths[-1]
        context = check_count("context", context)
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.context, self.dropout = activation, context, float(dropout)
        widths[0] += context
        self.linears = nn.ModuleList(
            nn.Linear(a, b, device=device, dtype=dtype) for a, b in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.linears
        dtype = _dtype_of(first, x.dtype)
        x = x.to(dtype)
        self.check_context(context)
        if context is None:
            h = first(x)
        elif type(first) is nn.Linear and not runs_more_than_forward(first):
            # two products instead of a cat of the data with its context
            w, w_context = first.weight.split((self.in_features, self.context), 1)
            h = nn.functional.linear(x, w) + nn.functional.linear(
                context.to(dtype), w_context, first.bias
            )
        else:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            parts = (t.to(dtype).expand(*batch, -1) for t in (x, context))
            h = first(torch.cat(tuple(parts), -1))
        activate = ACTIVATIONS[self.activation]
        for linear in others:
            h = activate(h)
            if self.drops:
                h = _dropout(h, self.dropout)
            h = linear(h)
        return h

    def check_context(self, context: Tensor | None) -> None:
        """ValueError for a context that is missing or unexpected."""
        if (context is None) != (self.context == 0):
            if context is not None:
                check_tensor("context", context)
            raise ValueError(
                f"context must have {self.context} features, got none"
                if context is None
                else f"context was given ({tuple(context.shape)}) to an MLP without context"
            )

    says = "activation or number of context features"

    def described(self) -> str:
        return f"activation {self.activation} and {self.context} features of context"

    @property
    def drops(self) -> bool:
        """Whether a call drops units: with ``dropout``, in training mode."""
        return self.training and self.dropout > 0

    def extra_repr(self) -> str:
        rest = {"context": self.context, "dropout": self.dropout}
        return ", ".join(
            (f"activation={self.activation}", *(f"{k}={v}" for k, v in rest.items() if v))
        )


class AdditiveCoupling(Fingerprinted):
    """Additive coupling: ``y1 = x1``, ``y2 = x2 + m(x1)``; log |det| = 0.

    Any module will do as the conditioner m: it is called as ``m(x1)``, or ``m(x1, context)`` where
    a context is given, and returns one value for each shifted feature. It needs no inverse
    (Dinh et al. 2014, section 3.2).

    With a ``grid``, x and the shift are rounded to its multiples (half to even; the gradient goes
    straight through), so that the inverse is exact, bit for bit. An :class:`MLP` is then computed
    in arithmetic whose bits depend neither on the batch nor on the machine; of any other
    conditioner that can't be known, so it sees one row at a time, which is slow.

    Args:
        partition: which features condition and which are shifted.
        conditioner: maps (..., C) to (..., S).
        grid: None, or a positive power of two.

    Shapes: ``(x (..., D), context) -> (y (..., D), log_det (...))``. log_det is an expanded zero.
    Errors as in :func:`nicefast.functional.additive_coupling`; ValueError for a grid that is no
    power of two, and where a value leaves +-2^24 grid steps (2^53 in float64).

    >>> import torch, nicefast as nf
    >>> p = nf.Partition.half(4)
    >>> layer = nf.AdditiveCoupling(p, torch.nn.Linear(2, 2))
    >>> y, log_det = layer(torch.ones(3, 4))
    >>> torch.allclose(layer.inverse(y)[0], torch.ones(3, 4))
    True
    """

    def __init__(
        self, partition: Partition, conditioner: nn.Module, grid: float | None = None
    ) -> None:
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
        self.grid = None if grid is None else check_grid(grid)
        self.label = "coupling"  # in messages

    says = "partition or grid"

    def described(self) -> str:
        return describe_coupling(self.partition, self.grid)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self._couple(x, context)
        return y, _zero_log_det(y)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._couple(y, context, inverse=True)
        return x, _zero_log_det(x)

    def _couple(self, x: Tensor, context: Tensor | None, inverse: bool = False) -> Tensor:
        if self.grid is not None:
            check_tensor("x", x)
            x = round_to_grid(x.to(at_least_float32(x.dtype)), self.grid)
        x, x1 = F.split_features(x, self.partition)
        y = F.additive_coupling(x, self.shift(x1, context), self.partition, inverse)
        if self.grid is not None:
            check_range(self.label, y.flatten(0, -2), x.flatten(0, -2), self.grid)
        return y

    @torch.no_grad()
    def inverse_(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """:meth:`inverse` written over ``y``, for inference; records no gradient."""
        if self.grid is not None:
            return y.copy_(self._couple(y, context, inverse=True))
        y1 = F.split_features(y, self.partition)[1]
        return F.additive_coupling_(y, self.shift(y1, context), self.partition, inverse=True)

    def shift(self, x1: Tensor, context: Tensor | None = None) -> Tensor:
        """``m(x1)`` (..., S) of conditioning features x1 (..., C); on the grid, if there is one."""
        given = (x1,) if context is None else (x1, context)
        if self.grid is None:
            return self.conditioner(*given)
        rows = [t.reshape(-1, t.shape[-1]) for t in given]
        layers = plain_layers(self.conditioner)
        if isinstance(layers, str):
            each = zip(*(t.split(1) for t in rows), strict=True)
            one_by_one = [self.conditioner(*row) for row in each]
            shift = torch.cat(one_by_one) if one_by_one else self.conditioner(*rows)
        else:
            mlp = cast("MLP", self.conditioner)
            mlp.check_context(context)
            drop = partial(_dropout, p=mlp.dropout) if mlp.drops else None
            c = None if context is None else rows[1]
            shift = exact.mlp(layers, mlp.activation, rows[0], c, drop)
        shift = shift.view(*x1.shape[:-1], shift.shape[-1])
        return round_to_grid(shift.to(x1.dtype), self.grid)

    def extra_repr(self) -> str:
        return repr(self.partition) + ("" if self.grid is None else f", grid={self.grid:g}")


def describe_coupling(partition: Partition, grid: float | None = None) -> str:
    """What the shapes of a coupling's parameters do not show.

    >>> describe_coupling(Partition.alternating(5), 0.5)
    'partition 10101 and grid 0.5'
    """
    return f"partition {partition.pattern} and grid {grid}"


class Scaling(nn.Module):
    """Diagonal scaling ``z = exp(log_scale) * h``, ``log_det = sum(log_scale)``.

    The one layer that changes volume (Dinh et al. 2014, section 3.3). Starts as the identity.

    Shapes: ``(h (..., D)) -> (z (..., D), log_det (...))``. ValueError for another number of
    features and, on the CPU, for a non-finite ``log_scale``.

    >>> import torch, nicefast as nf
    >>> nf.Scaling(3)(torch.ones(2, 3))[1]
    tensor([0., 0.], grad_fn=<ExpandBackward0>)
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        features = check_count("features", features, 1)
        self.log_scale = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def forward(self, h: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = self._checked("h", h)
        return h * s.exp(), s.sum().expand(h.shape[:-1])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = self._checked("z", z)
        return z * (-s).exp(), (-s.sum()).expand(z.shape[:-1])

    def _checked(self, name: str, x: Tensor) -> Tensor:
        """log_scale in at least float32, after a look at both."""
        features = self.log_scale.shape[0]
        check_type(name, x, Tensor, "a torch.Tensor")
        if x.ndim < 1 or x.shape[-1] != features:
            raise ValueError(
                f"{name} must have {features} features in its last dimension, "
                f"got shape {tuple(x.shape)}"
            )
        check_log_scale(self.log_scale)
        return self.log_scale.to(at_least_float32(self.log_scale.dtype, x.dtype))

    def extra_repr(self) -> str:
        return str(self.log_scale.shape[0])


PLAIN = (Tensor, nn.Parameter)  # types of tensors of which everything is known


def plain_layers(conditioner: nn.Module | None) -> list[tuple[Tensor, Tensor]] | str:
    """(weight, bias) of each linear layer, or why the module can't be computed from them alone."""
    if nn.modules.module._has_any_global_hook():
        return "global module hooks"
    if type(conditioner) is not MLP:
        return f"a {type(conditioner).__name__}, whose inside is not known"
    linears = list(cast("nn.ModuleList", conditioner._modules["linears"])._modules.values())
    layers = []
    for module in (conditioner, *linears):
        if module is None or runs_more_than_forward(module):
            return "hooks, or a forward of its own"
    for linear in linears:  # every call comes here: each step of it shows in a small batch
        own = linear._parameters if type(linear) is nn.Linear else {}
        weight, bias = own.get("weight"), own.get("bias")
        if len(own) != 2 or type(weight) not in PLAIN or type(bias) not in PLAIN:
            return "a layer that is no plain nn.Linear"
        layers.append(cast("tuple[Tensor, Tensor]", (weight, bias)))
    return layers


def runs_more_than_forward(module: nn.Module) -> bool:
    """Whether calling it does anything but its class's forward."""
    own = module.__dict__
    return bool(  # in one expression: every module of a flow is asked at each call
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "inverse" in own
    )


def is_plain_scaling(scaling: nn.Module) -> bool:
    """Whether ``log_scale`` alone says what it does."""
    return (
        type(scaling) is Scaling
        and not runs_more_than_forward(scaling)
        and type(scaling.log_scale) in PLAIN
    )


def _dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Of its weight or, without one, of its first parameter."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.dtype
    return next((p.dtype for p in module.parameters()), default)


def _dropout(h: Tensor, p: float) -> Tensor:
    """Dropout; on the CPU, p to a multiple of 2^-16: a quarter of a random word decides for a unit,
    where PyTorch's own draw takes several times as long (it does not use threads)."""
    if h.device.type != "cpu" or watchers.is_compiled() or watchers.is_transformed():
        return nn.functional.dropout(h, p)
    kept = max(1, round((1 - p) * 2**16))
    words = torch.empty(-(-h.numel() // 4), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), 2**63 - 1)
    mask = words.view(torch.int16)[: h.numel()] < kept - 2**15
    return h * mask.view(h.shape).to(h.dtype).mul_(2**16 / kept)


def _zero_log_det(y: Tensor) -> Tensor:
    """An expanded zero of the batch shape: nothing to add up, nothing to keep."""
    return y.new_zeros((), dtype=at_least_float32(y.dtype)).expand(y.shape[:-1])
