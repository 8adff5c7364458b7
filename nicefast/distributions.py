"""A flow as ``torch.distributions`` sees it: a Distribution, and a Transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

_Shape = torch.Size | list[int] | tuple[int, ...]


class FlowDistribution(Distribution):
    """The distribution of a :class:`nicefast.NICE`, given a context where it takes one.

    ``event_shape`` is the flow's; ``batch_shape`` is that of the context, or empty. ``rsample`` is
    differentiable in the parameters. Made by :meth:`nicefast.NICE.distribution`.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(
        self, flow: Any, context: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        self.flow = flow
        self.context = context
        flow.check_context(context)
        batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, flow.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(
        self, batch_shape: _Shape, _instance: FlowDistribution | None = None
    ) -> FlowDistribution:
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow = self.flow
        context = self.context
        new.context = None if context is None else context.expand(*batch_shape, context.shape[-1])
        super(FlowDistribution, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of shape ``sample_shape + batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        batch = value.shape[: value.ndim - len(self.event_shape)]
        batch = torch.broadcast_shapes(batch, self.batch_shape)
        value = value.expand(batch + self.event_shape)
        context = self.context
        if context is not None:
            context = context.expand(*batch, context.shape[-1])
        return self.flow.log_prob(value, context)

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:
        """A sample of shape ``sample_shape + batch_shape + event_shape``, with gradients."""
        sample_shape = torch.Size(sample_shape)
        batch = sample_shape + self.batch_shape
        context = self.context
        if context is not None:
            context = context.expand(*batch, context.shape[-1])
        return self.flow.sample_like(batch, context)

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:
        return self.rsample(sample_shape)


class FlowTransform(Transform):
    """A :class:`nicefast.NICE` as a transform from data to latent; ``.inv`` goes back.

    Made by :meth:`nicefast.NICE.transform`. The flow's own distribution is
    ``TransformedDistribution(prior, flow.transform().inv)``.
    """

    bijective = True

    def __init__(self, flow: Any, context: Tensor | None = None, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        flow.check_context(context)
        self.flow = flow
        self.context = context

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.flow.event_shape))

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return self.domain

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return (
            self
            if cache_size == self._cache_size
            else FlowTransform(self.flow, self.context, cache_size)
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FlowTransform)
            and other.flow is self.flow
            and other.context is self.context
        )

    def __hash__(self) -> int:
        return hash((id(self.flow), id(self.context)))

    def _call(self, x: Tensor) -> Tensor:
        return self.flow.forward(x, self.context)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.inverse(y, self.context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.flow.log_det(x)
