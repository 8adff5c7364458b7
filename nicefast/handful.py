"""A handful of rows on the CPU: the same products by NumPy, whose calls cost a fraction.

With so few rows nearly all of the time goes into calls, and those of PyTorch take several times as
long as NumPy's. Nothing is copied: arrays are views of the parameters' memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .chain import Chain
from .onepiece import OnePiece
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
        self.couplings = [
            [(w.detach().numpy().T, b.detach().numpy()) for w, b in layers]
            for layers in chain.couplings
        ]
        columns = (columns_of(f.indices, f.start, f.step, f.size) for f in chain.sides)
        self.columns = [c if isinstance(c, slice) else c.numpy() for c in columns]

    def are_of(self, chain: Chain) -> bool:
        """Whether every parameter still lies where it lay."""
        return _places(chain) == self._places


_arrays: WeakKeyDictionary[Chain, _Arrays] = WeakKeyDictionary()


def _places(chain: Chain) -> list[object]:
    """Of tensors whose shapes are known to be the same."""
    p = chain.parameters
    return [*map(Tensor.data_ptr, p), *map(Tensor.is_contiguous, p)]


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
        scale, none = log_scale.detach().numpy(), np.empty(0, np.float32)
        total = scale.sum()
        if not math.isfinite(total):
            check_log_scale(log_scale)
        with np.errstate(all="ignore"):
            z = self._through(x.detach().numpy(), context, False)
            z *= np.exp(scale)
            log_prob = self._log_prior(z) + total if want_log_prob else none
        return torch.from_numpy(z if want_z else none), torch.from_numpy(log_prob)

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        with np.errstate(all="ignore"):
            h = z.detach().numpy() * np.exp(-log_scale.detach().numpy())
            return torch.from_numpy(self._through(h, context, True))

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(self._through(x.detach().numpy(), context, inverse))

    def _through(self, x: Array, context: Tensor | None, inverse: bool) -> Array:
        """A new array: the rows ``x`` through all couplings, or back through them."""
        chain = self.chain
        arrays = _arrays.get(chain)
        if arrays is None or not arrays.are_of(chain):
            arrays = _arrays[chain] = _Arrays(chain)
        activate = _ACTIVATIONS[chain.activation]
        c = None if context is None else context.detach().float().numpy()
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
        y = np.empty(x.shape, np.float32)
        for columns, half in zip(arrays.columns, pair, strict=True):
            y[:, columns] = half
        return y

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
