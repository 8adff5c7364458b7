"""One thin ``torch.autograd.Function`` for each operation.

Forward is the operation; backward is the operation that computes its gradient. Where a gradient
must itself be differentiable (``create_graph=True``, ``torch.func``), backward is written in plain
differentiable PyTorch instead, so that derivatives of any order are right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .partition import columns_of
from .runtime.precision import at_least_float32


class AdditiveCoupling(Function):
    """y = x, with ``shift + bias`` added to the shifted features."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        shift: Tensor,
        bias: Tensor | None,
        slot: Tensor | None,
        index: Tensor | None,
        start: int,
        step: int,
        inverse: bool,
    ) -> Tensor:
        return torch.ops.nicefast.additive_coupling(
            x, shift, bias, slot, index, start, step, inverse
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, shift, bias, _, index, ctx.start, ctx.step, ctx.inverse = inputs
        ctx.save_for_backward(index)
        ctx.count, ctx.dtype = shift.shape[1], shift.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad_shift = grad_bias = None
        wants_bias = ctx.needs_input_grad[2]
        if ctx.needs_input_grad[1] or wants_bias:
            if torch.is_grad_enabled():
                columns = columns_of(index, ctx.start, ctx.step, ctx.count)
                selected = reference.select_features(grad_y, columns)
                selected = -selected if ctx.inverse else selected
                grad_shift = selected.to(ctx.dtype)
                sums = selected.sum(0, dtype=at_least_float32(grad_y.dtype)) if wants_bias else None
            else:
                where = (index, ctx.start, ctx.step, ctx.count)
                grad_shift, sums = torch.ops.nicefast.select_features(
                    grad_y, *where, ctx.inverse, wants_bias, ctx.dtype
                )
            grad_bias = sums.to(ctx.bias_dtype) if wants_bias and sums is not None else None
        # the incoming gradient is handed on as it is: no copy
        return grad_y, grad_shift, grad_bias, None, None, None, None, None


class SplitFeatures(Function):
    """``(x, x1)``: x itself and its conditioning features.

    x is passed through so that backward sees both gradients at once and adds the one of x1 into
    the other in a single pass, which is a coupling; autograd alone would fill a tensor with zeros,
    write x1's gradient into it and add the two.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, slot: Tensor | None, index: Tensor | None, start: int, step: int, count: int
    ) -> tuple[Tensor, Tensor]:
        if step == 1:
            return x.view_as(x), x.narrow(1, start, count)
        x1, _ = torch.ops.nicefast.select_features(
            x, index, start, step, count, False, False, x.dtype
        )
        return x.view_as(x), x1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, slot, index, ctx.start, ctx.step, _ = inputs
        ctx.features = x.shape[1]
        ctx.save_for_backward(slot, index)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_x: Tensor | None, grad_x1: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        slot, index = ctx.saved_tensors
        if grad_x1 is None:
            return grad_x, None, None, None, None, None
        if grad_x is None:
            grad_x = grad_x1.new_zeros((grad_x1.shape[0], ctx.features))
        if torch.is_grad_enabled():
            columns = columns_of(index, ctx.start, ctx.step, grad_x1.shape[1])
            grad = reference.additive_coupling(grad_x, grad_x1, columns)
        else:
            grad = torch.ops.nicefast.additive_coupling(
                grad_x, grad_x1, None, slot, index, ctx.start, ctx.step, False
            )
        return grad, None, None, None, None, None


class ScaleLogProb(Function):
    """``(z, log_prob)`` of ``z = exp(log_scale) h``; z is empty unless asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, log_scale: Tensor, prior: str, return_z: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.nicefast.scale_log_prob(h, log_scale, prior, return_z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        h, log_scale, ctx.prior, ctx.return_z = inputs
        ctx.save_for_backward(h, log_scale)
        ctx.set_materialize_grads(False)
        if not ctx.return_z:
            ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_log_prob: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        h, log_scale = ctx.saved_tensors
        if grad_log_prob is None:
            work = at_least_float32(h.dtype, log_scale.dtype)
            grad_log_prob = h.new_zeros((), dtype=work).expand(h.shape[0])
        arguments = (grad_z if ctx.return_z else None, grad_log_prob, h, log_scale, ctx.prior)
        if torch.is_grad_enabled():
            grad_h, grad_log_scale = reference.scale_log_prob_backward(*arguments)
        else:
            grad_h, grad_log_scale = torch.ops.nicefast.scale_log_prob_backward(*arguments)
        return grad_h, grad_log_scale, None, None


class SamplePrior(Function):
    """``h = exp(-log_scale) z`` with z drawn from the prior."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        log_scale: Tensor,
        n: int,
        row_offset: int,
        seed: int | Tensor,
        prior: str,
        dtype: torch.dtype,
    ) -> Tensor:
        ops = torch.ops.nicefast
        draw = ops.sample_prior_seeded if isinstance(seed, Tensor) else ops.sample_prior
        return draw(log_scale, n, row_offset, seed, prior, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[0])

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        h, log_scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            # h is an output, so its own gradient leads back here: second derivatives are right
            grad = reference.sample_prior_backward(grad_h, h, log_scale.dtype)
        else:
            grad = torch.ops.nicefast.sample_prior_backward(grad_h, h, log_scale.dtype)
        return grad, None, None, None, None, None
