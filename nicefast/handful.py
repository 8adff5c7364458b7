"""A handful of rows on the CPU: the same products by NumPy, whose calls cost a fraction.

With so few rows nearly all of the time goes into calls, and those of PyTorch take several times as
long as NumPy's. Nothing is copied: arrays are views of the parameters' memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chain import Chain
from .onepiece import OnePiece, empty
from .ops import check_log_scale, columns_of

Array = Any  # of NumPy, in float32
# multiplications of one product: with more, NumPy's library may start threads, which get into the
# way of PyTorch's
MOST = 1 << 18
_ACTIVATIONS: dict[str, Callable[[Array], object]] = {  # in place
    "relu": lambda h: np.maximum(h, 0, out=h),
    "leaky_relu": lambda h: np.maximum(h, 0.01 * h, out=h),
    "tanh": lambda h: np.tanh(h, out=h),
    "silu": lambda h: np.divide(h, 1 + np.exp(-h), out=h),
    "elu": lambda h: np.copyto(h, np.expm1(h), where=h < 0),
}


class _Arrays:
    """The parameters of a chain, and the columns of its sides, as arrays."""

    def __init__(self, chain: Chain) -> None:
        self._places = _places(chain)
        # detached: an array that held a parameter with hooks would hide it from the collector
        self.couplings = [
            [(_array(w.detach()).T, _array(b.detach())) for w, b in layers]
            for layers in chain.couplings
        ]
        columns = (columns_of(f.indices, f.start, f.step, f.size) for f in chain.sides)
        self.columns = [c if isinstance(c, slice) else c.numpy() for c in columns]

    def are_of(self, chain: Chain) -> bool:
        """Whether they still are views of every parameter."""
        return _places(chain) == self._places and not any(map(Tensor.is_neg, chain.parameters))


def _places(chain: Chain) -> list[object]:
    """Where the numbers lie of tensors whose shapes are known to be the same."""
    p = chain.parameters
    return [*map(Tensor.data_ptr, p), *map(Tensor.stride, p)]


class _Memory:
    """What an array is made of: that of a tensor, which is held."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x
        self.__array_interface__ = {
            "data": (x.data_ptr(), False),
            "shape": x.shape,
            "strides": tuple([4 * step for step in x.stride()]),
            "typestr": np.dtype(np.float32).str,
            "version": 3,
        }


def _array(x: Tensor) -> Array:
    """A view of a float32 tensor (after ``x.numpy()`` its storage could never be resized); of
    numbers that are to be taken with the opposite sign, a copy."""
    return np.asarray(_Memory(x.resolve_neg())) if x.numel() else np.empty(x.shape, np.float32)


@dataclass(frozen=True)
class Handful(OnePiece):
    """As :class:`nicefast.onepiece.OnePiece`, whose gradients it has."""

    @staticmethod
    def serves(chain: Chain, rows: int, recorded: bool) -> bool:
        """Whether NumPy is best for so many rows; ``recorded``: for a gradient."""
        return (
            rows * chain.largest <= MOST
            and chain.activation in _ACTIVATIONS
            and not (recorded or chain.bfloat16)
            and torch._C._len_torch_dispatch_stack() == 0  # a mode sees what PyTorch does alone
        )

    def pieces(self, rows: int) -> str:
        return f"{rows} rows in one piece, by NumPy"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        scale = _array(log_scale)
        z, log_prob = empty(*x.shape), empty(x.shape[0] if want_log_prob else 0)
        with np.errstate(all="ignore"):
            total = scale.sum()
            if not math.isfinite(total):
                check_log_scale(log_scale)
            rows = self._through(_array(x), context, False, z)
            rows *= np.exp(scale)
            if want_log_prob:
                np.add(self._log_prior(rows), total, out=_array(log_prob))
        return z if want_z else empty(0), log_prob

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        x = empty(*z.shape)
        with np.errstate(all="ignore"):
            self._through(_array(z) * np.exp(-_array(log_scale)), context, True, x)
        return x

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        y = empty(*x.shape)
        with np.errstate(all="ignore"):
            self._through(_array(x), context, inverse, y)
        return y

    def _through(self, x: Array, context: Tensor | None, inverse: bool, to: Tensor) -> Array:
        """The rows ``x`` through all couplings, or back through them: to ``to``, whose array is
        returned."""
        chain = self.chain
        arrays = vars(chain).get("_arrays")
        if arrays is None or not arrays.are_of(chain):
            arrays = vars(chain)["_arrays"] = _Arrays(chain)
        activate = _ACTIVATIONS[chain.activation]
        c = None if context is None else _array(context.float())
        pair = [x[:, columns].copy() for columns in arrays.columns]
        for index in chain.steps(inverse):
            side, (*layers, last) = chain.conditions[index], arrays.couplings[index]
            h = pair[side] if c is None else np.concatenate((pair[side], c), 1)
            for weight, bias in layers:
                h = h @ weight
                h += bias
                activate(h)
            shift = h @ last[0]
            shift += last[1]
            other = pair[1 - side]
            if inverse:
                other -= shift
            else:
                other += shift
        out = _array(to)
        for columns, half in zip(arrays.columns, pair, strict=True):
            out[:, columns] = half
        return out

    def _log_prior(self, z: Array) -> Array:
        """See :func:`nicefast.likelihood.sum_log_prior`; constants and all. ``z`` is kept."""
        if self.prior == "normal":
            return -0.5 * np.square(z).sum(1) - z.shape[1] / 2 * math.log(2 * math.pi)
        size = np.abs(z)
        sums = np.exp(-size)
        sums += 1
        np.log(sums, out=sums)
        size *= 0.5
        sums += size
        return -2 * sums.sum(1)
