"""The engine as one differentiable function.

The backward pass is the engine's own. Where a gradient must itself be differentiable, or stands
for several at once, plain PyTorch computes it instead, so that derivatives of any order are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..runtime import watchers
from ..runtime.threads import without_autograd
from .backward import Gradients, Wanted, couple_vjp, log_prob_vjp
from .exact import ExactEngine
from .rows import Residuals, RowEngine


def log_prob(
    engine: RowEngine | ExactEngine, x: Tensor, context: Tensor | None, log_scale: Tensor
) -> Tensor:
    """log_prob (N,) in nats of rows x (N, D) and their context (N, K), differentiable.

    The engine is one that :func:`nicefast.engine.plan` chose for rows of this kind; log_scale (D,)
    is the flow's own. ValueError for a log_scale that is not finite (on the CPU).

    >>> import torch, nicefast as nf
    >>> from nicefast.engine import log_prob, plan
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(2, 4)
    >>> found = log_prob(plan(flow, x).engine, x, None, flow.scaling.log_scale)
    >>> torch.equal(found, flow.log_prob(x))
    True
    """
    if isinstance(engine, ExactEngine):
        return engine.log_prob(x, context)
    parameters = engine.stack.parameters
    if watchers.records(x, context, log_scale, *parameters):
        return _Run.apply(engine, "log_prob", x, context, log_scale, *parameters)
    with without_autograd(x.device):
        return engine.log_prob(x, context)


def couple(
    engine: RowEngine | ExactEngine, x: Tensor, context: Tensor | None, inverse: bool
) -> Tensor:
    """Rows x (N, D) through all couplings, or back through them, differentiable.

    >>> import torch, nicefast as nf
    >>> from nicefast.engine import couple, plan
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(2, 4)
    >>> engine = plan(flow, x).engine
    >>> y = couple(engine, x, None, inverse=False)
    >>> torch.allclose(couple(engine, y, None, inverse=True), x)
    True
    """
    if isinstance(engine, ExactEngine):
        return engine.couple(x, context, inverse)
    parameters = engine.stack.parameters
    if watchers.records(x, context, *parameters):
        operation = "inverse" if inverse else "forward"
        return _Run.apply(engine, operation, x, context, None, *parameters)
    with without_autograd(x.device):
        return engine.couple(x, context, inverse)


def transform(
    engine: RowEngine | ExactEngine, x: Tensor, context: Tensor | None, inverse: bool
) -> Tensor:
    """Rows x (N, D) through couplings and scaling, or back: z, or x. Only an exact engine records
    gradients here; it scales nothing.
    ValueError for a log_scale that is not finite (on the CPU).

    >>> import torch, nicefast as nf
    >>> from nicefast.engine import plan, transform
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(2, 4)
    >>> with torch.no_grad():
    ...     z = transform(plan(flow, x).engine, x, None, inverse=False)
    >>> torch.equal(z, flow(x)[0])
    True
    """
    if isinstance(engine, ExactEngine):
        return engine.couple(x, context, inverse)
    with without_autograd(x.device):
        return engine.inverse(x, context) if inverse else engine.forward(x, context)


class _Run(Function):
    """``log_prob``, or the couplings alone, ``forward`` or ``inverse``."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: RowEngine,
        operation: str,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.engine, ctx.operation = engine, operation
        residuals: list[Residuals] | None = [] if engine.saves(len(x)) else None
        ctx.residuals = residuals
        # autograd finds a change in place between forward and backward of what is saved here
        ctx.save_for_backward(x, context, log_scale, *parameters)
        with without_autograd(x.device):
            if operation == "log_prob":
                return engine.log_prob(x, context, residuals)
            return engine.couple(x, context, operation == "inverse", residuals)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, context, log_scale, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or watchers.is_batched(grad) or watchers.has_tangents():
            inputs = (x, context, log_scale, *parameters)
            return None, None, *_plain_gradients(ctx.engine, ctx.operation, inputs, needs, grad)
        wanted = Wanted(needs[0], needs[1], needs[2], needs[3:])
        arguments = ctx.engine, grad, x, context
        with without_autograd(x.device):
            found: Gradients
            if ctx.operation == "log_prob":
                found = log_prob_vjp(*arguments, ctx.residuals, wanted)
            else:
                inverse = ctx.operation == "inverse"
                found = couple_vjp(*arguments, inverse, ctx.residuals, wanted)
        if not watchers.keeps_graph():
            ctx.residuals = None
        of_context = found.context
        if of_context is not None:
            of_context = of_context.to(context.dtype)
        return None, None, found.x, of_context, found.log_scale, *found.parameters


def _plain_gradients(
    engine: RowEngine,
    operation: str,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """The gradients by autograd, of the same operation in plain PyTorch."""
    stack = engine.stack
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that torch.autograd.grad ends here and runs no hooks of the inputs
        named: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
        x, context, log_scale, *parameters = named
        each = iter(zip(parameters[::2], parameters[1::2], strict=True))
        columns = [half.columns for half in stack.halves]
        value = reference.couple(
            x,
            [[next(each) for _ in layers] for layers in stack.couplings],
            [(columns[side], columns[1 - side]) for side in stack.conditioning],
            stack.activation,
            operation == "inverse",
            context,
        )
        if operation == "log_prob":
            _, value = reference.scale_log_prob(value, log_scale, engine.prior, return_z=True)
        wanted = [t for t, need in zip(named, needs, strict=True) if need]
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=differentiable))
    return [next(found) if need else None for need in needs]
