"""Weights of rows and of classes, as scikit-learn's users give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..checks import is_number
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


def class_weights(class_weight: Any, classes: Array, mass: Array) -> Array:
    """The factor (K,) by which ``class_weight`` multiplies the weight of each class's rows.

    ``"balanced"`` is ``sum(mass) / (K mass_k)``; a dict gives factors to labels, and 1 to those
    that it does not have; None is 1 for all.

    Args:
        class_weight: None, ``"balanced"`` or a dict from labels to numbers.
        classes: (K,), the labels.
        mass: (K,), the weight of each class's rows in all.

    Raises:
        TypeError: a factor that is no number.
        ValueError: another kind; a label that is none of ``classes``; a factor that is negative or
            not finite; zeros alone.

    >>> class_weights("balanced", np.array([0, 1]), np.array([1.0, 3.0]))
    array([2.        , 0.66666667])
    >>> class_weights({1: 5}, np.array([0, 1]), np.array([1.0, 3.0]))
    array([1., 5.])
    """
    if class_weight is None:
        return np.ones(len(classes))
    if isinstance(class_weight, str) and class_weight == "balanced":
        found: Array = mass.sum() / (len(classes) * mass)
        return found
    if not isinstance(class_weight, Mapping):
        raise ValueError(f"class_weight must be None, 'balanced' or a dict, got {class_weight!r}")
    known = classes.tolist()
    for label, factor in class_weight.items():
        if label not in known:
            raise ValueError(f"class_weight must have labels of y, {known}, got {label!r}")
        if not is_number(factor):
            raise TypeError(f"class_weight must be numbers, got {factor!r} for {label!r}")
        if not 0 <= factor < np.inf:
            raise ValueError(
                f"class_weight must be finite and not negative, got {factor!r} for {label!r}"
            )
    factors = np.array([float(class_weight.get(label, 1)) for label in known])
    if not factors.any():
        raise ValueError("class_weight must be positive for some class, got zero for all")
    return factors


def class_priors(priors: Any, mass: Array) -> Array:
    """p(class), (K,): ``priors``, or where they are None the share of ``mass`` (K,).

    Args:
        priors: None, ``"uniform"``, or K numbers that add up to 1.
        mass: the weight of each class's rows in all.

    Raises:
        TypeError: priors that are no numbers.
        ValueError: masked or negative priors, another number of them, or another sum.

    >>> class_priors(None, np.array([1.0, 3.0])), class_priors("uniform", np.array([1.0, 3.0]))
    (array([0.25, 0.75]), array([0.5, 0.5]))
    """
    if priors is None:
        found: Array = mass / mass.sum()
        return found
    if isinstance(priors, str) and priors == "uniform":
        return np.full(len(mass), 1 / len(mass))
    refuse_masked("priors", priors)
    try:
        given = np.asarray(priors, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"priors must be numbers, 'uniform' or None, got {priors!r}") from None
    if given.shape != mass.shape:
        raise ValueError(f"priors must be {len(mass)}, one a class, got {given.shape}")
    if not (given >= 0).all() or not np.isclose(given.sum(), 1):
        raise ValueError(f"priors must not be negative and add up to 1, got {priors!r}")
    return given
