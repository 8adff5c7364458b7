"""Spacings of a table's columns: of integers, of multiples of 0.1 or of 5, of real values.

A column whose values are all multiples of one number, its spacing, has no density until noise of
that width is added to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST = float(1 << 40)  # magnitude of integers: beyond, float64 has too few digits for noise
MOST_STEPS = 1 << 23  # from 0 to the largest of values that are no integers
FEW_VALUES, FEW_ROWS = 3, 16  # other than 0: integers with fewer have the spacing 1
DECIMALS = 6
SAMPLED = 1 << 16  # values of a column in which a spacing is looked for; all of them must fit it
_ROUNDING = {"f4": 4 * 2.0**-24, "f8": 4 * 2.0**-53}  # relative, of a multiple of a spacing


def column_spacings(rows: Array) -> Array:
    """The spacing of each column: (D,), float64; 0 for real values.

    A spacing shows where values occur more than once and all are multiples of one number, to
    rounding, and up to 2^23 times that number. A column of floating-point values that are all
    different is real therefore, as is one that holds a single value. Integers have the spacing 1 at
    least, whatever their dtype; a larger one, their greatest common divisor, where there are 3
    different values or more, and 16 rows, other than 0: any two integers may have a common divisor
    by chance.

    Args:
        rows: (N, D), of real numbers, integers or bools; or (N, \\*shape), whose values then have
            one spacing in common. Values are finite; a column with others is real.

    >>> column_spacings(np.array([[0, 0.1, 1.5], [2, 0.3, 2.25], [3, 0.3, 1.9], [3, 0.2, 4.1]]))
    array([1. , 0.1, 0. ])
    """
    if not len(rows):
        return np.zeros(rows[:1].size or int(np.prod(rows.shape[1:])))
    if rows.ndim == 2:
        return np.array([_spacing(rows[:, d]) for d in range(rows.shape[1])])
    return np.full(int(np.prod(rows.shape[1:])), _spacing(rows.reshape(-1)))


def on_grid(values: Tensor, spacing: Tensor | float) -> Tensor:
    """Which ``values`` are multiples of ``spacing`` (broadcast against them), to rounding: bools.

    Values that float32 holds may be as far off as its rounding, others as float64's.

    >>> on_grid(torch.tensor([0.3, 0.35, 2.0], dtype=torch.float64), 0.1)
    tensor([ True, False,  True])
    """
    off = (values - (values / spacing).round() * spacing).abs()
    narrow = values.float().to(values.dtype) == values
    size = values.abs()
    near = torch.where(narrow, size * _ROUNDING["f4"], size * _ROUNDING["f8"])
    return off <= near.clamp(max=spacing / 16)


def multiples_below(values: Tensor, spacing: Tensor) -> Tensor:
    """The largest multiple of ``spacing`` (broadcast) up to each of ``values``.

    >>> multiples_below(torch.tensor([0.37, -0.01], dtype=torch.float64), torch.tensor(0.1))
    tensor([ 0.3000, -0.1000], dtype=torch.float64)
    """
    spacing = spacing.to(values)
    steps, each = (values / spacing).floor(), (1 / spacing).round()
    # three tenths are 3 / 10 as a file has them, and not 3 * 0.1
    inverse = (spacing * each - 1).abs() <= _ROUNDING["f4"]
    return torch.where(inverse, steps / each, steps * spacing)


def _spacing(values: Array) -> float:
    """Of one column, (N,)."""
    if values.dtype.kind == "b":
        return 1.0
    sample = values[:: max(1, -(-len(values) // SAMPLED))]
    if values.dtype.kind in "iu":
        return _of_integers(sample, values)
    if not np.isfinite(values.min()) or not np.isfinite(values.max()):
        return 0.0
    different = np.unique(sample.astype(np.float64))
    if len(different) == 1:
        return 0.0
    if _are_integers(sample) and _are_integers(values):
        return _of_integers(sample.astype(np.int64), values)
    if len(different) == len(sample):
        return 0.0
    sizes = np.unique(np.abs(different))
    sizes = sizes[sizes > 0]
    found = next(filter(None, (_multiples(sizes, unit) for unit in _units(sizes))), 0.0)
    every = torch.from_numpy(np.ascontiguousarray(values, np.float64))
    return found if found and bool(on_grid(every, found).all()) else 0.0


def _are_integers(values: Array) -> bool:
    return bool((values == np.floor(values)).all() and np.abs(values).max() <= LARGEST)


def _of_integers(sample: Array, values: Array) -> float:
    others = sample[sample != 0]
    different = np.unique(others)
    few = len(different) < FEW_VALUES or len(others) < FEW_ROWS
    if few or len(different) == len(others):
        return 1.0
    divisor = int(np.gcd.reduce(different))
    return float(divisor) if divisor > 1 and not (values % divisor).any() else 1.0


def _units(sizes: Array) -> list[float]:
    """What the spacing may be a multiple of: tenths, hundredths ..., parts of the least step."""
    least = np.diff(sizes, prepend=0.0).min()
    first = sizes[0]  # of few steps: how many says more exactly how long they are
    steps = [max(1.0, np.rint(first * part / least)) for part in (1, 2, 3, 4)]
    return [10.0**-k for k in range(1, DECIMALS + 1)] + [first / n for n in steps]


def _multiples(sizes: Array, unit: float) -> float:
    """The spacing of ``sizes`` where they are multiples of ``unit``, else 0."""
    steps = np.rint(sizes / unit)
    narrow = bool((sizes.astype(np.float32) == sizes).all())
    most = 1 / (16 * _ROUNDING["f4" if narrow else "f8"])  # beyond, rounding hides the steps
    if steps[0] < 1 or steps[-1] > min(MOST_STEPS, most):
        return 0.0
    if not bool(on_grid(torch.from_numpy(sizes), unit).all()):
        return 0.0
    divisor = float(np.gcd.reduce(steps.astype(np.int64)))
    each = np.rint(1 / unit)
    return divisor / each if abs(unit * each - 1) <= 1e-12 else divisor * unit
