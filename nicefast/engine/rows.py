"""The row engine: blocks of rows go through all couplings, one block after the other.

A block is small enough for its activations to stay in the cache from the first coupling to the
density, and their memory is used again by the next block. Within a block the two halves of the
partition are separate tensors from the first coupling to the last. Threads are PyTorch's own.

Nothing is kept between calls. What a gradient needs is described in :mod:`.backward`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..likelihood import constant, sum_log_prior
from ..ops import check_log_scale
from .linear import input_major, linear, prepared_linear
from .stack import CouplingStack, Layers
from .thresholds import BLOCK_BYTES, RECOMPUTED_BYTES, RESIDUAL_BYTES

T = TypeVar("T", Tensor, Tensor | None)


class Residuals(NamedTuple):
    """What the gradient of one block needs: of each coupling, in the order of computation, the
    operand of each product and, where an activation's gradient is made of its input, that input;
    and z, with the first half's features before the second's, where it was computed."""

    operands: list[list[Tensor]]
    inputs: list[list[Tensor]]
    z: list[Tensor]


class Density(NamedTuple):
    """exp(log_scale), with the first half's features before the second's, and what
    :func:`nicefast.likelihood.sum_log_prior` leaves out of log_prob."""

    scale: Tensor
    rest: Tensor


class RowEngine:
    """Couplings, scaling and prior of a flow, a block of rows at a time.

    Rows x and z are (N, D), float32 on the stack's device, and so is log_scale (D,); the context is
    (N, K). The caller switches autograd and autocast off
    (:func:`nicefast.runtime.threads.without_autograd`).

    Args:
        stack: the couplings.
        log_scale: float32, or None where the scaling is a module of its own: then only
            :meth:`couple` works.
        prior: ``"logistic"`` or ``"normal"``.
        recompute: the backward pass recomputes residuals, whatever their size.
    """

    name = "rows"

    def __init__(
        self, stack: CouplingStack, log_scale: Tensor | None, prior: str, recompute: bool = False
    ) -> None:
        self.stack, self.prior, self.recompute = stack, prior, recompute
        self.log_scale = log_scale
        self.activation, self.linear = ACTIVATIONS[stack.activation], linear

    @cached_property
    def layers(self) -> Sequence[Layers]:
        """The couplings' layers in the operands' dtype."""
        return cast_layers(self.stack)

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, save: list[Residuals] | None = None
    ) -> Tensor:
        """log_prob (N,) of rows x, in nats; what its gradient needs is appended to ``save``, one
        entry for each block."""
        (scale, rest), out = self.density, []
        for rows in self._cut(len(x), save):
            kept = _entry(save)
            halves = self._couple(_part(x, rows), _part(context, rows), False, kept)
            z = torch.cat(halves, 1).mul_(scale)
            if kept is not None:
                kept.z.append(z)
            out.append(sum_log_prior(z, self.prior).add_(rest))
        return out[0] if len(out) == 1 else torch.cat(out)

    def couple(
        self,
        x: Tensor,
        context: Tensor | None = None,
        inverse: bool = False,
        save: list[Residuals] | None = None,
    ) -> Tensor:
        """Rows x through the couplings alone, or back through them: a new tensor (N, D)."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in self._cut(len(x), save):
            own, c = _part(x, rows), _part(context, rows)
            self.stack.join(self._couple(own, c, inverse, _entry(save)), _part(y, rows))
        return y

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """z of rows x."""
        scale = self.checked_log_scale().exp()
        return self.couple(x, context).mul_(scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """x of rows z."""
        scale = self.checked_log_scale().neg().exp_()
        return self.couple(z * scale, context, inverse=True)

    def residuals(
        self, x: Tensor, context: Tensor | None, inverse: bool, with_z: bool
    ) -> Residuals:
        """What the gradient of one block of rows x needs, computed again."""
        kept = Residuals([], [], [])
        halves = self._couple(x, context, inverse, kept, to_the_end=with_z)
        if with_z:
            kept.z.append(torch.cat(halves, 1).mul_(self.density.scale))
        return kept

    def saves(self, rows: int) -> bool:
        """Whether forward saves the residuals of so many rows for the backward pass."""
        return not self.recompute and rows * self.stack.residual_bytes <= RESIDUAL_BYTES

    def blocks(self, rows: int, training: bool = False) -> list[slice]:
        """The blocks of so many rows, of nearly one size; ``training``: residuals are made."""
        kind = "cpu" if self.stack.parameters[0].is_cpu else "cuda"
        most = BLOCK_BYTES[kind] // (self.stack.width * self.stack.dtype.itemsize)
        if training and not self.saves(rows):
            most = min(most, RECOMPUTED_BYTES[kind] // self.stack.residual_bytes)
        if rows <= most:
            return [slice(0, rows)]
        count = max(1, -(-rows // max(1, most)))
        size = max(1, -(-rows // count))
        return [slice(i, min(i + size, rows)) for i in range(0, max(1, rows), size)]

    def steps(self, inverse: bool) -> Sequence[int]:
        """The couplings in the order in which they are computed."""
        count = len(self.layers)
        return range(count - 1, -1, -1) if inverse else range(count)

    def describe(self, rows: int) -> str:
        """How ``rows`` rows are computed, for people."""
        blocks = self.blocks(rows)
        return f"{rows} rows in {len(blocks)} blocks of at most {blocks[0].stop}"

    @cached_property
    def density(self) -> Density:
        """Made of log_scale when it is first asked for; errors of :meth:`checked_log_scale`."""
        log_scale = self._known_log_scale()
        log_det = log_scale.sum()
        if log_scale.is_cpu and not math.isfinite(log_det.item()):
            check_log_scale(log_scale)
        rest = constant(log_det, len(log_scale), self.prior)
        return Density(self.stack.by_half(log_scale).exp(), rest)

    def checked_log_scale(self) -> Tensor:
        """log_scale; ValueError for one that is not finite, where looking costs nothing."""
        log_scale = self._known_log_scale()
        check_log_scale(log_scale)
        return log_scale

    def _known_log_scale(self) -> Tensor:
        if self.log_scale is None:
            raise RuntimeError("the scaling of this flow is computed by a module of its own")
        return self.log_scale

    def _cut(self, rows: int, save: list[Residuals] | None) -> list[slice]:
        """The blocks of one pass, for which the weights are arranged."""
        blocks = self.blocks(rows, save is not None)
        if len(blocks) > 1 and save is None and self.linear is not prepared_linear:
            # 1.1 to 1.2 times as fast in several blocks, 0.8 where each weight is used once
            self.layers = [[(input_major(w), b) for w, b in layers] for layers in self.layers]
        return blocks

    def _couple(
        self,
        x: Tensor,
        context: Tensor | None,
        inverse: bool,
        kept: Residuals | None = None,
        to_the_end: bool = True,
    ) -> list[Tensor]:
        """The halves of one block after all couplings; not ``to_the_end``: the last shift, which
        no residual needs, is left out."""
        stack, steps, halves = self.stack, self.steps(inverse), self.stack.split(x)
        linear, activate = self.linear, self.activation.apply_
        casts = stack.dtype != x.dtype
        for i in steps:
            side, (*hidden, (weight, bias)) = stack.conditioning[i], self.layers[i]
            h = halves[side] if context is None else torch.cat((halves[side], context), 1)
            if casts:
                h = h.to(stack.dtype)
            if kept is None:
                for w, b in hidden:
                    h = linear(h, w, b, activate)
            else:
                h = self._keep(h, hidden, kept)
            if not to_the_end and i == steps[-1]:
                break
            shift, x2 = linear(h, weight, bias), halves[1 - side]
            if casts:
                shift = shift.to(x.dtype)
            halves[1 - side] = torch.sub(x2, shift, out=shift) if inverse else shift.add_(x2)
        return halves

    def _keep(self, h: Tensor, hidden: Layers, kept: Residuals) -> Tensor:
        """Rows h through the hidden layers; their residuals are appended to ``kept``."""
        linear, activate = self.linear, self.activation.apply_
        operands, inputs = [h], []
        for weight, bias in hidden:
            if self.activation.from_input:
                inputs.append(linear(h, weight, bias))
                h = activate(inputs[-1].clone())
            else:
                h = linear(h, weight, bias, activate)
            operands.append(h)
        kept.operands.append(operands)
        kept.inputs.append(inputs)
        return h


def cast_layers(stack: CouplingStack) -> Sequence[Layers]:
    """The layers in the operands' dtype: on a GPU in one launch for many tensors."""
    if stack.dtype == torch.float32:
        return stack.couplings
    parameters = [p.detach() for p in stack.parameters]
    cast = [torch.empty(p.shape, dtype=stack.dtype, device=p.device) for p in parameters]
    torch._foreach_copy_(cast, parameters)
    each = iter(zip(cast[::2], cast[1::2], strict=True))
    return [[next(each) for _ in layers] for layers in stack.couplings]


def _entry(save: list[Residuals] | None) -> Residuals | None:
    if save is None:
        return None
    save.append(Residuals([], [], []))
    return save[-1]


def _part(t: T, rows: slice) -> T:
    """These rows of a tensor; the tensor itself where it has no others."""
    return t if t is None or rows == slice(0, t.shape[0]) else t[rows]
