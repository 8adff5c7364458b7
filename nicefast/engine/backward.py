"""The gradient of the row engine.

It needs the operands of all products. Forward saves them up to a stated size. Beyond that size, the
backward pass computes them again, a block of rows at a time, from the rows that went in: this costs
one product more for the three of a plain training step, and memory does not grow with the number of
couplings. (Additive couplings would also allow to start from the result, but there rounding errors
can grow with every coupling until the gradient is that of another flow.)

No gradient is computed that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..likelihood import score
from .linear import product, weight_gradient
from .rows import Residuals, RowEngine


class Wanted(NamedTuple):
    """Which gradients are wanted; ``parameters`` in the order of the stack's."""

    x: bool
    context: bool
    log_scale: bool
    parameters: Sequence[bool]


class Gradients(NamedTuple):
    """None where not wanted; that of log_scale only of log_prob."""

    x: Tensor | None
    context: Tensor | None
    log_scale: Tensor | None
    parameters: list[Tensor | None]


def log_prob_vjp(
    engine: RowEngine,
    grad: Tensor,
    x: Tensor,
    context: Tensor | None,
    residuals: list[Residuals] | None,
    wanted: Wanted,
) -> Gradients:
    """Gradients of ``(grad * log_prob(x)).sum()``, grad (N,)."""
    stack, scale = engine.stack, engine.density.scale
    sizes = [half.size for half in stack.halves]
    of_scale = torch.zeros_like(scale)
    found = _Blocks(engine, x, context, residuals, wanted, inverse=False)
    for rows, kept in found.each(with_z=True):
        z, g = kept.z[0], grad[rows, None]
        of_z = score(z, engine.prior).mul_(g)
        if wanted.log_scale:
            of_scale += (of_z * z).sum(0).add_(g.sum())
        found.back(rows, kept, list(of_z.mul_(scale).split(sizes, 1)))
    return found.gradients(stack.by_feature(of_scale) if wanted.log_scale else None)


def couple_vjp(
    engine: RowEngine,
    grad: Tensor,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    residuals: list[Residuals] | None,
    wanted: Wanted,
) -> Gradients:
    """Gradients of ``(grad * couple(x)).sum()``, grad (N, D)."""
    found = _Blocks(engine, x, context, residuals, wanted, inverse)
    for rows, kept in found.each(with_z=False):
        found.back(rows, kept, engine.stack.split(grad[rows]))
    return found.gradients(None)


class _Blocks:
    """Gradients as they add up over the blocks of one backward pass, always in the same order."""

    def __init__(
        self,
        engine: RowEngine,
        x: Tensor,
        context: Tensor | None,
        residuals: list[Residuals] | None,
        wanted: Wanted,
        inverse: bool,
    ) -> None:
        self.engine, self.x, self.context, self.inverse = engine, x, context, inverse
        self.residuals, self.wanted = residuals, wanted
        self.steps = engine.steps(inverse)
        each = iter(zip(wanted.parameters[::2], wanted.parameters[1::2], strict=True))
        self.wants = [[next(each) for _ in layers] for layers in engine.layers]
        self.sums = [[_Sum(*own) for own in layers] for layers in self.wants]
        self.grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted.x else None
        self.grad_c = None
        if context is not None and wanted.context:
            self.grad_c = torch.zeros(context.shape, dtype=x.dtype, device=x.device)

    def each(self, with_z: bool) -> Iterator[tuple[slice, Residuals]]:
        """The blocks as forward cut them, with their residuals, computed again where needed."""
        for i, rows in enumerate(self.engine.blocks(len(self.x), training=True)):
            if self.residuals is not None:
                yield rows, self.residuals[i]
            else:
                c = None if self.context is None else self.context[rows]
                yield rows, self.engine.residuals(self.x[rows], c, self.inverse, with_z)

    def back(self, rows: slice, kept: Residuals, g: list[Tensor]) -> None:
        """The share of one block, from the gradients ``g`` of the halves that come out of it."""
        c = None if self.grad_c is None else self.grad_c[rows]
        first = self._first()
        for step in range(len(self.steps) - 1, first - 1, -1):
            i = self.steps[step]
            side = self.engine.stack.conditioning[i]
            reaches_x1 = self.wanted.x or step > first
            d = self._conditioner(i, step, g[1 - side], kept, reaches_x1 or c is not None)
            if d is None:
                continue
            if c is not None:
                c.add_(d[:, g[side].shape[1] :], alpha=-1 if self.inverse else 1)
                d = d[:, : g[side].shape[1]]
            elif self.context is not None:
                d = d[:, : g[side].shape[1]]
            if reaches_x1:
                x1 = g[side]
                g[side] = torch.sub(x1, d, out=d) if self.inverse else d.add_(x1)
        if self.grad_x is not None:
            self.engine.stack.join(g, self.grad_x[rows])

    def gradients(self, of_scale: Tensor | None) -> Gradients:
        parameters = [t for layers in self.sums for own in layers for t in own.totals()]
        return Gradients(self.grad_x, self.grad_c, of_scale, parameters)

    def _first(self) -> int:
        """The first step at or behind which a gradient is wanted."""
        if self.wanted.x or self.grad_c is not None:
            return 0
        needed = (s for s, i in enumerate(self.steps) if any(map(any, self.wants[i])))
        return next(needed, len(self.steps))

    def _conditioner(
        self, i: int, step: int, grad: Tensor, kept: Residuals, wants_input: bool
    ) -> Tensor | None:
        """Gradients of coupling i's conditioner from that of the half it shifts: those of its
        parameters are added up, that of its input is returned where it is wanted.

        Inverse, the shift is subtracted: the sign goes to the sums instead of to each row.
        """
        engine, sums, wants = self.engine, self.sums[i], self.wants[i]
        operands, inputs, layers = kept.operands[step], kept.inputs[step], engine.layers[i]
        last = 0 if wants_input else next((k for k, w in enumerate(wants) if any(w)), len(layers))
        d = grad.to(engine.stack.dtype)
        for k in range(len(layers) - 1, last - 1, -1):
            sums[k].add(d, operands[k], -1 if self.inverse else 1)
            if k == last and not wants_input:
                return None
            d = product(d, layers[k][0])
            if k > 0:
                engine.activation.backward_(d, inputs[k - 1] if inputs else operands[k])
        return d.to(grad.dtype) if wants_input else None


class _Sum:
    """The gradient of a layer's weight and bias, summed over blocks; a bias's in float64, which
    keeps a sum of sums as exact as one sum over all rows."""

    def __init__(self, wants_weight: bool, wants_bias: bool) -> None:
        self.wants_weight, self.wants_bias = wants_weight, wants_bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, d: Tensor, h: Tensor, sign: int) -> None:
        if self.wants_weight:
            found = weight_gradient(d, h)
            if self.weight is not None:
                self.weight.add_(found, alpha=sign)
            else:
                self.weight = found.float() if sign > 0 else found.float().neg_()
        if self.wants_bias:
            found = d.sum(0, dtype=torch.float32)
            if self.bias is None:
                self.bias = found if sign > 0 else found.neg_()
            else:
                self.bias = self.bias.double().add_(found, alpha=sign)

    def totals(self) -> tuple[Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.contiguous()
        return weight, None if self.bias is None else self.bias.float()
