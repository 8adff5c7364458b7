"""What `bench.tabular` compares: densities, anomaly scores and classifiers, chosen and timed.

Every density is of the same rows: integers with the same noise, without constant columns. Where a
method has something to choose, it is fitted to the training rows for every choice, the best on the
validation rows is taken and fitted again, to both; flows stop early by a share of both instead.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity
from threadpoolctl import threadpool_limits

from nicefast.sklearn import NICEClassifier, NICEDensity
from nicefast.sklearn.columns import with_noise

BANDWIDTHS = tuple(float(h) for h in np.logspace(-2, 1.5, 15))  # of standardised columns
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
COVARIANCES = ("full", "diag")
RIDGES = (1e-6, 1e-3)  # reg_covar, of standardised columns: the default, and against outliers
SMOOTHINGS = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
SHARES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 0.5)
Array = np.ndarray[Any, np.dtype[Any]]


class Rows(NamedTuple):
    """Rows as they came, without constant columns, and the width of each column's noise."""

    train: Array
    validation: Array
    test: Array
    spacing: Array

    def noised(self) -> tuple[Array, Array, Array]:
        return tuple(with_noise(rows, self.spacing) for rows in self[:3])  # type: ignore[return-value]


class Found(NamedTuple):
    """Log-densities or scores of the test rows; seconds to choose, fit and score; the choice."""

    scores: Array
    select: float
    fit: float
    score: float
    choice: str
    float32: float | None = None


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = call()
    return result, time.perf_counter() - began


def flow(rows: Rows, seed: int, **options: Any) -> Found:
    """NICEDensity: integers go in as they came, and get new noise in every epoch."""
    both = np.concatenate([rows.train, rows.validation])
    share = len(rows.validation) / len(both)
    density = NICEDensity(validation_fraction=share, random_state=seed, **options)
    _, fit = timed(lambda: density.fit(both))
    test = with_noise(rows.test, rows.spacing)
    scores, score = timed(lambda: density.score_samples(test))
    narrow = copy.deepcopy(density)
    narrow.model_.float()
    _, float32 = timed(lambda: narrow.score_samples(test))
    return Found(scores, 0.0, fit, score, f"{density.n_iter_} epochs", float32)


def kernel(rows: Rows, seed: int, quick: bool = False) -> Found:
    """KernelDensity, Gaussian, of standardised columns; the bandwidth is chosen."""
    choices = BANDWIDTHS[2:12:4] if quick else BANDWIDTHS
    made = ((f"bandwidth {h:.3g}", KernelDensity(bandwidth=h)) for h in choices)
    return _chosen(rows, made)


def mixture(rows: Rows, seed: int, quick: bool = False) -> Found:
    """GaussianMixture of standardised columns; components, covariance and its ridge are chosen."""
    grid = itertools.product(COMPONENTS[:3] if quick else COMPONENTS, COVARIANCES, RIDGES)
    made = (
        (
            f"{n} {kind}, {ridge:g}",
            GaussianMixture(
                n, covariance_type=kind, reg_covar=ridge, max_iter=200, random_state=seed
            ),
        )
        for n, kind, ridge in grid
    )
    return _chosen(rows, made)


def forest(rows: Rows, seed: int) -> Found:
    """IsolationForest as it comes: `score_samples`, greater where a row is more normal."""
    both = np.concatenate([rows.train, rows.validation])
    model = IsolationForest(random_state=seed)
    _, fit = timed(lambda: model.fit(both))
    scores, score = timed(lambda: model.score_samples(rows.test))
    return Found(scores, 0.0, fit, score, "100 trees")


def classifiers(
    rows: Rows, labels: tuple[Array, Array], seed: int, quick: bool, **options: Any
) -> dict[str, Found]:
    """Log-probabilities (N, classes) of the test rows, by method."""
    both, of_both = np.concatenate(rows[:2]), np.concatenate(labels)
    share = len(rows.validation) / len(both)
    nice = NICEClassifier(validation_fraction=share, random_state=seed, **options)
    _, fit = timed(lambda: nice.fit(both, of_both))
    scores, score = timed(lambda: nice.predict_log_proba(rows.test))
    found = {"NICEClassifier": Found(scores, 0.0, fit, score, f"{nice.n_iter_} epochs at most")}
    grids: dict[str, Iterable[tuple[str, Any]]] = {
        "NICEClassifier, gaussian": (
            (f"reg {s:g}", NICEClassifier(density="gaussian", reg=s)) for s in SHARES
        ),
        "GaussianNB": ((f"var_smoothing {s:g}", GaussianNB(var_smoothing=s)) for s in SMOOTHINGS),
        "QDA": ((f"reg_param {s:g}", QuadraticDiscriminantAnalysis(reg_param=s)) for s in SHARES),
    }
    for name, grid in grids.items():
        best, best_accuracy, select = None, -1.0, 0.0
        for choice, model in grid:
            accuracy, seconds = timed(lambda m=model: _accuracy(m, rows, labels))
            select += seconds
            if accuracy > best_accuracy:
                best, best_accuracy = (choice, model), accuracy
        if best is None:
            continue
        _, fit = timed(lambda m=best[1]: m.fit(both, of_both))
        scores, score = timed(lambda m=best[1]: m.predict_log_proba(rows.test))
        found[name] = Found(scores, select, fit, score, best[0])
    return found


def _accuracy(model: Any, rows: Rows, labels: tuple[Array, Array]) -> float:
    """On the validation rows; -1 where the covariance is singular."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of QDA: collinear columns, and logs of 0
        try:
            model.fit(rows.train, labels[0])
            return float(model.score(rows.validation, labels[1]))
        except (ValueError, np.linalg.LinAlgError):
            return -1.0


def _chosen(rows: Rows, made: Iterable[tuple[str, Any]]) -> Found:
    train, validation, test = rows.noised()
    mean, std = train.mean(0), train.std(0)
    shift = np.log(std).sum()
    train, validation, test = ((part - mean) / std for part in (train, validation, test))
    both = np.concatenate([train, validation])
    best, best_score, select = None, -np.inf, 0.0
    with threadpool_limits(1):  # of many small products, two threads are slower than one
        for choice, model in made:
            try:
                value, seconds = timed(lambda m=model: m.fit(train).score(validation))
            except ValueError:  # a component without rows to speak of
                continue
            select += seconds
            if best is None or value > best_score:
                best, best_score = (choice, model), value
        assert best is not None
        _, fit = timed(lambda: best[1].fit(both))
        scores, score = timed(lambda: best[1].score_samples(test))
    return Found(scores - shift, select, fit, score, best[0])
