"""Couplings on a grid, one after another: an inverse to the last bit, at any depth.

Since the way back is exact, the gradient needs nothing but the result: each coupling's input is
rebuilt from its output, and its activations from that, with the very bits that they had
(Gomez et al. 2017, arXiv 1707.04585, do this in floating point, where it drifts). Memory does not
grow with depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import functional as F  # noqa: N812
from ..exact.arithmetic import mlp
from ..exact.grid import check_range, round_to_grid
from ..layers import MLP, AdditiveCoupling, plain_layers, runs_more_than_forward
from ..partition import Partition
from ..runtime import watchers
from .stack import Layers


class ExactEngine:
    """The couplings of a flow with a grid, and its prior, which has the scale ``exp(-log_scale)``.

    Rows x and z are (N, D), float32 or float64, on any device; the context is (N, K). Autograd
    differentiates the methods, once. ValueError where a value leaves the range in which the grid is
    exact: the message names the coupling and the row.

    >>> import torch, nicefast as nf
    >>> flow, x = nf.NICE(4, hidden=(8,), grid=0.25), torch.ones(2, 4)
    >>> engine = ExactEngine(list(flow.couplings), flow.scaling.log_scale, "logistic", 0.25)
    >>> torch.equal(engine.couple(engine.couple(x), inverse=True), x)
    True
    """

    name = "exact"

    def __init__(
        self,
        couplings: Sequence[AdditiveCoupling],
        log_scale: Tensor,
        prior: str,
        grid: float,
    ) -> None:
        self.couplings, self.log_scale, self.prior, self.grid = couplings, log_scale, prior, grid

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log_prob (N,) of the rounded rows, in nats."""
        return F.scale_log_prob(self.couple(x, context), self.log_scale, self.prior)

    def couple(self, x: Tensor, context: Tensor | None = None, inverse: bool = False) -> Tensor:
        """The rounded rows through the couplings, or back through them: a new tensor (N, D).
        Nothing scales it."""
        given, x = x, round_to_grid(x, self.grid)
        check_range("z" if inverse else "x", x, given, self.grid)
        for i, coupling in enumerate(self.couplings):
            own = getattr(coupling, "grid", None)
            if own != self.grid:  # one that was put in later: its shifts would not be exact
                raise ValueError(f"coupling {i} must have the grid {self.grid:g}, got {own}")
        plain = [_plain(coupling, context) for coupling in self.couplings]
        if any(coupling is None for coupling in plain):
            for module in reversed(self.couplings) if inverse else self.couplings:
                x, _ = (module.inverse if inverse else module)(x, context)
            return x
        couplings = cast("list[_Coupling]", plain)
        parameters = list({t: None for c in couplings for pair in c.layers for t in pair})
        if watchers.records(x, context, *parameters):
            return _Rebuilt.apply(couplings, inverse, x, context, *parameters)
        return _walk(couplings, x, context, inverse)


class _Coupling(NamedTuple):
    """What a coupling with a plain MLP as its conditioner computes with."""

    label: str
    partition: Partition
    grid: float
    activation: str
    layers: Layers

    def shift(self, x1: Tensor, context: Tensor | None) -> Tensor:
        shift = mlp(self.layers, self.activation, x1, context)
        return round_to_grid(shift.to(x1.dtype), self.grid)


def _plain(coupling: nn.Module, context: Tensor | None) -> _Coupling | None:
    """The coupling by its tensors; None where a call does anything that these do not say."""
    if type(coupling) is not AdditiveCoupling or runs_more_than_forward(coupling):
        return None
    layers, conditioner = plain_layers(coupling.conditioner), cast("MLP", coupling.conditioner)
    if isinstance(layers, str) or conditioner.drops:
        return None
    conditioner.check_context(context)
    grid = cast("float", coupling.grid)
    return _Coupling(coupling.label, coupling.partition, grid, conditioner.activation, layers)


def _walk(
    couplings: Sequence[_Coupling], x: Tensor, context: Tensor | None, inverse: bool
) -> Tensor:
    with torch.no_grad():
        y = x.clone(memory_format=torch.contiguous_format)
        for coupling in reversed(couplings) if inverse else couplings:
            x1 = F.split_features(y, coupling.partition)[1]
            F.additive_coupling_(y, coupling.shift(x1, context), coupling.partition, inverse)
            check_range(coupling.label, y, x, coupling.grid)
    return y


class _Rebuilt(Function):
    """All couplings; saves the result and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        couplings: Sequence[_Coupling],
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        y = _walk(couplings, x, context, inverse)
        place = {t: k for k, t in enumerate(parameters)}
        ctx.places = [[(place[w], place[b]) for w, b in c.layers] for c in couplings]
        ctx.couplings, ctx.inverse = [c._replace(layers=()) for c in couplings], inverse
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        # PyTorch refuses a gradient where any of these was written over in the meantime
        ctx.save_for_backward(y, context, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y, context, *parameters = ctx.saved_tensors
        # the caller may use the result, and the gradient belongs to autograd
        y, grad = y.clone(), grad.clone(memory_format=torch.contiguous_format)
        wants_context = context is not None and ctx.needs_input_grad[3]
        c = None if context is None else context.detach().requires_grad_(wants_context)
        wanted = ctx.needs_input_grad[4:]
        totals: list[Tensor | None] = [None] * len(parameters)
        of_context: Tensor | None = None
        kind, dtype, enabled = ctx.autocast
        steps = list(zip(ctx.couplings, ctx.places, strict=True))
        for bare, places in steps if ctx.inverse else reversed(steps):
            coupling = bare._replace(layers=[(parameters[w], parameters[b]) for w, b in places])
            conditioning, shifted = _sides(coupling.partition, y.device)
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
                x1 = y[:, conditioning].detach().requires_grad_()
                shift = coupling.shift(x1, c)
            grad_shift = grad[:, shifted]
            grad_shift = -grad_shift if ctx.inverse else grad_shift
            own = list(dict.fromkeys(k for pair in places for k in pair if wanted[k]))
            sources = [x1, *(parameters[k] for k in own), *([c] if wants_context else [])]
            of_x1, *found = torch.autograd.grad(shift, sources, grad_shift)
            grad[:, conditioning] += of_x1
            if wants_context:
                last = found.pop()
                of_context = last if of_context is None else of_context + last
            for k, g in zip(own, found, strict=True):
                before = totals[k]
                totals[k] = g if before is None else before + g
            F.additive_coupling_(y, shift.detach(), coupling.partition, not ctx.inverse)
        return None, None, grad, of_context, *totals


def _sides(partition: Partition, device: torch.device) -> tuple[slice | Tensor, slice | Tensor]:
    """The columns that condition, and those that are shifted."""
    first, second = (partition.locate(device, conditioning) for conditioning in (True, False))
    return first.columns, second.columns
