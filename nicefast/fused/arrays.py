"""A chain's tensors as arrays of NumPy, and what is computed with those.

Nothing is copied: arrays are views of the parameters' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .chain import Chain

Array = Any  # of NumPy, in float32
# multiplications of one product: with more, NumPy's library may start threads, which get into the
# way of PyTorch's
MOST = 1 << 18


class Activation(NamedTuple):
    """In place; its gradient, written over the first argument; see
    :class:`nicefast.fused.chain.Activation`."""

    apply_: Callable[[Array], object]
    backward_: Callable[[Array, Array], object]
    from_input: bool = False


def _relu_backward_(d: Array, y: Array) -> None:
    bits = d.view(np.int32)  # as whole numbers: infinity x 0 would be NaN
    bits *= y != 0  # which NaN is not, either


def _silu_backward_(d: Array, x: Array) -> None:
    sigmoid = 1 / (1 + np.exp(-x))
    d *= sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS = {
    "relu": Activation(lambda h: np.maximum(h, 0, out=h), _relu_backward_),
    "leaky_relu": Activation(
        lambda h: np.maximum(h, 0.01 * h, out=h),
        lambda d, y: np.multiply(d, np.where(y > 0, np.float32(1), np.float32(0.01)), out=d),
    ),
    "tanh": Activation(
        lambda h: np.tanh(h, out=h), lambda d, y: np.multiply(d, 1 - np.square(y), out=d)
    ),
    "silu": Activation(
        lambda h: np.divide(h, 1 + np.exp(-h), out=h), _silu_backward_, from_input=True
    ),
    "elu": Activation(
        lambda h: np.copyto(h, np.expm1(h), where=h < 0),
        lambda d, x: np.multiply(d, np.exp(np.minimum(x, 0)), out=d),
        from_input=True,
    ),
}


class Arrays:
    """The parameters of a chain, and the columns of its sides, as arrays."""

    def __init__(self, chain: Chain, tensors: Sequence[Tensor]) -> None:
        # detached: an array that held a parameter with hooks would hide it from the collector
        self._tensors = [t.detach() for t in tensors]
        self._places = _places(self._tensors)
        each = iter(self._tensors)
        self.couplings = [
            [(array(next(each)).T, array(next(each))) for _ in layers] for layers in chain.couplings
        ]
        columns = (f.columns for f in chain.sides)
        self.columns = [c if isinstance(c, slice) else c.numpy() for c in columns]

    def are_of(self, chain: Chain) -> bool:
        """Whether they still are views of every parameter."""
        p = chain.parameters
        return _places(p) == self._places and not any(map(Tensor.is_neg, p))

    def as_they_are(self, chain: Chain) -> Arrays:
        """Views of the same tensors, whose memory may have been exchanged since, as it is by
        sharing it among processes."""
        return self if _places(self._tensors) == self._places else Arrays(chain, self._tensors)


def _places(tensors: Sequence[Tensor]) -> list[object]:
    """Where the numbers lie of tensors whose shapes are known to be the same."""
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]


class _Memory:
    """What an array is made of: that of a tensor, which is held (its memory may be exchanged)."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x
        self.__array_interface__ = {
            "data": (x.data_ptr(), False),
            "shape": x.shape,
            "strides": tuple([4 * step for step in x.stride()]),
            "typestr": np.dtype(np.float32).str,
            "version": 3,
        }


def array(x: Tensor) -> Array:
    """A view of a float32 tensor (after ``x.numpy()`` its storage could never be resized); a copy
    of numbers that are to be taken with the opposite sign, and of zeros without memory."""
    if not x.numel():
        return np.empty(x.shape, np.float32)
    x = x.resolve_neg()
    return np.asarray(_Memory(x if x.data_ptr() else x.clone()))


def product(a: Array, b: Array) -> Array:
    """``a b``, a few rows of ``a`` at a time, so that there are :data:`MOST` multiplications."""
    inner, width = b.shape
    if inner == 1:
        return a * b  # NumPy's products take several times as long
    most = max(1, MOST // max(1, inner * width))  # rows of a
    if len(a) <= most:
        return a @ b
    out = np.empty((len(a), width), np.float32)
    whole = len(a) // most * most
    np.matmul(a[:whole].reshape(-1, most, inner), b, out=out[:whole].reshape(-1, most, width))
    if whole < len(a):
        np.matmul(a[whole:], b, out=out[whole:])
    return out
