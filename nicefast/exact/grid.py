"""The grid of a stream that is added to and subtracted from without rounding.

Multiples of a power of two stay exact as long as they are within 2^24 steps (2^53 in float64): so
the stream and the shifts of an exact flow (:mod:`nicefast.exact`) lie on one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which a compiler leaves alone: it may fuse a product with a sum, and that
    rounds differently. Marked when it is first called, since that takes PyTorch a second."""

    marked: list[Callable[P, T]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not marked:
            marked.append(torch.compiler.disable(function))
        return marked[0](*args, **kwargs)

    return call


def check_grid(grid: float) -> float:
    """``grid`` as a float, or an error: it must be a positive power of two.

    >>> check_grid(0.3)
    Traceback (most recent call last):
        ...
    ValueError: grid must be a power of two from 2^-100 to 2^100, got 0.3
    """
    if isinstance(grid, bool) or not isinstance(grid, Real):
        raise TypeError(f"grid must be a number, got {type(grid).__name__}")
    grid = float(grid)
    if not 2.0**-100 <= grid <= 2.0**100 or math.frexp(grid)[0] != 0.5:
        raise ValueError(f"grid must be a power of two from 2^-100 to 2^100, got {grid!r}")
    return grid


def limit(grid: float, dtype: torch.dtype) -> float:
    """Up to here, every multiple of ``grid`` is a number of ``dtype``."""
    return grid * 2.0 ** (53 if dtype == torch.float64 else 24)


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: float, down: bool) -> Tensor:
        steps = x * (1 / grid)
        steps = steps.floor_() if down else steps.round_()
        return steps.mul_(grid).add_(0.0)  # -0 becomes 0: it would not survive an addition

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return g, None, None


def round_to_grid(x: Tensor, grid: float, down: bool = False) -> Tensor:
    """The nearest multiple of ``grid``, half to even (``down``: the next one below); its gradient
    is that of x.

    >>> round_to_grid(torch.tensor([0.5, 1.5, -0.2]), 1.0)
    tensor([0., 2., 0.])
    """
    return _Round.apply(x, grid, down)


@uncompiled
def check_range(name: str, y: Tensor, before: Tensor, grid: float) -> None:
    """ValueError where a row of ``y`` (N, D) is outside the range in which the grid is exact.

    A row in which ``before``, what ``y`` was made of, has a NaN may have one. Waits for a GPU.
    """
    if not y.numel():
        return
    most = limit(grid, y.dtype)
    low, high = y.detach().aminmax()
    if bool((low >= -most) & (high <= most)):
        return
    outside = ~(y.detach().abs() <= most) & ~before.detach().isnan().any(1, keepdim=True)
    if outside.any():
        row, feature = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row} has the value {y[row, feature].item():g} in feature {feature}, "
            f"outside +-{most:g}, where a grid of {grid:g} is exact; take a coarser grid"
        )
