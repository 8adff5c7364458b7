"""Couplings on a grid, one after another: an inverse to the last bit, at any depth.

Since the way back is exact, the gradient needs nothing but the result: each coupling's input is
rebuilt from its output, and its activations from that, with the very bits that they had
(Gomez et al. 2017, arXiv 1707.04585, do this in floating point, where it drifts). Memory does not
grow with depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import functional as F  # noqa: N812
from ..exact.grid import check_range, round_to_grid
from ..layers import MLP, AdditiveCoupling, is_watched, plain_layers
from ..runtime import watchers


class ExactEngine:
    """The couplings of a flow with a grid, and its prior, which has the scale ``exp(-log_scale)``.

    Rows x and z are (N, D), at least float32, of any dtype and device; the context is (N, K).
    Methods record gradients, by themselves, and raise ValueError where a value leaves the range in
    which the grid is exact: the message names the coupling and the row.

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
        if not all(_is_plain(coupling) for coupling in self.couplings):
            for coupling in reversed(self.couplings) if inverse else self.couplings:
                x, _ = (coupling.inverse if inverse else coupling)(x, context)
            return x
        parameters = list(
            dict.fromkeys(p for coupling in self.couplings for p in coupling.parameters())
        )
        if watchers.records(x, context, *parameters):
            return _Rebuilt.apply(self.couplings, inverse, x, context, *parameters)
        return _walk(self.couplings, x, context, inverse)


def _is_plain(coupling: nn.Module) -> bool:
    """Whether a coupling is what its tensors say, each time that it is computed."""
    if type(coupling) is not AdditiveCoupling or is_watched(coupling):
        return False
    mlp = coupling.conditioner
    return not isinstance(plain_layers(mlp), str) and not cast("MLP", mlp).drops


def _walk(
    couplings: Sequence[AdditiveCoupling], x: Tensor, context: Tensor | None, inverse: bool
) -> Tensor:
    with torch.no_grad():
        y = x.clone(memory_format=torch.contiguous_format)
        for coupling in reversed(couplings) if inverse else couplings:
            x1 = F.split_features(y, coupling.partition)[1]
            shift = coupling.shift(x1, context)
            F.additive_coupling_(y, shift, coupling.partition, inverse)
            check_range(coupling.label, y, x, cast("float", coupling.grid))
    return y


class _Rebuilt(Function):
    """All couplings; keeps the result alone."""

    @staticmethod
    def forward(
        ctx: Any,
        couplings: Sequence[AdditiveCoupling],
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        y = _walk(couplings, x, context, inverse)
        ctx.couplings, ctx.inverse = couplings, inverse
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        # parameters too: PyTorch then refuses a gradient after they were written over
        ctx.save_for_backward(y, context, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y, context, *parameters = ctx.saved_tensors
        # the result may be in use, and the gradient another's
        y, grad = y.clone(), grad.clone(memory_format=torch.contiguous_format)
        wants_context = context is not None and ctx.needs_input_grad[3]
        c = None if context is None else context.detach().requires_grad_(wants_context)
        wanted = {
            p: None for p, wants in zip(parameters, ctx.needs_input_grad[4:], strict=True) if wants
        }
        totals: dict[Tensor, Tensor] = {}
        kind, dtype, enabled = ctx.autocast
        for coupling in ctx.couplings if ctx.inverse else reversed(ctx.couplings):
            conditioning, shifted = _sides(coupling, y.device)
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
                x1 = y[:, conditioning].detach().requires_grad_()
                shift = coupling.shift(x1, c)
            grad_shift = grad[:, shifted]
            grad_shift = -grad_shift if ctx.inverse else grad_shift
            own = [p for p in coupling.conditioner.parameters() if p in wanted]
            sources = [x1, *own, *([c] if wants_context else [])]
            found = torch.autograd.grad(shift, sources, grad_shift)
            grad[:, conditioning] += found[0]
            for source, g in zip(sources[1:], found[1:], strict=True):
                totals[source] = totals[source] + g if source in totals else g
            F.additive_coupling_(y, shift.detach(), coupling.partition, not ctx.inverse)
        of_parameters = [totals.get(p) for p in parameters]
        of_context = totals.get(c) if wants_context and c is not None else None
        return None, None, grad, of_context, *of_parameters


def _sides(
    coupling: AdditiveCoupling, device: torch.device
) -> tuple[slice | Tensor, slice | Tensor]:
    """Columns that condition, and those that are shifted."""
    sides = (coupling.partition.locate(device, conditioning) for conditioning in (True, False))
    first, second = (f.columns for f in sides)
    return first, second
