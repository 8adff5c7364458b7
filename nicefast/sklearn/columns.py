"""Columns of a table: which get noise of what width, which are constant, and that noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checks import filled
from ..preprocessing import Dequantise, Preprocessing, Standardise
from ..spacing import column_spacings, on_grid

Array = np.ndarray[Any, np.dtype[Any]]

NOISE_VARIANCE = 1 / 12  # of u uniform on [0, 1), whose mean is 1/2
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDING = 8 * float(np.finfo(np.float64).eps)


def dequantising(spacing: Array) -> Preprocessing:
    """The noise of columns with these spacings (D,), 0 for none, and no other step."""
    if not spacing.any():
        return Preprocessing(())
    return Preprocessing((Dequantise(None, spacing=tuple(spacing.tolist())),))


def moments(rows: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Mean and variance of each column, both (D,), by the ``weights`` (N,) of the rows.

    >>> moments(np.array([[0.0], [3.0]]), np.array([2.0, 1.0]))
    (array([1.]), array([2.]))
    """
    if weights is None:
        return rows.mean(0), rows.var(0)
    share = weights / weights.sum()
    mean = share @ rows
    return mean, share @ (rows - mean) ** 2


def standardising(rows: Array, spacing: Array, weights: Array | None = None) -> Preprocessing:
    """Each column of ``rows + spacing u`` to mean 0 and standard deviation 1, u's part exact.

    Mean and deviation are those by the ``weights`` (N,) of the rows.

    >>> steps = standardising(np.array([[0.0, 0.5], [2.0, 1.5]]), np.array([1.0, 0.0]))
    >>> x, _ = steps.forward(torch.tensor([[0.0, 0.5]], dtype=torch.float64), seed=1)
    >>> bool(0 <= steps.inverse(x.double())[0, 0] < 1), x[0, 1].item()
    (True, -1.0)
    """
    mean, variance = moments(rows, weights)
    mean, variance = mean + 0.5 * spacing, variance + NOISE_VARIANCE * spacing**2
    step = Standardise(torch.from_numpy(mean), torch.from_numpy(np.sqrt(variance)))
    return Preprocessing((*dequantising(spacing).steps, step))


def unmasked(rows: Any) -> Any:
    """X with NaN where it is masked, which scikit-learn's validation refuses as missing values.

    NumPy would take what lies under the mask for values, also in a list of masked rows.
    """
    if isinstance(rows, list | tuple) and any(isinstance(r, np.ma.MaskedArray) for r in rows):
        rows = np.ma.stack(rows)
    return filled(rows)


def refuse_masked(name: str, values: Any) -> None:
    """ValueError where a value is masked."""
    if np.ma.is_masked(values):
        raise ValueError(f"Input {name} has masked values: expected all of them")


def noise_spacings(rows: Array, dequantise: str | bool, label: Callable[[int], str]) -> Array:
    """The width of each column's noise: (D,), float64, 0 for none.

    Args:
        rows: (N, D), float64.
        dequantise: ``"auto"``: the spacings that :func:`nicefast.spacing.column_spacings` finds;
            True: so, but a real column is an error; False: all 0.
        label: how a column is called.

    Raises:
        ValueError: another ``dequantise``; True, and a column of real values.

    >>> noise_spacings(np.array([[1.0, 0.3], [2.0, 0.2], [2.0, 0.3]]), "auto", str)
    array([1. , 0.1])
    """
    if not isinstance(dequantise, bool | np.bool_) and dequantise != "auto":
        raise ValueError(f"dequantise must be 'auto', True or False, got {dequantise!r}")
    if not isinstance(dequantise, str) and not dequantise:
        return np.zeros(rows.shape[1])
    found = column_spacings(rows)
    if not isinstance(dequantise, str) and not found.all():
        column = int(np.argmin(found))
        values = rows[:, column]
        wrong = values[(values != np.floor(values)).argmax()]
        raise ValueError(
            f"dequantise=True needs multiples of one number, such as integers in every column, got "
            f"{wrong:g} in {label(column)}"
        )
    return found


def constant_columns(rows: Array) -> Array:
    """Ascending numbers of the columns all of whose values are the same, to rounding."""
    spread = np.ptp(rows, axis=0)
    return np.flatnonzero(spread <= _ROUNDING * np.abs(rows).max(0))


def labels(names: Array | None) -> Callable[[int], str]:
    """How columns are called in messages: by name where there is one, and by number.

    >>> labels(None)(3), labels(np.array(["a", "b"]))(1)
    ('column 3', "'b' (column 1)")
    """
    return lambda c: f"column {c}" if names is None else f"{str(names[c])!r} (column {c})"


def refuse_constant(constant: Array, features: int, label: Callable[[int], str]) -> None:
    """ValueError that names the constant columns, where there are any."""
    if len(constant):
        shown = ", ".join(map(label, constant[:10])) + (", ..." if len(constant) > 10 else "")
        raise ValueError(
            f"{len(constant)} of {features} columns are constant and have no density: {shown}; "
            f"leave them out, or give drop_constant=True"
        )


class Columns(NamedTuple):
    """Numbers of the columns that vary and of the constant ones; the noise of those that vary."""

    kept: Array
    constant: Array
    spacing: Array


def columns_of(
    rows: Array, names: Array | None, drop_constant: bool, dequantise: str | bool, least: int
) -> Columns:
    """Which columns of ``rows`` (N, D) a density is fitted to, and the width of their noise.

    ValueError for constant columns unless they are dropped, for fewer than ``least`` others, and
    as :func:`noise_spacings` does.

    >>> columns_of(np.array([[1.0, 7.0], [2.5, 7.0]]), None, True, "auto", 1)
    Columns(kept=array([0]), constant=array([1]), spacing=array([0.]))
    """
    label = labels(names)
    constant = constant_columns(rows)
    if not drop_constant:
        refuse_constant(constant, rows.shape[1], label)
    kept = np.setdiff1d(np.arange(rows.shape[1]), constant)
    if len(kept) < least:
        raise ValueError(
            f"at least {least} columns that vary are needed, got n_features = {len(kept)} after "
            f"{len(constant)} constant columns were dropped"
        )
    spacing = noise_spacings(rows[:, kept], dequantise, lambda c: label(int(kept[c])))
    return Columns(kept, constant, spacing)


def with_noise(rows: Array, spacing: Array, draw: int = 0) -> Array:
    """``rows`` (N, D, float64) with ``spacing`` u, u uniform on [0, 1), added to its multiples.

    u is a function of the row's values, the column and ``draw``: a row has the same noise
    whatever rows are beside it. Values that are no multiples of their column's spacing stay as
    they are, so that rows which have their noise already are not given more.

    Args:
        spacing: (D,), of each column; 0 for no noise.

    >>> x = np.array([[1.0, 2.0], [1.5, 2.5]])
    >>> y = with_noise(x, np.array([1.0, 0.0]))
    >>> bool(1 < y[0, 0] < 2), y[1, 0], y[:, 1]
    (True, np.float64(1.5), array([2. , 2.5]))
    """
    columns = np.flatnonzero(spacing)
    if not len(columns):
        return rows
    bits = np.ascontiguousarray(rows + 0.0).view(np.uint64)  # + 0.0: -0.0 is 0.0
    state = np.full(len(rows), np.uint64(draw))
    for column in bits.T:
        state = _mixed((state + _GOLDEN) ^ column)
    numbers = np.arange(1, len(columns) + 1, dtype=np.uint64) * _GOLDEN
    u = (_mixed(state[:, None] + numbers) >> np.uint64(40)) * 2.0**-24
    found = rows.copy()
    chosen, widths = rows[:, columns], spacing[columns]
    multiple = on_grid(torch.from_numpy(chosen), torch.from_numpy(widths)).numpy()
    found[:, columns] = chosen + np.where(multiple, u * widths, 0.0)
    return found


def _mixed(x: Array) -> Array:
    """SplitMix64's output function: every bit of ``x`` changes half of the bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
