"""The gate that every provider passes before it is timed: its error against float64."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .providers import FLOAT32, PRECISIONS, Mode, Plain, Provider, Shape, Weights, log_prob_call


class Values(NamedTuple):
    """What a provider computes: log_prob, and the gradients of its mean, if asked for."""

    log_prob: Tensor
    gradients: list[Tensor]


def values(model: Provider, x: Tensor, mode: Mode, training: bool) -> Values:
    mode.prepare()
    if not training:
        return Values(log_prob_call(model, mode)(x), [])
    model.zero_grad(set_to_none=True)
    with mode.products():
        log_prob = model.log_prob(x)
        loss = -log_prob.mean()
    loss.backward()
    found = Values(log_prob.detach(), model.gradients())
    model.zero_grad(set_to_none=True)
    return found


class Errors(NamedTuple):
    """Against float64: largest of log_prob, and of gradients relative to their tensor's norm."""

    log_prob: float
    gradients: float


# of a gradient's norm: a unit within rounding of relu's kink falls to either side of it, and one
# row's share of the gradient comes or goes, for plain PyTorch as for everybody
FLIPS = 1e-3


class Gate:
    """Lets a provider pass whose error against float64 is at most twice that of plain PyTorch."""

    def __init__(self, shape: Shape, weights: Weights, x: Tensor) -> None:
        self.shape, self.weights, self.x = shape, weights, x
        self._plain = Plain(shape, weights)
        self._exact_plain = Plain(shape, weights).double()
        self._allowed: dict[tuple[str, bool], Errors] = {}

    @cached_property
    def exact(self) -> Values:
        return values(self._exact_plain, self.x.double(), FLOAT32, training=True)

    def errors(self, model: Provider, mode: Mode, training: bool) -> Errors:
        got = values(model, self.x, mode, training)
        if got.log_prob.shape != self.exact.log_prob.shape:
            raise ValueError(f"log_prob of shape {tuple(got.log_prob.shape)}")
        largest = (got.log_prob.double() - self.exact.log_prob).abs().max().item()
        relative = [
            ((g.double() - e).norm() / e.norm()).item()
            for g, e in zip(got.gradients, self.exact.gradients, strict=False)
        ]
        # max() alone would lose a NaN
        worst = torch.tensor(relative).max().item() if relative else 0.0
        return Errors(largest, worst)

    def allowed(self, precision: str, training: bool) -> Errors:
        key = precision, training
        if key not in self._allowed:
            plain = self.errors(self._plain, PRECISIONS[precision][0], training)
            eps = torch.finfo(torch.float32).eps
            tiny = eps * self.exact.log_prob.abs().max().item()
            self._allowed[key] = Errors(2 * plain.log_prob + tiny, 2 * plain.gradients + FLIPS)
        return self._allowed[key]

    def check(
        self, model: Provider, precision: str, mode: Mode, training: bool
    ) -> tuple[Errors, str | None]:
        """Its errors in one of the precision's modes, and what is wrong with them, if anything."""
        found, allowed = self.errors(model, mode, training), self.allowed(precision, training)
        for what, error, most in zip(("log_prob", "gradients"), found, allowed, strict=True):
            if not error <= most:
                return found, f"{what} is off by {error:.1e}, allowed {most:.1e}"
        return found, None
