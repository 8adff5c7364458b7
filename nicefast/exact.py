"""Arithmetic whose bits depend on nothing but its operands: what an exact inverse is built of.

A stream and shifts that lie on a grid, multiples of a power of two, are added and subtracted
without rounding, as long as they stay within 2^24 steps (2^53 in float64). So x2 + m(x1) - m(x1)
is x2, provided that m(x1) is the same both times, whatever the size of the batch, the number of
threads, or the order in which a product sums. Here it is, since products are sums of integers:
operands are rounded to so many bits that no partial sum leaves the 53 bits of float64, and then
every order gives the same sum, on every machine. Activations are made of additions,
multiplications and divisions, which IEEE 754 defines to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import reference

BLOCK_ELEMENTS = 1 << 18  # of one activation, in float64
SUM_BITS = 53  # of integers that float64 adds exactly
LARGEST = 450  # exponent of operands: with its square, and the bits, still within float64


def check_grid(grid: float) -> float:
    """``grid`` as a float, or an error: it must be a positive power of two.

    >>> check_grid(0.3)
    Traceback (most recent call last):
        ...
    ValueError: grid must be a power of two from 2^-100 to 2^100, got 0.3
    """
    if isinstance(grid, bool) or not isinstance(grid, int | float):
        raise TypeError(f"grid must be a number, got {type(grid).__name__}")
    if not 2.0**-100 <= grid <= 2.0**100 or math.frexp(grid)[0] != 0.5:
        raise ValueError(f"grid must be a power of two from 2^-100 to 2^100, got {grid!r}")
    return float(grid)


def limit(grid: float, dtype: torch.dtype) -> float:
    """Up to here, every multiple of ``grid`` is a number of ``dtype``."""
    return grid * 2.0 ** (53 if dtype == torch.float64 else 24)


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: float, down: bool) -> Tensor:
        steps = x * (1 / grid)
        steps = steps.floor_() if down else steps.round_()
        return steps.mul_(grid).add_(0.0)  # -0 becomes 0: it would not survive an addition

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return g, None, None


def round_to_grid(x: Tensor, grid: float, down: bool = False) -> Tensor:
    """The nearest multiple of ``grid``, half to even (``down``: the next one below); its gradient
    is that of x.

    >>> round_to_grid(torch.tensor([0.5, 1.5, -0.2]), 1.0)
    tensor([0., 2., 0.])
    """
    return _Round.apply(x, grid, down)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_range(name: str, y: Tensor, before: Tensor, grid: float) -> None:
    """ValueError where a row of ``y`` (N, D) is outside the range in which the grid is exact.

    A row in which ``before``, what ``y`` was made of, has a NaN may have one. Waits for a GPU.
    """
    if not y.numel():
        return
    most = limit(grid, y.dtype)
    low, high = y.detach().aminmax()
    if bool((low >= -most) & (high <= most)):
        return
    outside = ~(y.detach().abs() <= most) & ~before.detach().isnan().any(1, keepdim=True)
    if outside.any():
        row, feature = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row} has the value {y[row, feature].item():g} in feature {feature}, "
            f"outside +-{most:g}, where a grid of {grid:g} is exact; take a coarser grid"
        )


class Operand(NamedTuple):
    """A weight matrix (O, K) as integers: ``W[o, k] ~ scale[o] * integers[k, o] * columns[k]``."""

    integers: Tensor  # (K, O)
    scale: Tensor  # (O,)
    columns: Tensor  # (K,)
    bits: int  # of the other operand

    @classmethod
    def of(cls, weight: Tensor) -> Operand:
        """Columns, then rows, are brought to the same size by powers of two: features may have
        any scales. Then the sum of K products of ``own`` and ``bits`` bits has 53."""
        room = SUM_BITS - math.ceil(math.log2(max(weight.shape[1], 1)))
        own = room // 2
        w = weight.detach().double()
        largest = w.abs().amax(0)
        even, columns = _scales(largest, 0)
        w = w * even
        to_integers, scale = _scales(w.abs().amax(1), own)
        integers = (w * to_integers[:, None]).round_()
        # a feature without any weight must not decide how finely the others are rounded
        columns = torch.where(largest == 0, 0.0, columns)
        return cls(integers.t(), scale, columns, room - own)

    def times(self, h: Tensor) -> Tensor:
        """``h W^T`` (N, O) of h (N, K), float64: the same bits in any batch."""
        wide = h * self.columns
        to_integers, scale = _scales(wide.abs().amax(1, keepdim=True), self.bits)
        product = wide.mul_(to_integers).round_() @ self.integers
        return product.mul_(self.scale).mul_(scale)


class Linear(Function):
    """``h W^T + b`` in exact arithmetic; the gradient is that of the ordinary product."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        operands: Sequence[Operand],
        autocast: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.bias_dtype, ctx.autocast = bias.dtype, autocast
        return linear(h, bias, operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        h, weight = ctx.saved_tensors
        dtype = ctx.autocast or torch.promote_types(h.dtype, weight.dtype)
        narrow = g.to(dtype).contiguous()
        grad_h = (narrow @ weight.to(dtype)).to(h.dtype) if ctx.needs_input_grad[0] else None
        grad_w = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_w = (narrow.t() @ h.to(dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = g.sum(0).to(ctx.bias_dtype)
        return grad_h, grad_w, grad_b, None, None


def operands(weight: Tensor, context: int) -> list[Operand]:
    """One for x, and one for the last ``context`` columns: each with a scale of its own."""
    parts = (weight,) if not context else weight.split((weight.shape[1] - context, context), 1)
    return [Operand.of(part) for part in parts if part.shape[1]]


def linear(h: Tensor, bias: Tensor, operands: Sequence[Operand]) -> Tensor:
    """``h W^T + b`` (N, O) in h's dtype; the columns of h follow one another in ``operands``."""
    start = 0
    total: Tensor | None = None
    for operand in operands:
        part = h[:, start : start + len(operand.columns)]
        start += len(operand.columns)
        product = operand.times(part)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.add_(bias.detach().double()).to(h.dtype)


class _Activate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return _PORTABLE[name](x.double()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = reference.ACTIVATIONS[ctx.name](x)
        return torch.autograd.grad(y, x, g)[0], None


def activate(x: Tensor, name: str) -> Tensor:
    """An activation with the same bits everywhere: relu and leaky_relu are, the others are made of
    additions, multiplications and divisions in float64, to about 1e-7."""
    if name in _PORTABLE:
        return _Activate.apply(x, name)
    return reference.ACTIVATIONS[name](x)


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


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (exp(-x) + 1)


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


_PORTABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": _tanh,
    "gelu": _gelu,
    "silu": lambda x: x * _sigmoid(x),
    "elu": lambda x: torch.where(x > 0, x, exp(x) - 1),
}


class Layer(NamedTuple):
    """One linear layer, ready for :func:`mlp`."""

    weight: Tensor
    bias: Tensor
    operands: list[Operand]


def layers(parameters: Sequence[tuple[Tensor, Tensor]], context: int) -> list[Layer]:
    """Weights as integers, anew for each call: they can't be out of date."""
    return [
        Layer(w, b, operands(w, context if i == 0 else 0)) for i, (w, b) in enumerate(parameters)
    ]


# a compiler may fuse a product with a sum, which rounds differently
@torch.compiler.disable  # type: ignore[untyped-decorator]
def mlp(
    own: Sequence[Layer],
    activation: str,
    h: Tensor,
    context: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A multi-layer perceptron of rows ``h`` (N, C): (N, S), the same bits in any batch.

    Gradients, where they are recorded, are those of ordinary arithmetic. ``drop`` is done to each
    hidden layer, and then the bits are its own.
    """
    if context is not None:
        h = torch.cat((h, context.to(h.dtype)), 1)
    h = h.contiguous()  # the gradient's products may depend on strides
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (h, *(t for layer in own for t in layer[:2]))
    ):
        # the products of the gradient follow autocast, as everywhere
        kind = h.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return _run(own, activation, h, drop, lambda h, own: Linear.apply(h, *own, autocast))
    if drop is not None:
        return _run(own, activation, h, drop)
    widest = max(max(layer.weight.shape) for layer in own)
    blocks = h.split(max(1, (BLOCK_ELEMENTS if h.device.type == "cpu" else 1 << 26) // widest))
    done = [_run(own, activation, block) for block in blocks]
    return done[0] if len(done) == 1 else torch.cat(done)


def _run(
    own: Sequence[Layer],
    activation: str,
    h: Tensor,
    drop: Callable[[Tensor], Tensor] | None = None,
    product: Callable[[Tensor, Layer], Tensor] | None = None,
) -> Tensor:
    for i, layer in enumerate(own):
        if i:
            h = activate(h, activation)
            h = h if drop is None else drop(h)
        h = linear(h, layer.bias, layer.operands) if product is None else product(h, layer)
    return h


def _scales(largest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The power of two that makes integers of ``bits`` bits of values up to ``largest`` >= 0, and
    its inverse. NaN, where there are none: the result is NaN, and never a rounded sum."""
    exponent = torch.frexp(largest).exponent.clamp(-LARGEST, LARGEST)
    fits = largest <= 2.0**LARGEST
    return torch.where(fits, _power(bits - exponent), torch.nan), _power(exponent - bits)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, in float64; exponents of +-1022 at most."""
    return (exponent.to(torch.int64) + 1023).bitwise_left_shift(52).view(torch.float64)
