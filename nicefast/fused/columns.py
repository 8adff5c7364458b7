"""Blocks of rows laid on their side, and the layers of couplings as products with them.

See :mod:`nicefast.fused.sideways`, which cuts a batch into such blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .chain import Chain
from .products import linear_pointwise
from .sums import Sum

FEW = 16  # with fewer rows or columns, oneDNN's packing of a matrix costs more than it gains,
MANY = 1 << 10  # and with fewer columns to sum over


class Hidden(NamedTuple):
    """The buffer of a hidden layer, without and with the row of ones that follows its units."""

    units: Tensor
    operand: Tensor
    before: Tensor | None  # what the activation was made of, where the gradient needs that


class Block:
    """``rows`` rows on their side, ``x_0 | 1 | context | x_1``, and what couplings leave of them.

    Buffers, filled again and again. ``keep``: every hidden layer has one of its own, and so has
    what each coupling conditions on.
    """

    def __init__(self, chain: Chain, rows: int, keep: bool = False) -> None:
        self.chain, self.rows, self.keep = chain, rows, keep
        first, second = (f.size for f in chain.sides)
        between = 1 + chain.context
        state = torch.empty(first + between + second, rows, device="cpu", dtype=torch.float32)
        state[first] = 1
        self.sides = (state[: first + between], state[first:])
        self.features = (state[:first], state[first + between :])
        self.context = state[first + 1 : first + between]
        self._columns = [f.columns for f in chain.sides]
        self.given = [self.sides[side] for side in chain.conditions]
        if keep:
            self.given = [torch.empty_like(side) for side in self.given]
        self.hidden = self._buffers()

    def take(self, x: Tensor, context: Tensor | None = None) -> None:
        """The rows ``x`` (N, D), with their context."""
        for own, columns in zip(self.features, self._columns, strict=True):
            own.copy_(x[:, columns].t())
        if context is not None:
            self.context.copy_(context.t())

    def put(self, y: Tensor) -> None:
        """The rows as they are now, into ``y`` (N, D)."""
        for own, columns in zip(self.features, self._columns, strict=True):
            y[:, columns] = own.t()

    def scale(self, scales: list[Tensor]) -> None:
        """Multiply the rows of each side by its column of factors."""
        for side, scale in zip(self.features, scales, strict=True):
            side.mul_(scale)

    def _buffers(self) -> list[list[Hidden]]:
        """One for each hidden layer of each coupling; where nothing is kept, two take turns."""
        twice = self.keep and ACTIVATIONS[self.chain.activation].from_input
        made: dict[tuple[int, int], Hidden] = {}
        found = []
        for i, layers in enumerate(self.chain.couplings):
            own = []
            for k, (_, bias) in enumerate(layers[:-1]):
                width = bias.shape[0]
                key = (i, k) if self.keep else (k % 2, width)
                if key not in made:
                    h = torch.empty(width + 1, self.rows, device="cpu", dtype=torch.float32)
                    h[width] = 1
                    before = torch.empty_like(h[:width]) if twice else None
                    made[key] = Hidden(h[:width], h, before)
                own.append(made[key])
            found.append(own)
        return found


class Columns:
    """The layers of a chain's couplings, forwards or back through it (``inverse``).

    A layer is one matrix, ``[weight | bias]``, formed anew for each call: it can't be out of date.
    """

    def __init__(self, chain: Chain, inverse: bool) -> None:
        self.chain, self.inverse = chain, inverse
        self.activation = ACTIVATIONS[chain.activation]
        self.relu = self.activation.apply_ is torch.relu_
        self.layers: list[list[Tensor]] = []
        with torch.no_grad():
            for side, ((weight, bias), *own) in zip(chain.conditions, chain.couplings, strict=True):
                x, c = weight.split((weight.shape[1] - chain.context, chain.context), 1)
                given = (bias[:, None], c, x) if side else (x, bias[:, None], c)  # in this order
                columns = [given, *((w, b[:, None]) for w, b in own)]
                layers = [torch.cat(parts, 1) for parts in columns]
                if inverse:  # what is added has the opposite sign, to the last bit
                    layers[-1].neg_()
                self.layers.append(layers)

    def run(self, block: Block, to_the_end: bool = True) -> None:
        """The block through all couplings, in place.

        Not ``to_the_end``: what nothing but the result needs is left out.
        """
        steps = self.chain.steps(self.inverse)
        for index in steps:
            (*layers, last), side = self.layers[index], self.chain.conditions[index]
            h = block.given[index]
            if block.keep:
                h.copy_(block.sides[side])
            for layer, into in zip(layers, block.hidden[index], strict=True):
                h = self._activated(layer, h, into)
            if to_the_end or index != steps[-1]:
                block.features[1 - side].addmm_(last, h)

    def _activated(self, layer: Tensor, h: Tensor, into: Hidden) -> Tensor:
        out = into.units
        if self.relu:  # one call
            torch._addmm_activation(out, layer, h, beta=0, out=out)
        else:
            sums = torch.mm(layer, h, out=out if into.before is None else into.before)
            self.activation.apply_(out if sums is out else out.copy_(sums))
        return into.operand

    def backward(
        self, block: Block, grad: Block, index: int, sums: list[Sum], wants_given: bool
    ) -> None:
        """``grad``, of the block's rows after coupling ``index``, becomes that of those before it;
        the parameters' is added to ``sums``, one for each layer."""
        layers, side = self.chain.couplings[index], self.chain.conditions[index]
        d = grad.features[1 - side]
        if self.inverse:
            d = d.neg()
        for k in range(len(layers) - 1, 0, -1):
            below = block.hidden[index][k - 1]
            _add_product(sums[k], d, below.units)
            d = torch.mm(layers[k][0].t(), d, out=grad.hidden[index][k - 1].units)
            self.activation.backward_(d, below.units if below.before is None else below.before)
        _add_product(sums[0], d, block.given[index])
        if wants_given:  # that of the ones among them is nothing to anybody
            grad.sides[side].addmm_(self.layers[index][0].t(), d)

    def gathered(self, index: int, sums: list[Sum]) -> list[Tensor]:
        """The gradients of coupling ``index``'s parameters, in their order."""
        found, layers = [], self.chain.couplings[index]
        for k, (own, (w, b)) in enumerate(zip(sums, layers, strict=True)):
            total = own.total()
            if total is None:  # no rows
                found += [torch.zeros_like(w), torch.zeros_like(b)]
                continue
            (weight, bias), context = total, self.chain.context
            if k == 0 and self.chain.conditions[index]:
                weight = torch.cat((weight[:, 1 + context :], weight[:, 1 : 1 + context]), 1)
            elif k == 0:
                split = weight.shape[1] - context
                weight = torch.cat((weight[:, : split - 1], weight[:, split:]), 1)
            found += [weight.contiguous(), bias]
        return found


def _add_product(total: Sum, d: Tensor, operand: Tensor) -> None:
    """The share of ``d`` (out, N), the gradient of ``W operand + b``."""
    out, inputs = d.shape[0], operand.shape[0]
    if min(out, inputs) >= FEW and d.shape[1] >= MANY and linear_pointwise is not None:
        total.add(linear_pointwise(d, operand, None, "none", [], ""), d.sum(1))
    else:
        total.add_product(d.t(), operand.t(), FEW)
