"""A chain of additive couplings with MLP conditioners as nothing but matrix products.

Every product has its bias (and its activation) in the epilogue or in place, and no row is cut out,
concatenated or copied between couplings: the two sides of the partition are taken apart once, at
the boundary, and each coupling adds to one of them. On the CPU, rows go through the whole chain in
blocks that stay in the cache, several blocks in flight.

The gradient needs the activations. They are kept, or rebuilt: a coupling is invertible, so from the
last one upwards its input is its output less the shift, and the shift is made of the very
activations that its gradient needs. Rebuilding costs one product more for the three of a plain
step, and makes what has to be stored independent of the number of couplings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks
from .ops import Features, columns_of

Layers = tuple[tuple[Tensor, Tensor], ...]  # (weight, bias) of each linear layer of one conditioner

BLOCK_ELEMENTS = 1 << 20  # of one activation: large enough that threads seldom meet
LEAST_FLOPS = 1 << 30  # below this, a batch is not worth the hand-over to threads
ONEDNN_FLOPS = 1 << 22  # below this, oneDNN's set-up costs more than its product saves
PACK_BLOCKS = 4  # with more blocks than this, packing the weights costs less than it saves
ROWS_PER_WIDTH = 16
GPU_ELEMENTS = 1 << 28  # of one activation on a GPU


class Activation(NamedTuple):
    """In place; its gradient, written over the first argument; and what oneDNN calls it."""

    apply_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]
    from_input: bool  # the gradient is made of the activation's input, not of its output
    fused: tuple[str, list[float], str] | None


_aten = torch.ops.aten
# oneDNN's relu turns NaN into 0, its leaky_relu does not; and -2^-100 |x| is lost in any sum
ACTIVATIONS = {
    "relu": Activation(
        torch.relu_,
        lambda g, y: _aten.threshold_backward.grad_input(g, y, 0, grad_input=g),
        False,
        ("leaky_relu", [2.0**-100], ""),
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

    def steps(self, inverse: bool) -> list[int]:
        """The couplings in the order in which they are computed."""
        return list(range(len(self.couplings)))[:: -1 if inverse else 1]

    def cut(self, rows: int, device: torch.device, training: bool = False) -> Blocks:
        most = (BLOCK_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // self.width
        most = max(1, most)
        # with few rows for the size of the weights, one more set of gradients costs too much
        alone = training and rows < ROWS_PER_WIDTH * self.width
        return Blocks(rows, most, rows if alone else LEAST_FLOPS // self.flops, device)


class Kept(NamedTuple):
    """What one conditioner leaves for its gradient: the operand of each product, and the inputs of
    activations where the gradient is made of those."""

    operands: list[Tensor]
    inputs: list[Tensor]


class Activations(NamedTuple):
    """What is kept for the backward pass: by block, one entry for each coupling as computed."""

    cut: Blocks
    kept: dict[int, list[Kept]]


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
    keep = activations is not None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cut = chain.cut(len(x), x.device) if activations is None else activations.cut
    products = _Products(chain, x.device, packed=not keep and len(cut) > PACK_BLOCKS)

    def work(share: range) -> None:
        for i in share:
            c = None if context is None else products.operand(context[cut[i]])
            pair, left = _take_apart(x[cut[i]], chain.sides), []
            for index in chain.steps(inverse):
                side = chain.conditions[index]
                k = products.conditioner(index, pair[side], c, keep)
                pair[1 - side] = products.shift(index, k, pair[1 - side], inverse)
                left.append(k)
            _put_together(y[cut[i]], pair, chain.sides)
            if activations is not None:
                activations.kept[i] = left

    cut.deal(work)
    return y


class Gradients(NamedTuple):
    """None where it was not wanted."""

    x: Tensor | None
    context: Tensor | None
    parameters: list[Tensor]


def couple_backward(
    chain: Chain,
    grad_y: Tensor,
    y: Tensor,
    context: Tensor | None,
    inverse: bool,
    activations: Activations | None = None,
    wants_x: bool = True,
    wants_context: bool = True,
) -> Gradients:
    """Gradients of :func:`couple` from that of its result ``y``; activations as they were left.

    Those of the parameters are summed over the blocks of a thread, then over threads, in a fixed
    order: the same bits every time.
    """
    cut = chain.cut(len(y), y.device, training=True) if activations is None else activations.cut
    products = _Products(chain, y.device, packed=False)
    grad_x = torch.empty(y.shape, dtype=y.dtype, device=y.device) if wants_x else None
    grad_c = None
    if context is not None and wants_context:
        grad_c = torch.zeros(context.shape, dtype=torch.float32, device=y.device)
    steps, parameters = chain.steps(not inverse), chain.parameters

    def work(share: range) -> list[Tensor]:
        # biases' in float64: a sum of sums over blocks, next to a plain step's pairwise one
        sums = [
            torch.zeros(t.shape, dtype=torch.float64, device=t.device)
            if t.ndim == 1
            else torch.empty(t.shape, dtype=torch.float32, device=t.device)
            for t in parameters
        ]
        if not share:
            return [t.zero_() for t in sums]
        first = list(itertools.accumulate((2 * len(c) for c in chain.couplings), initial=0))
        for i in share:
            c = None if context is None else products.operand(context[cut[i]])
            gc = None if grad_c is None else grad_c[cut[i]]
            g = [t.clone() for t in _take_apart(grad_y[cut[i]], chain.sides)]  # written over
            pair = _take_apart(y[cut[i]], chain.sides)
            for step, index in enumerate(steps):
                side, last = chain.conditions[index], step + 1 == len(steps)
                if activations is not None:
                    k = activations.kept[i][-1 - step]
                else:
                    k = products.conditioner(index, pair[side], c, keep=True)
                    if not last:  # the chain's own input is not asked for
                        pair[1 - side] = products.shift(index, k, pair[1 - side], not inverse)
                into = sums[first[index] : first[index + 1]]
                g1 = None if last and not wants_x else g[side]
                products.backward(
                    index, k, c, g[1 - side], g1, gc, into, inverse, first=i == share[0]
                )
            if grad_x is not None:
                _put_together(grad_x[cut[i]], g, chain.sides)
        return sums

    total, *others = cut.deal(work)
    for sums in others:
        torch._foreach_add_(total, sums)
    return Gradients(grad_x, grad_c, [t.float() for t in total])


class _Products:
    """The products of a chain on one device, with the weights as they take them.

    Weights are converted and packed anew for each call, never kept: they can't be out of date.
    """

    def __init__(self, chain: Chain, device: torch.device, packed: bool) -> None:
        self.activation = ACTIVATIONS[chain.activation]
        self.dtype = torch.bfloat16 if chain.bfloat16 else torch.float32
        self.onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.weights = [[self.operand(w) for w, _ in layers] for layers in chain.couplings]
            self.biases = [[self.operand(b) for _, b in layers] for layers in chain.couplings]
            self.context_weights: list[Tensor] = []
            if chain.context:
                for weights in self.weights:
                    sizes = (weights[0].shape[1] - chain.context, chain.context)
                    x, c = weights[0].split(sizes, 1)
                    weights[0] = x.contiguous()
                    self.context_weights.append(c.contiguous())
            self.packed = self.weights
            if packed and self.onednn:
                pack = torch.ops.mkldnn._reorder_linear_weight
                self.packed = [[pack(w) for w in weights] for weights in self.weights]

    def operand(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def conditioner(self, index: int, x1: Tensor, c: Tensor | None, keep: bool) -> Kept:
        """All products of coupling ``index`` but its last; what that takes, or all, to ``keep``."""
        h, operands, inputs = self.operand(x1), [], []
        for k in range(len(self.biases[index]) - 1):
            operands.append(h)
            plus = None
            if k == 0 and c is not None:
                plus = torch.addmm(self.biases[index][0], c, self.context_weights[index].t())
            if keep and self.activation.from_input:
                inputs.append(self._linear(index, k, h, plus, activate=False))
                h = self.activation.apply_(inputs[-1].clone())
            else:
                h = self._linear(index, k, h, plus, activate=True)
        return Kept([*operands, h] if keep else [h], inputs)

    def shift(self, index: int, kept: Kept, x2: Tensor, inverse: bool) -> Tensor:
        """``x2`` with the last product added to it (inverse: taken from it)."""
        h = kept.operands[-1]
        if inverse or x2.dtype != self.dtype:
            return x2.add(self._linear(index, -1, h, None, False), alpha=-1 if inverse else 1)
        return self._linear(index, -1, h, x2, False, plus_bias=True)

    def backward(
        self,
        index: int,
        kept: Kept,
        c: Tensor | None,
        grad_y2: Tensor,
        grad_y1: Tensor | None,
        grad_c: Tensor | None,
        sums: list[Tensor],
        inverse: bool,
        first: bool,
    ) -> None:
        """Add coupling ``index``'s share to the gradients of y1, context and parameters.

        Those of y1 and the context where they are wanted. The ``first`` share of the weights' is
        written over whatever ``sums`` holds.
        """
        d = self.operand(-grad_y2 if inverse else grad_y2)
        for k in range(len(self.biases[index]) - 1, -1, -1):
            grad_w, grad_b = sums[2 * k], sums[2 * k + 1]
            grad_b.add_(d.sum(0, dtype=torch.float64))
            if k == 0 and c is not None:
                x_columns = grad_w.shape[1] - c.shape[1]
                _add_product(grad_w[:, x_columns:], d.t(), c, first)
                grad_w = grad_w[:, :x_columns]
                if grad_c is not None:
                    _add_product(grad_c, d, self.context_weights[index])
            _add_product(grad_w, d.t(), kept.operands[k], first)
            if k == 0:
                if grad_y1 is not None:
                    _add_product(grad_y1, d, self.weights[index][0])
                break
            w = self.weights[index][k]
            if self.onednn and self.dtype == torch.float32 and d.numel():
                d = torch.ops.mkldnn._linear_pointwise(d, w.t(), None, "none", [], "")
            else:
                d = torch.mm(d, w)
            from_input = self.activation.from_input
            self.activation.backward_(d, kept.inputs[k - 1] if from_input else kept.operands[k])

    def _linear(
        self,
        index: int,
        k: int,
        h: Tensor,
        plus: Tensor | None,
        activate: bool,
        plus_bias: bool = False,
    ) -> Tensor:
        """``activation(h W^T + b)``, with ``plus`` for the bias (plus_bias: and the bias)."""
        w, b = self.weights[index][k], self.biases[index][k]
        fused = self.activation.fused if activate else ("none", [], "")
        if self.onednn and 2 * h.shape[0] * w.numel() >= ONEDNN_FLOPS:
            linear, w = torch.ops.mkldnn._linear_pointwise, self.packed[index][k]
            if plus is not None:
                y = linear.binary(h, plus, w, b if plus_bias else None, "add")
            elif fused is not None:
                return linear(h, w, b, *fused)
            else:
                y = linear(h, w, b, "none", [], "")
        elif plus is None:
            if activate and h.is_cuda and self.activation.apply_ is torch.relu_:
                return torch._addmm_activation(b, h, w.t())  # in cuBLAS's epilogue
            y = torch.addmm(b, h, w.t())
        else:
            y = torch.addmm(plus, h, w.t())
            if plus_bias:
                y += b
        return self.activation.apply_(y) if activate else y


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
