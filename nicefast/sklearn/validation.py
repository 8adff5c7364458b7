"""Rows that a caller brings to choose the epoch by."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from .columns import Array, refuse_masked, unmasked
from .weights import checked_weights, weighted_rows


class Validation(NamedTuple):
    """Validation rows (N, D), their labels (N,) where there are any, and weights (N,) or None."""

    rows: Array
    labels: Array | None
    weights: Array | None


def validation_rows(
    estimator: BaseEstimator, data: Any, labelled: bool = False
) -> Validation | None:
    """What ``validation_data`` holds, checked as the rows of fit are; None stays None.

    Args:
        estimator: it knows already how many columns there are, and their names.
        data: ``(X, y)`` or ``(X, y, sample_weight)``; unless ``labelled``, X alone or a pair whose
            y is not looked at.
        labelled: whether labels are needed.

    Raises:
        ValueError: no tuple of two or three where labels are needed; rows, labels or weights that
            fit would refuse. The message begins with ``validation_data``.
    """
    if data is None:
        return None
    if isinstance(data, tuple):
        if len(data) not in {2, 3}:
            raise ValueError(
                f"validation_data must be (X, y) or (X, y, sample_weight), got {len(data)} values"
            )
        rows, labels, *rest = data
    elif labelled:
        raise ValueError(
            f"validation_data must be (X, y) or (X, y, sample_weight), got {type(data).__name__}"
        )
    else:
        rows, labels, rest = data, None, []
    try:
        if labelled:
            refuse_masked("y", labels)
            rows, labels = validate_data(
                estimator, unmasked(rows), labels, dtype=np.float64, reset=False
            )
        else:
            rows = validate_data(estimator, unmasked(rows), dtype=np.float64, reset=False)
        weights = checked_weights("sample_weight", rest[0] if rest else None, len(rows))
    except (TypeError, ValueError) as problem:
        raise type(problem)(f"validation_data: {problem}") from None
    seen = weighted_rows(weights, 1)
    return Validation(
        rows[seen],
        labels[seen] if labelled else None,
        None if weights is None else weights[seen],
    )


def by_class(
    validation: Validation | None, classes: Array
) -> list[tuple[Array, Array | None] | None]:
    """For each class its validation rows and their weights; None where there is no validation.

    ValueError for a class without a row, and for a label that is no class of fit.
    """
    if validation is None:
        return [None] * len(classes)
    assert validation.labels is not None
    unknown = np.setdiff1d(validation.labels, classes)
    if len(unknown):
        raise ValueError(f"validation_data must have labels of y, got {unknown[0]!r}")
    found: list[tuple[Array, Array | None] | None] = []
    for label in classes:
        own = validation.labels == label
        if not np.any(own):
            raise ValueError(
                f"validation_data must have rows of every class, got none of {label!r}"
            )
        weights = None if validation.weights is None else validation.weights[own]
        found.append((validation.rows[own], weights))
    return found
