"""The gate that every provider passes before it is timed: its error against float64."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nicefast import priors

from .providers import FLOAT32, PRECISIONS, Mode, Plain, Provider, Shape, Weights, inference_call


class Values(NamedTuple):
    """What a provider computes, and the gradients of mean log_prob, if asked for."""

    value: Tensor
    gradients: list[Tensor]


def values(model: Provider, x: Tensor, mode: Mode, direction: str) -> Values:
    mode.prepare()
    if direction != "training":
        return Values(inference_call(model, mode, direction)(x), [])
    model.zero_grad(set_to_none=True)
    with mode.products(x.device.type):
        log_prob = model.log_prob(x)
        loss = -log_prob.mean()
    loss.backward()
    found = Values(log_prob.detach(), model.gradients())
    model.zero_grad(set_to_none=True)
    return found


class Errors(NamedTuple):
    """Against float64: largest of the value (of a sample, how far its latents are from the prior:
    see :meth:`Gate.distance`), its root mean square, and of gradients relative to their tensor's
    norm."""

    value: float
    rms: float
    gradients: float


# times 1 / sqrt(rows), of a gradient's norm: a unit within rounding of relu's kink falls to either
# side of it, and one row's share of the gradient comes or goes, for plain PyTorch as for everybody
FLIPS = 0.125
WORST = 4  # times plain PyTorch's largest error: the largest of many varies more than the rest do
SAMPLE = 4_096  # rows of a sample that are looked at
# sqrt(n) times the largest distance of distribution functions: above 3 once in 10^7 right samples
DISTANCE = 3.0


class Gate:
    """Lets a provider pass whose error against float64 is at most twice that of plain PyTorch: the
    root mean square of values, and gradients; the largest of all values, four times."""

    def __init__(self, shape: Shape, weights: Weights, x: Tensor) -> None:
        self.shape, self.weights, self.x = shape, weights, x
        self._plain = Plain(shape, weights).to(x.device)
        self._exact_plain = Plain(shape, weights).double().to(x.device)
        self._allowed: dict[tuple[str, str], Errors] = {}
        self._exact: dict[str, Values] = {}

    def exact(self, direction: str) -> Values:
        if direction not in self._exact:
            x = self.given(direction).double()
            self._exact[direction] = values(self._exact_plain, x, FLOAT32, direction)
        return self._exact[direction]

    @cached_property
    def z(self) -> Tensor:
        """Latents of x, rounded to float32: what goes into an inverse."""
        return self._latents(self.x).float()

    def given(self, direction: str) -> Tensor:
        """What a provider is given in this direction."""
        return self.z if direction == "inverse" else self.x

    @torch.no_grad()
    def _latents(self, x: Tensor) -> Tensor:
        h, _ = self._exact_plain.latent(x.double())
        return h * self._exact_plain.log_scale.exp()

    def distance(self, sample: Tensor) -> float:
        """Kolmogorov's, of a sample's latents from the logistic prior, times sqrt(n)."""
        z = self._latents(sample[:SAMPLE]).flatten().sort().values
        cdf = priors.standard("logistic", dtype=z.dtype, device=z.device).cdf(z)
        steps = torch.arange(len(z) + 1, dtype=z.dtype, device=z.device) / len(z)
        # maximum() keeps a NaN
        gap = torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max()
        return gap.item() * math.sqrt(len(z))

    def errors(self, model: Provider, mode: Mode, direction: str) -> Errors:
        got = values(model, self.given(direction), mode, direction)
        if direction == "sample":
            if got.value.shape != self.x.shape:
                raise ValueError(f"a sample of shape {tuple(got.value.shape)}")
            return Errors(self.distance(got.value), 0.0, 0.0)
        exact = self.exact(direction)
        if got.value.shape != exact.value.shape:
            raise ValueError(f"{direction} of shape {tuple(got.value.shape)}")
        off = (got.value.double() - exact.value).abs()
        largest, rms = off.max().item(), off.square().mean().sqrt().item()
        relative = [
            ((g.double() - e).norm() / e.norm()).item()
            for g, e in zip(got.gradients, exact.gradients, strict=False)
        ]
        # max() alone would lose a NaN
        worst = torch.tensor(relative).max().item() if relative else 0.0
        return Errors(largest, rms, worst)

    def allowed(self, precision: str, direction: str) -> Errors:
        if direction == "sample":
            return Errors(DISTANCE, 0.0, 0.0)
        key = precision, direction
        if key not in self._allowed:
            plain = self.errors(self._plain, PRECISIONS[precision][0], direction)
            eps = torch.finfo(torch.float32).eps
            tiny = eps * self.exact(direction).value.abs().max().item()
            flips = FLIPS / math.sqrt(len(self.x))
            self._allowed[key] = Errors(
                WORST * plain.value + tiny, 2 * plain.rms + tiny, 2 * plain.gradients + flips
            )
        return self._allowed[key]

    def check(
        self, model: Provider, precision: str, mode: Mode, direction: str
    ) -> tuple[Errors, str | None]:
        """Its errors in one of the precision's modes, and what is wrong with them, if anything."""
        found, allowed = self.errors(model, mode, direction), self.allowed(precision, direction)
        value = "log_prob" if direction == "training" else direction
        for what, error, most in zip((value, value, "gradients"), found, allowed, strict=True):
            if not error <= most:
                return found, f"{what} is off by {error:.1e}, allowed {most:.1e}"
        return found, None
