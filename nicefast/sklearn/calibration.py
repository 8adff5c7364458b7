"""The temperature that makes a classifier's probabilities as sure as it is right."""

from __future__ import annotations

import numpy as np

from .columns import Array

LOW, HIGH = 1e-3, 1e6  # the temperatures between which the search goes
PSEUDO_ROWS = 0.1  # a and b of the Beta prior of the share of wrong rows
_STEPS = 100  # of a bisection: more than the bits of a float64


def temperature(joint: Array, labels: Array, weights: Array | None = None) -> float:
    """The T at which ``softmax(joint / T)`` has the least cross-entropy with the labels.

    The cross-entropy is convex in ``1 / T``, so its derivative has one sign change, which a
    bisection finds to the last bit, between 1e-3 and 1e6. Rows that are all right would make T as
    small as it may be. So the labels are smoothed as if a tenth of a row were wrong: the label has
    the probability ``1 - e``, ``e = 0.1 / (N + 0.2)``, which is the mean of the error rate after N
    right rows under a Beta(0.1, 0.1) prior, and the other classes share e.

    Args:
        joint: (N, K), ``log p(x | class) + log p(class)`` in nats of rows that the densities were
            not trained on; -inf throughout a column for a class of probability 0.
        labels: (N,), numbers of the rows' classes.
        weights: (N,), on any scale; None for equal ones.

    Returns 1 for no rows of positive weight, and where fewer than two classes are possible.

    >>> joint = np.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 0.0]])
    >>> round(temperature(joint, np.array([0, 1, 0, 1])), 2)  # right in 3 rows of 4
    8.69
    """
    weights = np.ones(len(joint)) if weights is None else weights
    possible = np.flatnonzero(np.isfinite(joint).any(0))
    seen = (weights > 0) & np.isin(labels, possible)
    if not seen.any() or len(possible) < 2:
        return 1.0
    weights = weights[seen] / weights[seen].sum()
    scores = joint[np.ix_(seen, possible)]
    scores = np.maximum(scores - scores.max(1, keepdims=True), -1e12)
    wrong = PSEUDO_ROWS / (len(scores) + 2 * PSEUDO_ROWS)
    target = np.where(possible == labels[seen, None], 1 - wrong, wrong / (len(possible) - 1))
    wanted = (target * scores).sum(1)

    def slope(sharpness: float) -> float:
        raised = np.exp(sharpness * scores)
        expected = (raised * scores).sum(1) / raised.sum(1)
        return float(weights @ (expected - wanted))

    low, high = np.log(1 / HIGH), np.log(1 / LOW)  # of 1 / T
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if slope(float(np.exp(middle))) < 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def balanced(labels: Array, priors: Array, weights: Array | None = None) -> Array:
    """Weights (N,) by which each class that has rows has its prior's share.

    >>> balanced(np.array([0, 0, 1]), np.array([0.5, 0.5]))
    array([0.25, 0.25, 0.5 ])
    """
    weights = np.ones(len(labels)) if weights is None else weights
    mass = np.bincount(labels, weights, len(priors))
    found: Array = weights * priors[labels] / mass[labels]
    return found
