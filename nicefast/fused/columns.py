"""Blocks of rows laid on their side, and the layers of couplings as products with them.

See :mod:`nicefast.fused.sideways`, which cuts a batch into such blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .chain import Chain
from .sums import add_product

LINE = 16  # numbers in one of the cache


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
        state = _empty(first + between + second, rows)
        state[first] = 1
        self.sides = (state[: first + between], state[first:])
        self.features = (state[:first], state[first + between :])
        self.context = state[first + 1 : first + between]
        self._columns = [f.columns for f in chain.sides]
        self.given = [self.sides[side] for side in chain.conditions]
        if keep:
            self.given = [_empty(len(side), rows) for side in self.given]
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
                    h = _empty(width + 1, self.rows)
                    h[width] = 1
                    before = _empty(width, self.rows) if twice else None
                    made[key] = Hidden(h[:width], h, before)
                own.append(made[key])
            found.append(own)
        return found


def _empty(features: int, rows: int) -> Tensor:
    """A buffer (features, rows), for every feature a whole and odd number of the cache's lines: as
    far apart as a power of two, they would drive each other out of the cache."""
    lines = -(-rows // LINE) | 1
    return torch.empty(features, lines * LINE, device="cpu", dtype=torch.float32)[:, :rows]


class Columns:
    """The layers of a chain's couplings, forwards or back through it (``inverse``).

    A layer is one matrix, ``[weight | bias]``, formed anew for each call: it can't be out of date.
    """

    def __init__(self, chain: Chain, inverse: bool) -> None:
        self.chain, self.inverse = chain, inverse
        self.activation = ACTIVATIONS[chain.activation]
        self.relu = self.activation.apply_ is torch.relu_
        self.layers: list[list[Tensor]] = []
        self._turned: list[list[Tensor]] = []  # what leads back through each
        with torch.no_grad():
            for side, ((weight, bias), *own) in zip(chain.conditions, chain.couplings, strict=True):
                x, c = weight.split((weight.shape[1] - chain.context, chain.context), 1)
                given = (bias[:, None], c, x) if side else (x, bias[:, None], c)  # in this order
                columns = [given, *((w, b[:, None]) for w, b in own)]
                layers = [torch.cat(parts, 1) for parts in columns]
                if inverse:  # what is added has the opposite sign, to the last bit
                    layers[-1].neg_()
                self.layers.append(layers)
                self._turned.append([layers[0].t(), *(w.t() for w, _ in own)])

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
                add_product(block.features[1 - side], last, h)

    def _activated(self, layer: Tensor, h: Tensor, into: Hidden) -> Tensor:
        out = into.units
        if self.relu:  # one call
            torch._addmm_activation(out, layer, h, beta=0, out=out)
        else:
            sums = torch.mm(layer, h, out=out if into.before is None else into.before)
            self.activation.apply_(out if sums is out else out.copy_(sums))
        return into.operand

    def backward(
        self, block: Block, grad: Block, index: int, totals: Totals, wants_given: bool
    ) -> None:
        """``grad``, of the block's rows after coupling ``index``, becomes that of those before it;
        the parameters' is added to ``totals``."""
        turned, side = self._turned[index], self.chain.conditions[index]
        d = grad.features[1 - side]
        if self.inverse:
            d = d.neg()
        for k in range(len(turned) - 1, 0, -1):
            below = block.hidden[index][k - 1]
            totals.add(index, k, d, below.units)
            d = torch.mm(turned[k], d, out=grad.hidden[index][k - 1].units)
            self.activation.backward_(d, below.units if below.before is None else below.before)
        totals.add(index, 0, d, block.given[index])
        if wants_given:  # that of the ones among them is nothing to anybody
            add_product(grad.sides[side], turned[0], d)


class Totals:
    """The gradients of a chain's parameters, summed over the blocks of a thread.

    A weight's lies as the faster product has it. Biases' are summed over blocks in float64: a sum
    of sums next to a plain step's pairwise one.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._flipped, self._weights = [], []
        for layers in chain.couplings:
            shapes = [(w.shape[0], w.shape[1] + (k == 0)) for k, (w, _) in enumerate(layers)]
            flipped = [inputs < out for out, inputs in shapes]
            self._flipped.append(flipped)  # in x out
            self._weights.append(
                [
                    torch.zeros(shape[::-1] if f else shape, device="cpu", dtype=torch.float32)
                    for shape, f in zip(shapes, flipped, strict=True)
                ]
            )
        self._widths = [b.shape[0] for layers in chain.couplings for _, b in layers]
        count = sum(self._widths)
        self._of_block = torch.zeros(count, device="cpu", dtype=torch.float32)
        self._biases = torch.zeros(count, device="cpu", dtype=torch.float64)
        each = iter(self._of_block.split(self._widths))
        self._bias = [[next(each) for _ in layers] for layers in chain.couplings]

    def add(self, index: int, k: int, d: Tensor, operand: Tensor) -> None:
        """The share of ``d`` (out, N), the gradient of ``W operand + b``, to layer ``k``'s."""
        total = self._weights[index][k]
        torch.sum(d, 1, out=self._bias[index][k])
        if self._flipped[index][k]:
            total.addmm_(operand, d.t())
        else:
            total.addmm_(d, operand.t())

    def end_block(self) -> None:
        """To be called after every block."""
        self._biases += self._of_block

    def merge(self, other: Totals) -> None:
        """What another thread has summed."""
        for mine, theirs in zip(self._weights, other._weights, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                a.add_(b)
        self._biases += other._biases

    def gathered(self) -> list[Tensor]:
        """The gradients of the parameters, in their order, in memory of their own."""
        found, biases = [], iter(self._biases.split(self._widths))
        for side, flips, weights in zip(
            self.chain.conditions, self._flipped, self._weights, strict=True
        ):
            for k, (flipped, total) in enumerate(zip(flips, weights, strict=True)):
                weight = total.t() if flipped else total
                if k == 0:  # without the column of the row of ones, see Columns
                    context = self.chain.context
                    first = 0 if side else weight.shape[1] - 1 - context
                    c = weight[:, first + 1 : first + 1 + context]
                    x = weight[:, first + 1 + context :] if side else weight[:, :first]
                    weight = torch.cat((x, c), 1)
                found += [weight.contiguous(), next(biases).float()]
        return found
