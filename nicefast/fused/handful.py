"""A handful of rows on the CPU: the same products by NumPy, whose calls cost a fraction.

With so few rows nearly all of the time goes into calls, and those of PyTorch take several times as
long as NumPy's; with gradients more so, since autograd adds its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import watchers
from ..ops import check_log_scale
from .arrays import ACTIVATIONS, MOST, Array, Arrays, array, product
from .chain import Chain
from .flow import DifferentiableFlow, SamplingFlow
from .onepiece import empty
from .sums import Gradients

SMALL = 1 << 16  # numbers of a weight: larger ones take their time whoever is called
FEW = MOST  # multiplications of such a weight's product: with more, rows on their side gain more,
FEW_OF_MANY_CALLS = 4 * MOST  # where PyTorch's calls cost more: with gradients, and of wide flows
NUMBERS = 1 << 18  # of all activations: with more, what is done to each takes several threads
SUMMED = 1 << 10  # rows: NumPy sums one after the other, less exactly than PyTorch,
ADDED = 64  # most of all where it has nothing to do but to add


class _Kept(NamedTuple):
    """As :class:`nicefast.fused.products.Kept`."""

    operands: list[Array]
    inputs: list[Array]


class _Left(NamedTuple):
    """What :meth:`Handful.log_prob` leaves for its gradient besides z: the parameters and
    exp(log_scale) as they were, and an entry for each coupling."""

    arrays: Arrays
    scale: Array
    kept: list[_Kept]


@dataclass(frozen=True)
class Handful(SamplingFlow, DifferentiableFlow):
    """Few rows in one piece, by NumPy, where no operator is to be seen."""

    chain: Chain
    prior: str

    @staticmethod
    def serves(chain: Chain, rows: int, recorded: bool) -> bool:
        """Whether NumPy is best for so many rows; ``recorded``: for a gradient."""
        few = FEW if chain.narrow and not recorded else FEW_OF_MANY_CALLS
        if chain.largest > SMALL:
            few = 0 if recorded else MOST
        return (
            rows * chain.largest <= few
            and rows * chain.kept <= NUMBERS
            and rows <= (SUMMED if recorded else NUMBERS)
            and chain.activation in ACTIVATIONS
            and not chain.bfloat16
            and not watchers.has_modes()  # a mode sees what PyTorch does alone
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
        z, log_prob = empty(*x.shape), empty(x.shape[0] if want_log_prob else 0)
        self._latent_by_numpy(x, context, log_scale, z, log_prob if want_log_prob else None)
        return z if want_z else empty(0), log_prob

    def log_prob(
        self, x: Tensor, context: Tensor | None, log_scale: Tensor
    ) -> tuple[Tensor, Tensor, _Left]:
        """log_prob of rows x (N, D); z (N, D); and what else its gradient takes."""
        z, log_prob = empty(*x.shape), empty(x.shape[0])
        with np.errstate(all="ignore"):
            left = _Left(self._arrays(), np.exp(array(log_scale)), [])
        self._latent_by_numpy(x, context, log_scale, z, log_prob, left)
        return log_prob, z, left

    def log_prob_backward(
        self,
        grad: Tensor,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        z: Tensor,
        left: _Left,
        wants_x: bool = True,
        wants_context: bool = True,
    ) -> tuple[Gradients, Tensor]:
        """Gradients of :meth:`log_prob` from that of its result; the last is log_scale's."""
        with np.errstate(all="ignore"):
            rows, g = array(z), array(grad)
            score = -rows if self.prior == "normal" else -np.tanh(rows * np.float32(0.5))
            score *= g[:, None]
            total = torch.from_numpy(rows * score).sum(0) + grad.sum()
            score *= left.scale
            c = None
            if context is not None and wants_context:
                c = np.zeros(context.shape, np.float32)
            parameters = self._back(score, c, left, wants_x)
            return Gradients(
                _tensor(score) if wants_x else None, None if c is None else _tensor(c), parameters
            ), total

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        x = empty(*z.shape)
        with np.errstate(all="ignore"):
            self._through(array(z) * np.exp(-array(log_scale)), context, True, x)
        return x

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        y = empty(*x.shape)
        with np.errstate(all="ignore"):
            self._through(array(x), context, inverse, y)
        return y

    def _latent_by_numpy(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        z: Tensor,
        log_prob: Tensor | None,
        left: _Left | None = None,
    ) -> None:
        """``z`` and ``log_prob`` of rows x; what a gradient takes besides, to ``left``."""
        scale = array(log_scale)
        with np.errstate(all="ignore"):
            total = scale.sum()
            if not math.isfinite(total):
                check_log_scale(log_scale)
            rows = self._through(array(x), context, False, z, left)
            rows *= np.exp(scale) if left is None else left.scale
            if log_prob is not None:
                np.add(self._log_prior(rows), total, out=array(log_prob))

    def _through(
        self,
        x: Array,
        context: Tensor | None,
        inverse: bool,
        to: Tensor,
        left: _Left | None = None,
    ) -> Array:
        """The rows ``x`` through all couplings, or back through them: to ``to``, whose array is
        returned; what their gradients need, to ``left``."""
        chain, arrays = self.chain, self._arrays() if left is None else left.arrays
        activation = ACTIVATIONS[chain.activation]
        c = None if context is None else array(context.float())
        pair = [x[:, columns].copy() for columns in arrays.columns]
        for index in chain.steps(inverse):
            side, (*layers, last) = chain.conditions[index], arrays.couplings[index]
            own, h = _Kept([], []), pair[side]
            if c is not None:
                h = np.concatenate((h, c), 1)
            elif left is not None:
                h = h.copy()  # which is shifted later
            for weight, bias in layers:
                own.operands.append(h)
                h = product(h, weight)
                h += bias
                if left is not None and activation.from_input:
                    own.inputs.append(h.copy())
                activation.apply_(h)
            own.operands.append(h)
            shift = product(h, last[0])
            shift += last[1]
            other = pair[1 - side]
            if inverse:
                other -= shift
            else:
                other += shift
            if left is not None:
                left.kept.append(own)
        out = array(to)
        for columns, half in zip(arrays.columns, pair, strict=True):
            out[:, columns] = half
        return out

    def _back(self, grads: Array, c: Array | None, left: _Left, wants_x: bool) -> list[Tensor]:
        """``grads``, that of rows which have gone through all couplings, becomes that of the rows
        before them where it is wanted; the context's is added to ``c``. Those of the parameters
        are returned."""
        chain, arrays, kept = self.chain, left.arrays.as_they_are(self.chain), left.kept
        activation = ACTIVATIONS[chain.activation]
        pair = [grads[:, columns].copy() for columns in arrays.columns]
        found: list[Tensor] = []
        ones = np.ones(len(grads), np.float32) if len(grads) <= ADDED else None
        for index in reversed(chain.steps(False)):
            side, layers, own = chain.conditions[index], arrays.couplings[index], kept[index]
            d = pair[1 - side]
            for k in range(len(layers) - 1, -1, -1):
                weight, h = layers[k][0], own.operands[k]
                of_bias = torch.from_numpy(d).sum(0) if ones is None else torch.from_numpy(ones @ d)
                found += of_bias, torch.from_numpy(product(d.T, h))  # which have their own memory
                if k == 0 and index == 0 and not wants_x and c is None:
                    break
                d = product(d, weight.T)
                if k > 0:
                    activation.backward_(d, own.inputs[k - 1] if activation.from_input else h)
            else:
                width = pair[side].shape[1]
                pair[side] += d[:, :width]
                if c is not None:
                    c += d[:, width:]
        if wants_x:
            for columns, half in zip(arrays.columns, pair, strict=True):
                grads[:, columns] = half
        return found[::-1]

    def _arrays(self) -> Arrays:
        """The parameters as they are now."""
        arrays = vars(self.chain).get("_arrays")
        if arrays is None or not arrays.are_of(self.chain):
            arrays = vars(self.chain)["_arrays"] = Arrays(self.chain, self.chain.parameters)
        return arrays

    def _log_prior(self, z: Array) -> Array:
        """See :func:`nicefast.likelihood.sum_log_prior`; constants and all. ``z`` is kept."""
        if self.prior == "normal":
            return (z * np.float32(-0.5) * z).sum(1) - z.shape[1] / 2 * math.log(2 * math.pi)
        size = np.abs(z)
        sums = np.exp(-size)
        sums += 1
        np.log(sums, out=sums)
        size *= 0.5
        sums += size
        return -2 * sums.sum(1)


def _tensor(a: Array) -> Tensor:
    """A copy: NumPy's memory could never be resized. (That of parameters' gradients cannot: so many
    copies would cost a tenth of a training step.)"""
    return torch.from_numpy(a).clone()
