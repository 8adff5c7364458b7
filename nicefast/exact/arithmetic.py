"""Arithmetic whose bits depend on nothing but its operands: what an exact inverse is built of.

On a grid (:mod:`nicefast.exact.grid`), x2 + m(x1) - m(x1) is x2, provided that m(x1) is the same
both times, whatever the size of the batch, the number of threads, or the order in which a product
sums. Here it is, since products are sums of integers: operands are rounded to so many bits that no
partial sum leaves the 53 bits of float64, and then every order gives the same sum, on every
machine. Activations are made of additions, multiplications and divisions, which IEEE 754 defines to
the last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..activations import ACTIVATIONS
from ..runtime.threads import settle_allocator
from .grid import uncompiled

BLOCK_ELEMENTS = 1 << 19  # of one activation, in float64
GPU_ELEMENTS = 1 << 26
SUM_BITS = 53  # of integers that float64 adds exactly
LARGEST = 450  # exponent of operands: with its square, and the bits, still within float64


class Operand(NamedTuple):
    """A weight matrix (O, K), ready for exact products: ``W[o, k] ~ weight[k, o] * columns[k]``.

    Entries of a column o of ``weight`` are integers of ``own`` bits, those of the other operand
    integers of ``bits`` bits, times a power of two; the sum of K of their products has 53.
    """

    weight: Tensor  # (K, O), float64
    columns: Tensor  # (K,), powers of two; 0 for a feature without weights
    bits: int

    @classmethod
    def of(cls, weight: Tensor) -> Operand:
        """Columns are brought to the same size by powers of two: features may have any scales."""
        room = SUM_BITS - math.ceil(math.log2(max(weight.shape[1], 1)))
        own = room // 2
        w = weight.detach().double()
        largest = w.abs().amax(0)
        exponent = _exponent(largest)
        w = _round_to_bits(w * _power(-exponent), own)
        # a feature without any weight must not decide how finely the others are rounded
        columns = torch.where(largest == 0, 0.0, _power(exponent))
        return cls(w.t(), columns, room - own)

    def times(self, h: Tensor) -> Tensor:
        """``h W^T`` (N, O) of h (N, K), float64: the same bits in any batch."""
        return _round_to_bits(h * self.columns, self.bits) @ self.weight


def _round_to_bits(x: Tensor, bits: int) -> Tensor:
    """``x`` (N, K), float64, written over: each row rounded to integers of ``bits`` bits times the
    row's own power of two. NaN where a row's size is out of range: never a rounded sum."""
    low, high = x.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(-low, high)
    # a number this large has no digits below those that are to stay
    large = _power(_exponent(largest) + (SUM_BITS - 1 - bits)) * 1.5
    large = torch.where(largest <= 2.0**LARGEST, large, torch.nan)
    return x.add_(large).sub_(large)


def exp(x: Tensor) -> Tensor:
    """e^x of float64 to about 1e-11, by operations that IEEE 754 defines; x is cut at +-700.

    ``x = k ln 2 + r``, ``|r| <= ln(2)/2``; the series of e^r, times 2^k.
    """
    x = x.clamp(-700.0, 700.0)
    k = (x * (1 / math.log(2))).round_()
    # two parts of ln 2: the first has so few bits that k times it is exact
    r = (x - k * 0.693145751953125) - k * 1.4286068203094172e-06
    y = torch.full_like(r, 1 / math.factorial(10))
    for n in range(9, -1, -1):
        y.mul_(r).add_(1 / math.factorial(n))
    return y.mul_(_power(torch.where(k.isnan(), 0.0, k)))


def _tanh(x: Tensor) -> Tensor:
    e = exp(x.abs() * -2)
    return ((1 - e) / (1 + e)) * x.sign()


# Press et al., Numerical Recipes in C, 1992, section 6.2: erfc to 1.2e-7, relative
_ERFC = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806]
_ERFC += [0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277]


def _gelu(x: Tensor) -> Tensor:
    z = x.abs() * math.sqrt(0.5)
    t = 1 / (1 + 0.5 * z)
    y = torch.full_like(t, _ERFC[-1])
    for c in reversed(_ERFC[:-1]):
        y.mul_(t).add_(c)
    tail = t * exp(y - z * z) * 0.5  # of the normal distribution, beyond |x|
    return x * torch.where(x > 0, 1 - tail, tail)


#: of float64, written over where that is quicker; equal to those of the reference to about 1e-7
_PORTABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": ACTIVATIONS["leaky_relu"].apply_,
    "tanh": _tanh,
    "gelu": _gelu,
    "silu": lambda x: x / (exp(-x) + 1),
    "elu": lambda x: torch.where(x > 0, x, exp(x) - 1),
}


class Layer(NamedTuple):
    """One linear layer, ready for :func:`mlp`; the columns of its input follow one another in
    ``operands``."""

    weight: Tensor
    bias: Tensor
    operands: list[Operand]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, context: int = 0) -> Layer:
        """The last ``context`` columns have a scale of their own."""
        parts = (weight,) if not context else weight.split((weight.shape[1] - context, context), 1)
        return cls(weight, bias, [Operand.of(part) for part in parts])

    def __call__(self, h: Tensor) -> Tensor:
        """``h W^T + b`` (N, O), float64."""
        pieces = h.split([len(operand.columns) for operand in self.operands], 1)
        first, *others = (o.times(piece) for o, piece in zip(self.operands, pieces, strict=True))
        for other in others:
            first.add_(other)
        return first.add_(self.bias.detach().double())


class _Kept(NamedTuple):
    """What the gradient needs: operands before dropout, inputs of activations, and what dropout
    multiplied with."""

    operands: list[Tensor]
    inputs: list[Tensor]
    masks: list[Tensor]


@uncompiled
def mlp(
    parameters: Sequence[tuple[Tensor, Tensor]],
    activation: str,
    h: Tensor,
    context: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A multi-layer perceptron of rows ``h`` (N, C): (N, S), the same bits in any batch.

    Gradients are those of ordinary arithmetic; their products follow autocast. Weights become
    integers anew in each call: they can't be out of date. ``drop`` is applied to each hidden layer;
    the result is then random.

    >>> w, b = torch.ones(1, 2), torch.zeros(1)
    >>> mlp([(w, b)], "relu", torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """
    width = 0 if context is None else context.shape[1]
    layers = [Layer.of(w, b, 0 if i else width) for i, (w, b) in enumerate(parameters)]
    if context is not None:
        h = torch.cat((h, context.to(h.dtype)), 1)
    flat = [t for pair in parameters for t in pair]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, *flat)):
        return _MLP.apply(layers, activation, drop, h, *flat)
    widest = max(max(layer.weight.shape) for layer in layers)
    most = max(1, (BLOCK_ELEMENTS if h.device.type == "cpu" else GPU_ELEMENTS) // widest)
    settle_allocator()
    y = h.new_empty(len(h), len(parameters[-1][1]))
    with torch.no_grad():
        for i in range(0, len(h), most):
            y[i : i + most] = _run(layers, activation, h[i : i + most], drop)
    return y


def _run(
    layers: Sequence[Layer],
    activation: str,
    h: Tensor,
    drop: Callable[[Tensor], Tensor] | None,
    kept: _Kept | None = None,
) -> Tensor:
    x = h
    for i, layer in enumerate(layers):
        if i:
            if kept is not None and ACTIVATIONS[activation].from_input:
                kept.inputs.append(x.to(h.dtype))
            x = _PORTABLE[activation](x)
        if kept is not None:
            kept.operands.append(x.to(h.dtype))
        if i and drop is not None:
            mask = drop(torch.ones_like(x, dtype=h.dtype))
            x = x * mask
            if kept is not None:
                kept.masks.append(mask)
        x = layer(x)
    return x.to(h.dtype)


class _MLP(Function):
    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[Layer],
        activation: str,
        drop: Callable[[Tensor], Tensor] | None,
        h: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        kept = _Kept([], [], [])
        y = _run(layers, activation, h.contiguous(), drop, kept)
        kind = h.device.type
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.activation, ctx.counts = ACTIVATIONS[activation], [len(own) for own in kept]
        ctx.save_for_backward(*parameters, *(t for own in kept for t in own))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        parameters, *kept = (
            list(itertools.islice(saved, n)) for n in (2 * ctx.counts[0], *ctx.counts)
        )
        operands, inputs, masks = kept
        wants_h, *wants = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * len(parameters)
        for i in reversed(range(len(operands))):
            weight, bias = parameters[2 * i : 2 * i + 2]
            dtype = ctx.autocast or torch.promote_types(g.dtype, weight.dtype)
            cast, h = g.to(dtype).contiguous(), operands[i]
            h = h * masks[i - 1] if i and masks else h
            if wants[2 * i]:
                grads[2 * i] = (cast.t() @ h.to(dtype)).to(weight.dtype)
            if wants[2 * i + 1]:
                grads[2 * i + 1] = g.sum(0).to(bias.dtype)
            if i or wants_h:
                g = (cast @ weight.to(dtype)).to(g.dtype)
            if i:
                g = g.mul_(masks[i - 1]) if masks else g
                made_of = inputs[i - 1] if ctx.activation.from_input else operands[i]
                g = ctx.activation.backward_(g, made_of)
        return None, None, None, g if wants_h else None, *grads


def _exponent(size: Tensor) -> Tensor:
    """e with ``size <= 2^e``, from -LARGEST to LARGEST."""
    return torch.frexp(size).exponent.clamp(-LARGEST, LARGEST)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, in float64; exponents of +-1022 at most."""
    return (exponent.to(torch.int64) + 1023).bitwise_left_shift(52).view(torch.float64)
