"""The products of a chain of couplings, forwards and back.

Every product has its bias (and its activation) in the epilogue or in place, and no row is cut out,
concatenated or copied between couplings: the two sides of the partition are taken apart once, at
the boundary, and each coupling adds to one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .chain import Chain, Layers
from .epilogue import keeps_nan
from .onednn import OneDNN, linear_pointwise
from .sums import Sum, add_product

LARGE = 2.0**100  # of a bound: numbers below it are finite, however the bound was rounded


class Kept(NamedTuple):
    """What one conditioner leaves for its gradient: the operand of each product, and the inputs of
    activations where the gradient is made of those."""

    operands: list[Tensor]
    inputs: list[Tensor]


class Products:
    """The products of a chain on one device, forwards or back through it (``inverse``).

    Weights are converted anew for each call, where the chain does not come with casts, and kept for
    its gradient alone: they can't be out of date. ``training``: activations are kept. ``numbers``:
    no NaN will come out of a product that would be missed, so that an epilogue that makes 0 of it
    may be used, see :mod:`.epilogue`.
    """

    def __init__(
        self,
        chain: Chain,
        device: torch.device,
        inverse: bool,
        training: bool = False,
        numbers: bool = False,
    ) -> None:
        self.chain, self.inverse = chain, inverse
        self.steps = chain.steps(inverse)
        self.activation = ACTIVATIONS[chain.activation]
        self.dtype = torch.bfloat16 if chain.bfloat16 else torch.float32
        self.onednn = OneDNN(chain, device, training)
        # a product that starts from its bias copies that to every row first; but it is one call
        # less, which MKL makes up for on Intel's processors alone, who counts operators is to see
        # few, and with operands in bfloat16 the sum would be rounded twice
        in_float32 = device.type == "cpu" and self.dtype == torch.float32
        self.adds_after = in_float32 and not (self.onednn.counted or self.onednn.amd)
        self.relu = self.activation.apply_ is torch.relu_
        # one call, and cuBLAS's epilogue
        self.relu_in_product = self.relu and (numbers or keeps_nan(device)) and not self.adds_after
        self.layers = chain.couplings
        self.context_weights: list[Tensor] = []
        self._sizes: dict[int, float] = {}  # of parameters, see _bound
        with torch.no_grad():
            if chain.bfloat16:
                self.layers = tuple(
                    tuple((self._operand(w), self._operand(b)) for w, b in layers)
                    for layers in self.layers
                )
            if chain.context:
                self.layers = tuple(self._apart(*layers) for layers in self.layers)

    def _apart(self, first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> Layers:
        """The layers without the first one's weights for context, which are put aside."""
        (weight, bias), context = first, self.chain.context
        x, c = weight.split((weight.shape[1] - context, context), 1)
        self.context_weights.append(c.contiguous())
        return (x.contiguous(), bias), *others

    def _operand(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def run(
        self,
        pair: list[Tensor],
        context: Tensor | None,
        kept: list[Kept] | None,
        to_the_end: bool = True,
    ) -> None:
        """The sides ``pair`` through couplings, in place; what their gradients need, to ``kept``.

        Not ``to_the_end``: what nothing but the result needs is left out.
        """
        c = None if context is None else self._operand(context)
        for index in self.steps:
            side, own = self.chain.conditions[index], None
            if kept is not None:
                own = Kept([], [])
                kept.append(own)
            h = self._hidden(index, pair[side], c, own)
            if to_the_end or index != self.steps[-1]:
                pair[1 - side] = self._shifted(pair[1 - side], h, *self.layers[index][-1])

    def shift_(self, x1: Tensor, x2: Tensor, index: int, context: Tensor | None) -> None:
        """Coupling ``index`` without its last bias, to ``x2``, wherever that lies."""
        h = self._hidden(index, x1, None if context is None else self._operand(context), None)
        weight, sign = self.layers[index][-1][0], -1 if self.inverse else 1
        if h.dtype == x2.dtype:
            x2.addmm_(h, weight.t(), alpha=sign)
        else:
            x2.add_(torch.mm(h, weight.t()), alpha=sign)

    def _shifted(self, x2: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``x2 + h W^T + b``; back, what is added has the opposite sign, to the last bit."""
        fuses = self.onednn.takes(weight, h.shape[0])
        at_once = fuses or self.onednn.takes_sum(weight)
        if at_once and not self.inverse and x2.dtype == self.dtype:
            return linear_pointwise.binary(h, x2, weight, bias, "add")
        if fuses or x2.dtype != self.dtype:
            shift = self._linear(weight, bias, h)
            return x2 - shift if self.inverse else x2 + shift
        if self.inverse:
            return torch.sub(x2, bias).addmm_(h, weight.t(), alpha=-1)
        return torch.add(x2, bias).addmm_(h, weight.t())  # addmm would copy x2 first

    def _hidden(self, index: int, x1: Tensor, c: Tensor | None, kept: Kept | None) -> Tensor:
        """The last hidden layer of coupling ``index``."""
        h, plus, layers = self._operand(x1), None, self.layers[index][:-1]
        if c is not None:
            bias = layers[0][1]
            plus = torch.addmm(bias, c, self.context_weights[index].t())
        if kept is None:
            for weight, bias in layers:
                h, plus = self._activated(weight, bias, h, plus), None
            return h
        bounded = self.relu and any(self.onednn.takes(w, h.shape[0]) for w, _ in layers)
        size = _size(x1) if bounded and plus is None else None  # of the numbers in h, if known
        for weight, bias in layers:
            finite = False
            if bounded and plus is None:
                size = self._bound(weight, bias, _size(h) if size is None else size)
                finite = size < LARGE
            kept.operands.append(h)
            h, plus = self._kept(weight, bias, h, plus, kept, finite), None
            if not finite:
                size = None
        kept.operands.append(h)
        return h

    def _linear(
        self, weight: Tensor, bias: Tensor, h: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        """``h W^T + b``, with ``plus`` for the bias."""
        if self.onednn.takes(weight, h.shape[0]):
            if plus is None:
                return linear_pointwise(h, weight, bias, "none", [], "")
            return linear_pointwise.binary(h, plus, weight, None, "add")
        if self.adds_after:
            return torch.mm(h, weight.t()).add_(bias if plus is None else plus)
        return torch.addmm(bias if plus is None else plus, h, weight.t())

    def _activated(
        self, weight: Tensor, bias: Tensor, h: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        if plus is None:
            fuses = self.onednn.takes(weight, h.shape[0])
            if fuses and self.activation.fused is not None:
                return linear_pointwise(h, weight, bias, *self.activation.fused)
            if self.relu_in_product and not fuses:
                return torch._addmm_activation(bias, h, weight.t())
        return self.activation.apply_(self._linear(weight, bias, h, plus))

    def _kept(
        self,
        weight: Tensor,
        bias: Tensor,
        h: Tensor,
        plus: Tensor | None,
        own: Kept,
        finite: bool,
    ) -> Tensor:
        """As :meth:`_activated`, with what the gradient needs; ``finite``: ``h W^T + b`` is."""
        if self.activation.from_input:
            own.inputs.append(self._linear(weight, bias, h, plus))
            return self.activation.apply_(own.inputs[-1].clone())
        if not self.relu:
            return self._activated(weight, bias, h, plus)
        # a gradient through almost nothing is almost nothing, its square in an optimizer a denormal
        # number, and arithmetic with such takes several times as long: here, relu's zero is zero
        fuses = plus is None and self.onednn.takes(weight, h.shape[0])
        if fuses and finite:  # oneDNN's relu makes 0 of NaN
            return linear_pointwise(h, weight, bias, "relu", [], "")
        if plus is None and self.relu_in_product and not fuses:
            out = torch._addmm_activation(bias, h, weight.t())
        else:
            out = torch.relu_(self._linear(weight, bias, h, plus))
        if out.is_cpu and out.dtype == torch.bfloat16:
            out.view(torch.int16).bitwise_and_(0x7FFF)  # NaN without a sign, see relu's gradient
        return out

    def _bound(self, weight: Tensor, bias: Tensor, size: float) -> float:
        """Of the numbers in ``h W^T + b``, where those of ``h`` are at most ``size``: by Cauchy and
        Schwarz, a row of W by all of W, whose norm is quick to compute."""
        for t, bound in ((weight, _norm), (bias, _size)):
            if id(t) not in self._sizes:
                self._sizes[id(t)] = bound(t)
        return size * self._sizes[id(weight)] * weight.shape[1] ** 0.5 + self._sizes[id(bias)]

    def back(
        self,
        grads: list[Tensor],
        context: Tensor | None,
        grad_c: Tensor | None,
        kept: list[Kept],
        sums: list[list[Sum]],
        wants_x: bool,
    ) -> None:
        """``grads``, those of the two sides after :meth:`run`, become those before it, in place.

        The context's is added to ``grad_c``, where it is wanted, the parameters' to ``sums``.
        """
        c = None if context is None else self._operand(context)
        for step, index in reversed(list(enumerate(self.steps))):
            side = self.chain.conditions[index]
            g2 = -grads[1 - side] if self.inverse else grads[1 - side]
            g1 = grads[side] if step > 0 or wants_x else None
            g1 = self._back(index, kept[step], c, g2, g1, grad_c, sums[index])
            if g1 is not None:
                grads[side] = g1

    def _back(
        self,
        index: int,
        kept: Kept,
        c: Tensor | None,
        grad_y2: Tensor,
        grad_y1: Tensor | None,
        grad_c: Tensor | None,
        sums: list[Sum],
    ) -> Tensor | None:
        """``grad_y1``, where it is wanted, with coupling ``index``'s share; ``grad_y2`` is that of
        the shift."""
        d, layers = self._operand(grad_y2), self.layers[index]
        for k in range(len(layers) - 1, 0, -1):
            weight, h = layers[k][0], kept.operands[k]
            sums[k].add_product(d, h)
            if self.onednn.takes_back(weight, d.shape[0]):
                d = linear_pointwise(d, weight.t(), None, "none", [], "")
            else:
                d = torch.mm(d, weight)
            self.activation.backward_(d, kept.inputs[k - 1] if self.activation.from_input else h)
        sums[0].add_product(d, kept.operands[0])
        if c is not None:
            sums[-1].add_product(d, c)
            if grad_c is not None:
                add_product(grad_c, d, self.context_weights[index])
        weight = layers[0][0]
        if grad_y1 is None:
            return None
        if self.onednn.takes_back(weight, d.shape[0]):
            return linear_pointwise.binary(d, grad_y1, weight.t(), None, "add")
        add_product(grad_y1, d, weight)
        return grad_y1

    def sums(self) -> list[list[Sum]]:
        """For the gradients of each coupling's layers; then its first one's weights for context."""
        more = [False] if self.chain.context else []
        return [[Sum(biased) for biased in [True] * len(own) + more] for own in self.layers]

    def gathered(self, sums: list[list[Sum]]) -> list[Tensor]:
        """The gradients of the parameters, in their order."""
        found = []
        for layers, own in zip(self.chain.couplings, sums, strict=True):
            for k, (weight, bias) in enumerate(layers):
                total = own[k].total()
                if total is None:  # no rows
                    found += [torch.zeros_like(weight), torch.zeros_like(bias)]
                    continue
                grad, grad_bias = total
                if k == 0 and self.chain.context and (of_context := own[-1].total()):
                    grad = torch.cat((grad, of_context[0]), 1)
                found += [grad, grad_bias]
        return found


def _norm(weight: Tensor) -> float:
    """At least that of the whole weight: squares of small numbers may have vanished."""
    return float(torch.linalg.vector_norm(weight)) + 1e-15


def _size(x: Tensor) -> float:
    """Of the largest number; NaN if there is any."""
    if not x.numel():
        return 0.0
    if x.dtype != torch.bfloat16:
        return float(x.abs().amax())
    # bfloat16 without signs has the order of its bits, whose largest is found ten times as fast
    return float((x.view(torch.int16) & 0x7FFF).amax().view(torch.bfloat16))
