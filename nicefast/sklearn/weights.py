"""Weights of rows, as scikit-learn's users give them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .columns import Array, refuse_masked


def checked_weights(name: str, weights: Any, rows: int) -> Array | None:
    """``weights`` as float64 (rows,), finite, none negative, some positive; None stays None.

    Raises:
        TypeError: weights that are no numbers.
        ValueError: another shape, a masked, NaN, infinite or negative weight, or zeros alone; the
            message has the argument's ``name``.

    >>> checked_weights("sample_weight", [1, 2.5], 2)
    array([1. , 2.5])
    >>> checked_weights("sample_weight", [1, -1], 2)
    Traceback (most recent call last):
        ...
    ValueError: sample_weight must be finite and not negative, got -1.0 in row 1
    """
    if weights is None:
        return None
    refuse_masked(name, weights)
    try:
        found = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers, got {type(weights).__name__}") from None
    if found.shape != (rows,):
        raise ValueError(f"{name} must be one number a row, ({rows},), got {found.shape}")
    wrong = ~(np.isfinite(found) & (found >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name} must be finite and not negative, got {found[row]} in row {row}")
    if not found.any():
        raise ValueError(f"{name} must be positive in some row, got a weight of zero in all")
    return found


def weighted_rows(weights: Array | None, least: int = 2) -> Array | slice:
    """Which rows a fit sees: those with a weight above zero.

    ValueError for fewer than ``least`` of them.

    >>> weighted_rows(np.array([0.0, 1.0, 2.0]))
    array([1, 2])
    """
    if weights is None:
        return slice(None)
    kept = np.flatnonzero(weights)
    if len(kept) < least:
        raise ValueError(
            f"sample_weight must be above zero in {least} rows or more, got {len(kept)} such rows"
        )
    return kept
