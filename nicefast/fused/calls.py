"""A fast way as one differentiable call: what :class:`nicefast.NICE` calls once
:mod:`nicefast.path` has chosen.

Backward is the gradient that the way itself has. Where that must be differentiable, or is one of
several at once, it is written in plain PyTorch, as in :mod:`nicefast.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference, watchers
from ..checks import check_density, check_device, check_tensor
from . import blockwise
from .chain import Chain
from .flow import DifferentiableFlow, FusedFlow
from .sideways import SidewaysFlow


def couple(
    chain: Chain,
    x: Tensor,
    context: Tensor | None = None,
    inverse: bool = False,
    fused: FusedFlow | None = None,
) -> Tensor:
    """Rows through a whole chain of couplings; :func:`nicefast.reference.couple` defines it.

    log |det| = 0 (Dinh et al. 2014, section 3.2). Differentiable any number of times; up to 128
    hidden units, memory does not grow with the number of couplings.

    Args:
        chain: what :func:`nicefast.choose_path` found for rows of this kind.
        x: (N, D), float32.
        context: (N, K), where the conditioners take one.
        inverse: back through the couplings.
        fused: what does it at once, if :func:`nicefast.choose_path` found something (``.fused``).

    Returns:
        y (N, D), a new tensor.

    Raises:
        TypeError: x or context is no floating-point tensor, or x is not float32.
        ValueError: shapes or devices that do not fit; missing or unexpected context.

    >>> import torch, nicefast as nf
    >>> from nicefast.fused.calls import couple
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(2, 4)
    >>> chain = nf.choose_path(flow, x).chain
    >>> y = couple(chain, x)
    >>> torch.allclose(couple(chain, y, inverse=True), x)
    True
    """
    _check_rows(chain, x, context)
    parameters = chain.parameters
    if watchers.records(x, context, *parameters):
        return Couple.apply(chain, fused, inverse, x, context, *parameters)
    if fused is not None:
        return fused.couple(x, context, inverse)
    return blockwise.couple(chain, x, context, inverse)


def flow_log_prob(
    fused: DifferentiableFlow, x: Tensor, context: Tensor | None, log_scale: Tensor
) -> Tensor:
    """log_prob (N,) of rows x (N, D) by a whole flow in one pass, in nats: what :func:`couple` and
    :func:`nicefast.functional.scale_log_prob` say one after the other (Dinh et al. 2014,
    equation 1).

    Differentiable any number of times.

    Args:
        fused: what :func:`nicefast.choose_path` found for rows of this kind (``.fused``) on a CPU.
        x: (N, D), float32.
        context: (N, K), where the conditioners take one.
        log_scale: (D,), float32.

    Raises:
        TypeError: x, context or log_scale is no floating-point tensor, or x is not float32.
        ValueError: shapes or devices that do not fit; missing or unexpected context; non-finite
            log_scale.

    >>> import torch, nicefast as nf
    >>> from nicefast.fused.calls import flow_log_prob
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.ones(2, 4)
    >>> fused, log_scale = nf.choose_path(flow, x).fused, flow.scaling.log_scale
    >>> log_prob = flow_log_prob(fused, x, None, log_scale)
    >>> torch.equal(log_prob, flow.log_prob(x))
    True
    """
    _check_rows(fused.chain, x, context)
    check_density(x, log_scale, fused.prior)
    parameters = fused.chain.parameters
    if watchers.records(x, context, log_scale, *parameters):
        return FlowLogProb.apply(fused, x, context, log_scale, *parameters)
    return fused.forward(x, context, log_scale, want_log_prob=True)[1]


def _check_rows(chain: Chain, x: Tensor, context: Tensor | None) -> None:
    """Rows (N, D) in float32 and their context (N, K), as the chain takes them."""
    check_tensor("x", x)
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    features = chain.features
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"x must have shape (N, {features}), got {tuple(x.shape)}")
    where = chain.device
    if x.device != where:
        raise ValueError(f"x must be on {where}, where the parameters are, got {x.device}")
    if (context is None) != (chain.context == 0):
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(f"context must have {chain.context} features, got {got}")
    if context is not None:
        check_tensor("context", context)
        if context.shape != (len(x), chain.context):
            raise ValueError(
                f"context must have shape ({len(x)}, {chain.context}), got {tuple(context.shape)}"
            )
        check_device("context", context, x)


class FlowLogProb(Function):
    """log_prob of a flow in one pass, and its gradient in another."""

    @staticmethod
    def forward(
        ctx: Any,
        fused: DifferentiableFlow,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        log_prob, h, left = fused.log_prob(x, context, log_scale)
        ctx.save_for_backward(x, context, log_scale, h)
        ctx.fused, ctx.left = fused, left
        ctx.versions = [p._version for p in parameters]
        return log_prob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, context, log_scale, h = ctx.saved_tensors
        fused: DifferentiableFlow = ctx.fused
        chain: Chain = fused.chain
        _check_versions(chain, ctx.versions)
        if _plainly(grad):
            with torch.enable_grad():
                inputs = _views(x, context, log_scale, *chain.parameters)
                x, context, log_scale, *parameters = inputs
                h = _couple_again(chain, x, context, parameters, inverse=False)
                _, again = reference.scale_log_prob(h, log_scale, fused.prior, return_z=True)
            return None, *_gradients_again(again, inputs, ctx.needs_input_grad[1:], grad)
        _, wants_x, wants_context, *_ = ctx.needs_input_grad
        gradients, grad_log_scale = fused.log_prob_backward(
            grad, x, context, log_scale, h, ctx.left, wants_x, wants_context
        )
        if not watchers.keeps_graph():
            ctx.left = None
        grad_c = gradients.context
        return (
            None,
            gradients.x,
            None if context is None or grad_c is None else grad_c.to(context.dtype),
            grad_log_scale,
            *gradients.parameters,
        )


class Couple(Function):
    """A whole chain of couplings; what is stored does not grow with their number if it rebuilds."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        fused: FusedFlow | None,
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        activations = None
        if fused is not None and chain.rebuild:  # one that keeps nothing
            y = fused.couple(x, context, inverse)
        else:
            if not chain.rebuild:  # cut once: both passes have to see the same blocks
                activations = blockwise.Activations(
                    blockwise.cut(chain, len(x), x.device, training=True)
                )
            y = blockwise.couple(chain, x, context, inverse, activations)
        ctx.save_for_backward(x, context)
        # not among the saved tensors: they are the model's, and no copies of anything
        ctx.chain, ctx.fused, ctx.inverse, ctx.activations = chain, fused, inverse, activations
        ctx.versions = [p._version for p in parameters]
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, context = ctx.saved_tensors
        chain: Chain = ctx.chain
        _check_versions(chain, ctx.versions)
        if _plainly(grad_y):
            with torch.enable_grad():
                inputs = _views(x, context, *chain.parameters)
                x, context, *parameters = inputs
                again = _couple_again(chain, x, context, parameters, ctx.inverse)
            grads = _gradients_again(again, inputs, ctx.needs_input_grad[3:], grad_y)
            return None, None, None, *grads
        _, _, _, wants_x, wants_context, *_ = ctx.needs_input_grad
        if isinstance(ctx.fused, SidewaysFlow) and chain.rebuild:
            gradients = ctx.fused.couple_backward(
                grad_y, x, context, ctx.inverse, wants_x, wants_context
            )
        else:
            gradients = blockwise.couple_backward(
                chain, grad_y, x, context, ctx.inverse, ctx.activations, wants_x, wants_context
            )
        if not watchers.keeps_graph():
            ctx.activations = None
        grad_c = gradients.context
        return (
            None,
            None,
            None,
            gradients.x,
            None if context is None or grad_c is None else grad_c.to(context.dtype),
            *gradients.parameters,
        )


def _plainly(grad: Tensor) -> bool:
    """Whether a gradient must be differentiable itself, or ``grad`` stands for several, or may have
    a tangent."""
    return torch.is_grad_enabled() or watchers.is_batched(grad) or watchers.has_tangents()


def _views(*tensors: Tensor | None) -> list[Any]:
    """The tensors under other names: a gradient by those goes no further back than to here, and
    past no hook."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _check_versions(chain: Chain, versions: list[int]) -> None:
    if versions != [p._version for p in chain.parameters]:
        raise RuntimeError(
            "a parameter of the flow was modified in place between forward and backward: "
            "the gradient would be that of another flow"
        )


def _couple_again(
    chain: Chain, x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], inverse: bool
) -> Tensor:
    """Rows through the couplings in plain PyTorch, with these for the chain's parameters."""
    each = iter(parameters)
    couplings = [[(next(each), next(each)) for _ in layers] for layers in chain.couplings]
    features = [f.columns for f in chain.sides]
    return reference.couple(
        x,
        couplings,
        [(features[side], features[1 - side]) for side in chain.conditions],
        chain.activation,
        inverse,
        context,
    )


def _gradients_again(
    value: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``value`` by autograd for those inputs that need one."""
    wanted = [t for t, w in zip(inputs, needed, strict=True) if w and t is not None]
    differentiable = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=differentiable))
    return [next(found) if w else None for w in needed]
