"""Statistics of many rows, gathered block by block in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FIT_ROWS = 4096  # of a block, while statistics are gathered

#: rows (N, D), or a function that gives them in blocks, again at each call
Rows = Tensor | Callable[[], Iterable[Tensor]]


class Moments(NamedTuple):
    """Of each feature, on the CPU; ``second`` is the variance, or the covariance matrix."""

    mean: Tensor
    second: Tensor
    low: Tensor
    high: Tensor


def moments(rows: Rows, products: bool) -> Moments:
    """In float64 and in one pass, about the first block's mean: no digits are lost to a large one.

    ``products``: the covariance too. ValueError for fewer than two rows, and for values that are
    not finite.

    >>> moments(torch.tensor([[1.0, 5.0], [3.0, 9.0]]), products=False).second
    tensor([1., 4.], dtype=torch.float64)
    """
    shift: Tensor | None = None
    count = 0
    for block in blocks(rows):
        x = wide(block)
        if shift is None:
            if x.ndim != 2:
                raise ValueError(f"x must have shape (N, D), got {tuple(x.shape)}")
            shift = x.mean(0)
            total, low, high = torch.zeros_like(shift), x.amin(0), x.amax(0)
            second = torch.zeros_like(torch.outer(shift, shift) if products else shift)
        count += len(x)
        low, high = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))
        x = x - shift
        total += x.sum(0)
        second += x.T @ x if products else (x * x).sum(0)
    if shift is None or count < 2:
        raise ValueError(f"statistics need two rows or more, got {count}")
    mean = total / count
    broken = (~(mean.isfinite() & low.isfinite() & high.isfinite())).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"feature {broken[0]} holds values that are not finite")
    second = second / count - (torch.outer(mean, mean) if products else mean * mean)
    return Moments(*(t.cpu() for t in (mean + shift, second, low, high)))


def blocks(rows: Rows) -> Iterator[Tensor]:
    """Blocks (n, D) of the rows, in order; ValueError for a tensor that holds no rows of reals."""
    if isinstance(rows, Tensor):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"x must be floating point (N, D), got {rows.dtype} {tuple(rows.shape)}"
            )
        yield from (block for block in rows.detach().split(FIT_ROWS) if len(block))
    elif callable(rows):
        yield from rows()
    else:
        raise TypeError(f"x must be a torch.Tensor, got {type(rows).__name__}")


def wide(x: Tensor) -> Tensor:
    """In float64, which Apple's GPUs lack: from there, on the CPU."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
