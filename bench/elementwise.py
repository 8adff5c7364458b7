"""The element-wise operations alone, each beside other ways to do the same on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import AffineTransform, SigmoidTransform, TransformedDistribution, Uniform

import nicefast as nf

from .providers import logistic_log_prob

Function = Callable[[Tensor, Tensor], Tensor]
COMPILED = "torch.compile"


def one_exponential(h: Tensor, log_scale: Tensor) -> Tensor:
    """Scaling + logistic prior with the least arithmetic: softplus(z) + softplus(-z) at once."""
    a = (h * log_scale.exp()).abs()
    return log_scale.sum() - (a + 2 * torch.log1p(torch.exp(-a))).sum(-1)


class Operation(NamedTuple):
    """Ways to do one thing: each takes rows, over which it may write, and the other operand."""

    ways: dict[str, Function]
    exact: str  # the way that defines the result
    other: Tensor
    yardsticks: tuple[str, ...]  # what the others' times are divided by
    touch: dict[str, Function]  # yardsticks that compute less, on a contiguous shifted half


def coupling(rows: int, features: int) -> Operation:
    """Add a shift to the second half of the features."""
    half = features // 2
    partition = nf.Partition.half(features)
    first, second = torch.arange(half), torch.arange(half, features)

    def view(x: Tensor, shift: Tensor) -> Tensor:
        x[:, half:].add_(shift)
        return x

    def gather_scatter(x: Tensor, shift: Tensor) -> Tensor:
        x1, x2 = x[:, first], x[:, second]
        y = torch.empty_like(x)
        y[:, first] = x1
        y[:, second] = x2 + shift
        return y

    ways: dict[str, Function] = {
        "nicefast, in place": lambda x, s: nf.functional.additive_coupling_(x, s, partition),
        "nicefast": lambda x, s: nf.functional.additive_coupling(x, s, partition),
        "x[:, d:].add_(shift)": view,
        "slice + cat": lambda x, s: torch.cat((x[:, :half], x[:, half:] + s), 1),
        "gather + scatter": gather_scatter,
    }
    touch: dict[str, Function] = {
        "x2.add_(1)": lambda x2, _: x2.add_(1),
        "x2.add_(shift)": lambda x2, s: x2.add_(s),
    }
    yardsticks = (*touch, "x[:, d:].add_(shift)")
    return Operation(ways, "slice + cat", torch.randn(rows, half), yardsticks, touch)


def log_prob(features: int) -> Operation:
    """Scaling, logistic prior and row sum."""
    # the logistic distribution as the documentation of torch.distributions builds it
    logistic = TransformedDistribution(
        Uniform(0.0, 1.0, validate_args=False),
        [SigmoidTransform().inv, AffineTransform(0.0, 1.0)],
        validate_args=False,
    )
    ways: dict[str, Function] = {
        "nicefast": nf.functional.scale_log_prob,
        "plain": logistic_log_prob,
        COMPILED: torch.compile(one_exponential, dynamic=True),
        "torch.distributions": lambda h, s: logistic.log_prob(h * s.exp()).sum(-1) + s.sum(),
    }
    return Operation(ways, "plain", 0.1 * torch.randn(features), (COMPILED,), {})


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler for the CPU."""
    return any(map(shutil.which, ("g++", "clang++")))


@torch.no_grad()
def wrong(way: Function, exact: Function, x: Tensor, other: Tensor) -> str | None:
    """What is wrong with a way's result, if anything, beside ``exact`` in float64."""
    want = exact(x.double(), other.double())
    got = way(x.clone(), other).double()
    # a few roundings of the largest value, or of the largest partial sum
    allowed = 8 * torch.finfo(x.dtype).eps * want.abs().max().item()
    error = (got - want).abs().max().item()
    return None if error <= allowed else f"off by {error:.1e}, allowed {allowed:.1e}"
