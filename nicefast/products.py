"""A chain of additive couplings with MLP conditioners as nothing but matrix products.

Every product has its bias (and its activation) in the epilogue or in place, and no row is cut out,
concatenated or copied between couplings: the two sides of the partition are taken apart once, at
the boundary, and each coupling adds to one of them. On the CPU, rows go through the whole chain in
blocks that stay in the cache, several blocks in flight.

The gradient needs the activations. They are kept, or rebuilt, a block of rows at a time: that costs
one product more for the three of a plain step, and makes what has to be stored independent of the
number of couplings. They are rebuilt from the chain's input, for the same products as from its
output: going back, rounding errors can grow with every coupling until the gradient is another
flow's (64 couplings with weights that double a vector's length are enough in float32).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks
from .ops import Features, columns_of

Layers = tuple[tuple[Tensor, Tensor], ...]  # (weight, bias) of each linear layer of one conditioner

BLOCK_ELEMENTS = 1 << 19  # of one activation: few enough for the cache, and threads seldom meet
LEAST_FLOPS = 1 << 30  # below this, a batch is not worth the hand-over to threads
ONEDNN_FLOPS = 1 << 22  # below this, oneDNN's set-up costs more than its product saves,
ONEDNN_ROWS = 1 << 10  # and with fewer rows, so does arranging the weights,
ONEDNN_FLOPS_OF_FEW = 1 << 24  # up to this
ROWS_PER_WIDTH = 16
TURNED_ROWS_PER_WIDTH = 2  # with fewer rows, arranging weights that lie the other way costs more
FEW_INPUTS = 64  # of a layer: the gradient of its weights is then faster as in x out
REBUILT_ELEMENTS = 1 << 23  # of all activations of a block
GPU_ELEMENTS = 1 << 28  # of one activation on a GPU


class Activation(NamedTuple):
    """In place; its gradient, written over the first argument; and what oneDNN calls it."""

    apply_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]
    from_input: bool  # the gradient is made of the activation's input, not of its output
    fused: tuple[str, list[float], str] | None


_aten = torch.ops.aten
# not in every build
linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# oneDNN's relu turns NaN into 0, its leaky_relu does not; -2^-60 |x| is nothing beside what else is
# summed, and far enough from the denormal numbers, with which arithmetic is slow
ACTIVATIONS = {
    "relu": Activation(
        torch.relu_,
        lambda g, y: _aten.threshold_backward.grad_input(g, y, 0, grad_input=g),
        False,
        ("leaky_relu", [2.0**-60], ""),
    ),
    "leaky_relu": Activation(
        lambda x: _aten.leaky_relu_(x, 0.01),
        lambda g, y: _aten.leaky_relu_backward.grad_input(g, y, 0.01, True, grad_input=g),
        False,
        ("leaky_relu", [0.01], ""),
    ),
    "tanh": Activation(
        torch.tanh_,
        lambda g, y: _aten.tanh_backward.grad_input(g, y, grad_input=g),
        False,
        ("tanh", [], ""),
    ),
    "gelu": Activation(
        _aten.gelu_,
        lambda g, x: _aten.gelu_backward.grad_input(g, x, grad_input=g),
        True,
        ("gelu", [], "none"),
    ),
    "silu": Activation(
        _aten.silu_,
        lambda g, x: _aten.silu_backward.grad_input(g, x, grad_input=g),
        True,
        ("swish", [], ""),
    ),
    "elu": Activation(
        _aten.elu_,
        lambda g, y: _aten.elu_backward.grad_input(g, 1.0, 1.0, 1.0, True, y, grad_input=g),
        False,
        None,
    ),
}


@dataclass(frozen=True)
class Chain:
    """Couplings that take one partition and its complement, and how to compute them.

    ``sides`` are the features of the two sides; coupling l conditions on ``sides[conditions[l]]``
    and shifts the other. ``bfloat16``: the operands of products; sums and the stream are float32.
    ``rebuild``: activations are rebuilt in the backward pass, otherwise they are kept.
    """

    couplings: tuple[Layers, ...]
    conditions: tuple[int, ...]
    sides: tuple[Features, Features]
    activation: str
    context: int
    bfloat16: bool
    rebuild: bool

    @property
    def parameters(self) -> list[Tensor]:
        return [t for layers in self.couplings for pair in layers for t in pair]

    @property
    def products(self) -> int:
        """Matrix products of one pass."""
        return sum(len(layers) for layers in self.couplings)

    @property
    def flops(self) -> int:
        """Of all products, for one row."""
        return 2 * sum(w.numel() for layers in self.couplings for w, _ in layers)

    @property
    def hidden(self) -> int:
        """Units of the widest hidden layer."""
        return max(b.shape[0] for layers in self.couplings for _, b in layers[:-1])

    @property
    def width(self) -> int:
        """Of the widest tensor between two products."""
        return max(b.shape[0] for layers in self.couplings for _, b in layers)

    @property
    def kept(self) -> int:
        """Numbers that the gradient needs of one row."""
        twice = 2 if ACTIVATIONS[self.activation].from_input else 1
        each = (twice * w.shape[1] for layers in self.couplings for w, _ in layers)
        return sum(each)

    def steps(self, inverse: bool) -> list[int]:
        """The couplings in the order in which they are computed."""
        return list(range(len(self.couplings)))[:: -1 if inverse else 1]

    def cut(self, rows: int, device: torch.device, training: bool = False) -> Blocks:
        on_cpu = device.type == "cpu"
        # with few rows for the size of the weights, each thread would have to read all of them
        alone = rows < ROWS_PER_WIDTH * self.width
        together = torch.get_num_threads() if alone else 1  # at work on one block
        most = (together * BLOCK_ELEMENTS if on_cpu else GPU_ELEMENTS) // self.width
        if training and self.rebuild:
            most = min(most, (REBUILT_ELEMENTS if on_cpu else GPU_ELEMENTS) // self.kept)
        return Blocks(rows, max(1, most), rows if alone else LEAST_FLOPS // self.flops, device)


class Kept(NamedTuple):
    """What one conditioner leaves for its gradient: the operand of each product, and the inputs of
    activations where the gradient is made of those."""

    operands: list[Tensor]
    inputs: list[Tensor]


@dataclass
class Activations:
    """What is kept for the backward pass: by block, one entry for each coupling as computed, and
    the weights as products take them (see :class:`_Products`)."""

    cut: Blocks
    kept: dict[int, list[Kept]] = field(default_factory=dict)
    products: _Products | None = None


def couple(
    chain: Chain,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    activations: Activations | None = None,
) -> Tensor:
    """``x`` [N, D] through all couplings, or back through them; a new float32 tensor.

    What the gradient needs goes into ``activations``, where they are given.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cut = chain.cut(len(x), x.device) if activations is None else activations.cut
    products = _Products(chain, x.device, inverse)
    if activations is not None:
        activations.products = products

    def work(share: Iterable[int]) -> None:
        for i in share:
            c = None if context is None else products.operand(context[cut[i]])
            pair = _take_apart(x[cut[i]], chain.sides)
            kept = None if activations is None else activations.kept.setdefault(i, [])
            products.run(chain.steps(inverse), pair, c, kept)
            _put_together(y[cut[i]], pair, chain.sides)

    cut.hand_out(work)
    return y


class Gradients(NamedTuple):
    """None where it was not wanted."""

    x: Tensor | None
    context: Tensor | None
    parameters: list[Tensor]


def couple_backward(
    chain: Chain,
    grad_y: Tensor,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    activations: Activations | None = None,
    wants_x: bool = True,
    wants_context: bool = True,
) -> Gradients:
    """Gradients of :func:`couple` from that of its result, at ``x``; activations as they were left.

    Those of the parameters are summed over the blocks of a thread, then over threads, in a fixed
    order: the same bits every time.
    """
    cut = chain.cut(len(x), x.device, training=True) if activations is None else activations.cut
    products = None if activations is None else activations.products
    if products is None:
        products = _Products(chain, x.device, inverse)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
    grad_c = None
    if context is not None and wants_context:
        grad_c = torch.zeros(context.shape, dtype=torch.float32, device=x.device)
    steps, parameters = chain.steps(inverse), chain.parameters

    def work(share: range) -> list[Tensor]:
        sums = [_new_sum(t) for t in parameters]
        if not share:
            return [t.zero_() for t in sums]
        first = list(itertools.accumulate((2 * len(c) for c in chain.couplings), initial=0))
        for i in share:
            c = None if context is None else products.operand(context[cut[i]])
            gc = None if grad_c is None else grad_c[cut[i]]
            g = [t.clone() for t in _take_apart(grad_y[cut[i]], chain.sides)]  # written over
            if activations is not None:
                kept = activations.kept[i]
            else:
                pair, kept = _take_apart(x[cut[i]], chain.sides), []
                products.run(steps, pair, c, kept, to_the_end=False)
            for step, index in reversed(list(enumerate(steps))):
                side = chain.conditions[index]
                into = sums[first[index] : first[index + 1]]
                g1 = None if step == 0 and not wants_x else g[side]
                g2 = -g[1 - side] if inverse else g[1 - side]
                own, is_first = kept[step], i == share[0]
                g1 = products.backward(index, own, c, g2, g1, gc, into, is_first)
                if g1 is not None:
                    g[side] = g1
            if grad_x is not None:
                _put_together(grad_x[cut[i]], g, chain.sides)
        return sums

    total, *others = cut.deal(work)
    for sums in others:
        torch._foreach_add_(total, sums)
    shaped = [
        t.float() if t.shape == p.shape else t.t().contiguous()
        for t, p in zip(total, parameters, strict=True)
    ]
    return Gradients(grad_x, grad_c, shaped)


class _Linear(NamedTuple):
    """One layer as products take it."""

    weight: Tensor
    transposed: Tensor
    bias: Tensor
    flops: int  # for one row


class _Products:
    """The products of a chain on one device, forwards or back through it (``inverse``).

    Weights are converted anew for each call, and kept for its gradient alone: they can't be out of
    date.
    """

    def __init__(self, chain: Chain, device: torch.device, inverse: bool) -> None:
        self.conditions = chain.conditions
        self.activation = ACTIVATIONS[chain.activation]
        self.dtype = torch.bfloat16 if chain.bfloat16 else torch.float32
        self.onednn = device.type == "cpu" and linear_pointwise is not None
        self.relu = self.activation.apply_ is torch.relu_
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.layers = [[self._layer(w, b) for w, b in layers] for layers in chain.couplings]
            self.context_weights: list[Tensor] = []
            if chain.context:
                for layers in self.layers:
                    first = layers[0].weight
                    x, c = first.split((first.shape[1] - chain.context, chain.context), 1)
                    layers[0] = self._layer(x.contiguous(), layers[0].bias)
                    self.context_weights.append(c.contiguous())
            # back: what is added has the opposite sign, to the last bit
            self.last = [
                self._layer(-layers[-1].weight, -layers[-1].bias) if inverse else layers[-1]
                for layers in self.layers
            ]

    def _layer(self, weight: Tensor, bias: Tensor) -> _Linear:
        w = self.operand(weight)
        return _Linear(w, w.t(), self.operand(bias), 2 * w.numel())

    def operand(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def run(
        self,
        steps: list[int],
        pair: list[Tensor],
        c: Tensor | None,
        kept: list[Kept] | None,
        to_the_end: bool = True,
    ) -> None:
        """The sides ``pair`` through couplings, in place; what their gradients need, to ``kept``.

        Not ``to_the_end``: what nothing but the result needs is left out.
        """
        for index in steps:
            side, own = self.conditions[index], None
            if kept is not None:
                own = Kept([], [])
                kept.append(own)
            if to_the_end or index != steps[-1]:
                pair[1 - side] = self.shift(index, pair[side], pair[1 - side], c, own)
            else:
                self.hidden(index, pair[side], c, own)

    def shift(
        self, index: int, x1: Tensor, x2: Tensor, c: Tensor | None, kept: Kept | None = None
    ) -> Tensor:
        """``x2`` shifted by coupling ``index``; what the gradient needs goes to ``kept``."""
        h, last = self.hidden(index, x1, c, kept), self.last[index]
        if x2.dtype != self.dtype:
            return x2 + self._linear(last, h)
        if self._fuses(last, h):
            return linear_pointwise.binary(h, x2, last.weight, last.bias, "add")
        return torch.add(x2, last.bias).addmm_(h, last.transposed)  # addmm would copy x2 first

    def hidden(self, index: int, x1: Tensor, c: Tensor | None, kept: Kept | None) -> Tensor:
        """The last hidden layer of coupling ``index``."""
        h, *layers = self.operand(x1), *self.layers[index][:-1]
        for k, layer in enumerate(layers):
            plus = None
            if k == 0 and c is not None:
                plus = torch.addmm(layer.bias, c, self.context_weights[index].t())
            if kept is None:
                h = self._activated(layer, h, plus)
                continue
            kept.operands.append(h)
            if self.activation.from_input:
                kept.inputs.append(self._linear(layer, h, plus))
                h = self.activation.apply_(kept.inputs[-1].clone())
            else:
                h = self._activated(layer, h, plus, for_gradient=True)
        if kept is not None:
            kept.operands.append(h)
        return h

    def _fuses(self, layer: _Linear, h: Tensor) -> bool:
        """Whether oneDNN takes this product, with what follows it."""
        rows = h.shape[0]
        least = ONEDNN_FLOPS if rows >= ONEDNN_ROWS else ONEDNN_FLOPS_OF_FEW
        return self.onednn and layer.flops * rows >= least

    def _fuses_back(self, layer: _Linear, d: Tensor) -> bool:
        """Whether oneDNN takes the product that leads back through ``layer``."""
        rows = len(d)
        if self.dtype != torch.float32 or rows < TURNED_ROWS_PER_WIDTH * max(layer.weight.shape):
            return False
        return self._fuses(layer, d)

    def _linear(self, layer: _Linear, h: Tensor, plus: Tensor | None = None) -> Tensor:
        """``h W^T + b``, with ``plus`` for the bias."""
        if self._fuses(layer, h):
            if plus is None:
                return linear_pointwise(h, layer.weight, layer.bias, "none", [], "")
            return linear_pointwise.binary(h, plus, layer.weight, None, "add")
        return torch.addmm(layer.bias if plus is None else plus, h, layer.transposed)

    def _activated(
        self, layer: _Linear, h: Tensor, plus: Tensor | None, for_gradient: bool = False
    ) -> Tensor:
        fuses = self._fuses(layer, h)
        # a gradient through almost nothing is almost nothing, its square in an optimizer a denormal
        # number, and arithmetic with such takes several times as long: there, relu's zero is zero
        epilogue = None if self.relu and for_gradient else self.activation.fused
        if plus is None:
            if fuses and epilogue is not None:
                return linear_pointwise(h, layer.weight, layer.bias, *epilogue)
            if self.relu and not fuses:  # one call, and cuBLAS's epilogue
                return torch._addmm_activation(layer.bias, h, layer.transposed)
        return self.activation.apply_(self._linear(layer, h, plus))

    def backward(
        self,
        index: int,
        kept: Kept,
        c: Tensor | None,
        grad_y2: Tensor,
        grad_y1: Tensor | None,
        grad_c: Tensor | None,
        sums: list[Tensor],
        first: bool,
    ) -> Tensor | None:
        """The gradient of y1 with coupling ``index``'s share, which those of the context and the
        parameters (``sums``) get in place; of y1 and context where they are wanted.

        ``grad_y2`` is that of the shift. The ``first`` share of the weights' is written over
        whatever ``sums`` holds.
        """
        d, layers = self.operand(grad_y2), self.layers[index]
        for k in range(len(layers) - 1, -1, -1):
            grad_w, grad_b = sums[2 * k], sums[2 * k + 1]
            grad_b.add_(d.sum(0))  # in float32 inside: another dtype here would copy d first
            flipped = grad_w.shape[0] < grad_w.shape[1] == d.shape[1]
            inputs = kept.operands[k]
            if k == 0 and c is not None:
                grad_w, rest = grad_w.split((inputs.shape[1], c.shape[1]), 0 if flipped else 1)
                _add_gradient(rest, d, c, flipped, first)
                if grad_c is not None:
                    _add_product(grad_c, d, self.context_weights[index])
            _add_gradient(grad_w, d, inputs, flipped, first)
            if k == 0:
                break
            if self._fuses_back(layers[k], d):
                d = linear_pointwise(d, layers[k].transposed, None, "none", [], "")
            else:
                d = torch.mm(d, layers[k].weight)
            from_input = self.activation.from_input
            self.activation.backward_(d, kept.inputs[k - 1] if from_input else kept.operands[k])
        if grad_y1 is None:
            return None
        if self._fuses_back(layers[0], d):
            return linear_pointwise.binary(d, grad_y1, layers[0].transposed, None, "add")
        _add_product(grad_y1, d, layers[0].weight)
        return grad_y1


def _new_sum(parameter: Tensor) -> Tensor:
    """What its gradient is summed in: a bias's in float64, a sum of sums over blocks next to a
    plain step's pairwise one; a weight's, yet unwritten, as in x out where that is faster."""
    if parameter.ndim == 1:
        return torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
    out, inputs = parameter.shape
    shape = (inputs, out) if inputs < min(out, FEW_INPUTS) else (out, inputs)
    return torch.empty(shape, dtype=torch.float32, device=parameter.device)


def _add_gradient(total: Tensor, d: Tensor, inputs: Tensor, flipped: bool, first: bool) -> None:
    if flipped:
        _add_product(total, inputs.t(), d, first)
    else:
        _add_product(total, d.t(), inputs, first)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """``total += a b``; the ``first`` time ``total = a b``, whatever it was."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


def _take_apart(x: Tensor, sides: tuple[Features, Features]) -> list[Tensor]:
    """The two sides of the rows ``x``, each a view where its features are evenly spaced."""
    return [
        x[:, columns]
        if isinstance(columns := columns_of(f.indices, f.start, f.step, f.size), slice)
        else x.index_select(1, columns)
        for f in sides
    ]


def _put_together(out: Tensor, pair: list[Tensor], sides: tuple[Features, Features]) -> None:
    for half, f in zip(pair, sides, strict=True):
        columns = columns_of(f.indices, f.start, f.step, f.size)
        if isinstance(columns, slice):
            out[:, columns] = half
        else:
            out.index_copy_(1, columns, half)
