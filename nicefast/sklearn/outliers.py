"""NICEOutlierDetector: rows whose log-density is low."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import OutlierMixin

from ..checks import is_number
from .columns import Array
from .density import NICEDensity
from .weights import checked_weights

WHISKER = 1.5  # interquartile ranges below the lower quartile: where Tukey's fence stands


class NICEOutlierDetector(OutlierMixin, NICEDensity):
    """Outliers by their log-density under a flow: a :class:`NICEDensity` with a threshold.

    ``decision_function(x) = log p(x) - offset_``, in nats, and a row is an outlier where it is
    negative. The threshold is set in fit, by the rows of X themselves:

    * ``contamination=c``: ``offset_`` lies below all but the share c (by weight) of the rows with
      the lowest log-density, halfway to the next one; fewer are outliers where values are tied.
    * ``contamination="auto"``: ``offset_ = q1 - 1.5 (q3 - q1)``, with the quartiles of the rows'
      log-densities, which is Tukey's fence. It presumes no share: rows without outliers have few
      below it. Log-densities have no fixed scale (another unit of a column shifts them all), which
      the fence follows.

    Args:
        contamination: share of outliers among the rows of fit, in (0, 0.5], or ``"auto"``.
        hidden, couplings, prior, partition, activation, dropout, epochs, patience, batch_size, lr,
            weight_decay, validation_fraction, standardise, drop_constant, dequantise, noise_draws,
            random_state, device, dtype, verbose: as in :class:`NICEDensity`.

    Attributes:
        offset_: the threshold, in nats on X's own scale.
        model_, preprocessing_, n_features_in_, feature_names_in_, dropped_, integer_columns_,
            spacings_, n_iter_, validation_scores_: as in :class:`NICEDensity`.

    Raises:
        ValueError, TypeError, FloatingPointError, sklearn.exceptions.NotFittedError: as
            :class:`NICEDensity` does; ValueError in fit for another ``contamination``.

    >>> x = np.random.RandomState(0).normal(size=(200, 2))
    >>> x[:4] += 20
    >>> quick = {"hidden": (16,), "couplings": 2, "epochs": 10, "random_state": 0}
    >>> detector = NICEOutlierDetector(contamination=0.02, **quick).fit(x)
    >>> detector.predict(x)[:6]
    array([-1, -1, -1, -1,  1,  1])
    """

    def __init__(
        self,
        *,
        contamination: float | str = "auto",
        hidden: Sequence[int] = (256,),
        couplings: int = 8,
        prior: str = "logistic",
        partition: Any = "random",
        activation: str = "relu",
        dropout: float = 0.0,
        epochs: int = 200,
        patience: int = 20,
        batch_size: int = 128,
        lr: float = 4e-3,
        weight_decay: float = 1.0,
        validation_fraction: float = 0.1,
        standardise: bool = True,
        drop_constant: bool = False,
        dequantise: str | bool = "auto",
        noise_draws: int = 1,
        random_state: Any = None,
        device: Any = None,
        dtype: str = "float64",
        verbose: int = 0,
    ) -> None:
        super().__init__(
            hidden=hidden,
            couplings=couplings,
            prior=prior,
            partition=partition,
            activation=activation,
            dropout=dropout,
            epochs=epochs,
            patience=patience,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            validation_fraction=validation_fraction,
            standardise=standardise,
            drop_constant=drop_constant,
            dequantise=dequantise,
            noise_draws=noise_draws,
            random_state=random_state,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.contamination = contamination

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, validation_data: Any = None
    ) -> NICEOutlierDetector:
        """Fit the density and the threshold to the rows of X (N, D); ``y`` is not looked at.

        ``validation_data`` is that of :meth:`NICEDensity.fit` too, and has no part in the
        threshold. ``sample_weight`` (N,) is that of :meth:`NICEDensity.fit`, and a row counts by
        it in the share or in the quartiles that set the threshold.
        """
        share: Any = self.contamination
        automatic = isinstance(share, str) and share == "auto"
        if not automatic and not (is_number(share) and 0 < share <= 0.5):
            raise ValueError(f"contamination must be 'auto' or in (0, 0.5], got {share!r}")
        super().fit(X, y, sample_weight, validation_data=validation_data)
        scores = self.score_samples(X)
        weights = checked_weights("sample_weight", sample_weight, len(scores))
        if weights is None:
            weights = np.ones(len(scores))
        self.offset_ = fence(scores, weights) if automatic else below(scores, weights, share)
        return self

    def decision_function(self, X: Any) -> Array:
        """``score_samples(X) - offset_``, in nats: (N,), negative for outliers."""
        found: Array = self.score_samples(X) - self.offset_
        return found

    def predict(self, X: Any) -> Array:
        """-1 for outliers, 1 for all others: (N,), integers."""
        return np.where(self.decision_function(X) < 0, -1, 1)


def below(scores: Array, weights: Array, share: Any) -> float:
    """A threshold below which lies at most this ``share`` of the weight, and as much as can be.

    It is halfway between two scores, so that rounding decides on no row.

    >>> below(np.array([3.0, 1.0, 2.0, 4.0]), np.ones(4), 0.5)
    2.5
    >>> below(np.array([3.0, 1.0, 2.0, 4.0]), np.ones(4), 0.2)
    1.0
    """
    levels, place = np.unique(scores[weights > 0], return_inverse=True)
    mass = np.bincount(place, weights[weights > 0]).cumsum()
    under = int((mass <= share * mass[-1] * (1 + _ROUNDING)).sum())
    if not under:
        return float(levels[0])
    return float((levels[under - 1] + levels[under]) / 2)


def fence(scores: Array, weights: Array) -> float:
    """Tukey's lower fence, ``q1 - 1.5 (q3 - q1)``, with quartiles by the weights.

    >>> fence(np.arange(9.0), np.ones(9))
    -4.0
    """
    order = np.argsort(scores)
    mass = weights[order].cumsum()
    first, third = (scores[order][np.searchsorted(mass, q * mass[-1])] for q in (0.25, 0.75))
    return float(first - WHISKER * (third - first))


_ROUNDING = 1e-9  # relatively: a sum of weights is not exact
