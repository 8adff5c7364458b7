"""NICEClassifier: Bayes' rule over one density for each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ..checks import check_choice, is_number
from .calibration import balanced, temperature
from .columns import Array, columns_of, refuse_masked, unmasked
from .fitted import FittedFlow, FittedGaussian, mean_log_prob, spacings_of
from .perclass import fit_classes
from .validation import Validation, by_class, validation_rows
from .weights import checked_weights, class_priors, class_weights, weighted_rows

DENSITIES = ("nice", "gaussian")


class NICEClassifier(ClassifierMixin, BaseEstimator):
    """``p(class | x)`` proportional to ``p(x | class) p(class)``, with a density for each class.

    Args:
        density: ``"nice"``: a flow, fitted to the class's rows as :class:`NICEDensity` is; or
            ``"gaussian"``, for comparison: a normal density of full covariance by maximum
            likelihood.
        priors: p(class), in the order of ``classes_``, adding up to 1; ``"uniform"`` for 1 / K;
            None for the classes' shares of the rows' weight in fit.
        class_weight: factors of the rows' weights: ``"balanced"``, as if all classes had the same
            weight, or a dict from labels to factors (1 for those that are not in it). A class's
            density is the same whatever its factor: ``class_weight`` decides on p(class) where
            ``priors`` is None, and on nothing where priors are given. So ``"balanced"`` and
            ``priors="uniform"`` are the same model.
        reg: of ``"gaussian"`` alone: to each column's variance in each class, this share of its
            variance over all classes is added, without which the covariance of few rows is
            singular.
        calibrate: divide the logarithms of the joint densities by a temperature, chosen on rows
            that no density was trained on, see ``temperature_``. Densities of many features are
            surer of a class than they are right.
        weight_decay: as in :class:`NICEDensity`; ``"auto"`` for 3000 / rows of the class, within
            1 and 30: flows of few rows disagree about a row for no other reason than chance.
        hidden, couplings, prior, partition, activation, dropout, epochs, patience, batch_size, lr,
            validation_fraction, standardise, drop_constant, dequantise, noise_draws,
            random_state, device, dtype, verbose: as in :class:`NICEDensity`. What is constant and
            what is an integer is decided for all classes together, so that their densities are on
            one scale. Priors that are wrong, and a class of one row, are errors.

    Attributes:
        classes_: the labels, sorted.
        class_prior_: p(class) of each.
        temperature_: T, above 1 where the densities were too sure, found by
            :func:`nicefast.sklearn.calibration.temperature` on ``validation_data`` where it is
            given, else on the rows that ``validation_fraction`` held out of each class of 20 rows
            or more; the same rows choose the epochs. They count by their ``sample_weight``, and
            each class by its prior. 1 with ``calibrate=False`` and where there are no such rows:
            with ``validation_fraction=0``, and with ``density="gaussian"``, which trains on all
            rows.
        n_features_in_, feature_names_in_, dropped_, integer_columns_, spacings_: as in
            :class:`NICEDensity`.
        n_iter_: of ``"nice"``: the most epochs that a class took; 1 otherwise.

    Raises:
        ValueError: as :class:`NICEDensity` does; for a class of fewer than two rows, and for a
            column of real values that is constant within a class, by their names; for labels that
            are no classes; for ``priors`` and ``class_weight`` that are not as above; for
            ``validation_data`` with other labels, or with no row of a class.

    Pickling keeps flows as the bytes of safetensors files.

    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> nice = NICEClassifier(hidden=(16,), couplings=2, epochs=3, random_state=0).fit(x, y)
    >>> nice.predict_proba(x).shape, nice.score(x, y) > 0.9
    ((150, 3), True)
    """

    def __init__(
        self,
        *,
        density: str = "nice",
        priors: Any = None,
        class_weight: Any = None,
        reg: float = 1e-4,
        calibrate: bool = True,
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
        weight_decay: float | str = "auto",
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
        self.density = density
        self.priors = priors
        self.class_weight = class_weight
        self.reg = reg
        self.calibrate = calibrate
        self.hidden = hidden
        self.couplings = couplings
        self.prior = prior
        self.partition = partition
        self.activation = activation
        self.dropout = dropout
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.standardise = standardise
        self.drop_constant = drop_constant
        self.dequantise = dequantise
        self.noise_draws = noise_draws
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation_data: Any = None
    ) -> NICEClassifier:
        """Fit a density to the rows of each class: X (N, D), y (N,).

        With ``sample_weight`` w (N,), each class's density maximises the weighted mean of its
        log-densities, and the frequency of a class is its share of the weight. A row of weight 0
        has no influence on anything; a class of such rows is no class.

        ``validation_data``, ``(X, y)`` or ``(X, y, sample_weight)`` with rows of every class,
        takes the place of the rows that are held out of each class's, as in
        :meth:`NICEDensity.fit`.
        """
        check_choice("density", self.density, DENSITIES)
        if not is_number(self.reg) or not 0 <= self.reg < np.inf:
            raise ValueError(f"reg must be non-negative and finite, got {self.reg!r}")
        least = 2 if self.density == "nice" else 1
        refuse_masked("y", y)
        rows, y = validate_data(
            self, unmasked(X), y, dtype=np.float64, ensure_min_samples=2, ensure_min_features=least
        )
        check_classification_targets(y)
        weights = checked_weights("sample_weight", sample_weight, len(rows))
        validation = validation_rows(self, validation_data, labelled=True)
        seen = weighted_rows(weights)
        rows, y, weights = rows[seen], y[seen], None if weights is None else weights[seen]
        classes, number = np.unique(y, return_inverse=True)
        counts = np.bincount(number)
        if counts.min() < 2:
            raise ValueError(
                f"class {classes[counts.argmin()]!r} has 1 sample, a density needs 2 or more"
            )
        mass = np.bincount(number, weights)
        mass = mass * class_weights(self.class_weight, classes, mass)
        class_prior = class_priors(self.priors, mass)
        names = getattr(self, "feature_names_in_", None)
        columns = columns_of(rows, names, self.drop_constant, self.dequantise, least)
        options, parts = self.get_params(), by_class(validation, classes)
        fitted = fit_classes(rows, number, classes, columns, options, weights, parts, names)
        self.classes_, self.class_prior_ = classes, class_prior
        self._densities, self._kept, self._spacing = fitted.densities, *columns[::2]
        self.n_iter_ = fitted.epochs
        names = np.arange(rows.shape[1]) if names is None else names
        self.dropped_ = names[columns.constant]
        self.integer_columns_ = columns.kept[columns.spacing > 0]
        self.spacings_ = np.zeros(rows.shape[1])
        self.spacings_[columns.kept] = columns.spacing
        if validation is None:
            apart = fitted.held
            own = None if weights is None else weights[apart]
            validation = Validation(rows[apart], classes[number[apart]], own)
        self.temperature_ = self._temperature(validation) if self.calibrate else 1.0
        return self

    def _temperature(self, validation: Validation) -> float:
        if not len(validation.rows) or validation.labels is None:
            return 1.0
        number = np.searchsorted(self.classes_, validation.labels)
        counted = balanced(number, self.class_prior_, validation.weights)
        return temperature(self._joint(validation.rows[:, self._kept]), number, counted)

    def predict_joint_log_proba(self, X: Any) -> Array:
        """``log p(x | class) + log p(class)`` in nats on X's own scale: (N, classes), float64."""
        check_is_fitted(self)
        rows = validate_data(self, unmasked(X), dtype=np.float64, reset=False)
        return self._joint(rows[:, self._kept])

    def _joint(self, rows: Array) -> Array:
        """``log p(x | class) + log p(class)`` of the columns that were kept."""

        def every(noised: Array) -> Array:
            return np.stack([density.log_prob(noised) for density in self._densities], 1)

        with np.errstate(divide="ignore"):  # a prior may be 0
            log_prior = np.log(self.class_prior_)
        return mean_log_prob(every, rows, self._spacing, self.noise_draws) + log_prior

    def predict_log_proba(self, X: Any) -> Array:
        """``log p(class | x)``, calibrated: (N, classes), float64.

        That is ``log softmax((log p(x | class) + log p(class)) / temperature_)``.
        """
        joint = self.predict_joint_log_proba(X) / self.temperature_
        joint -= joint.max(1, keepdims=True)
        found: Array = joint - np.log(np.exp(joint).sum(1, keepdims=True))
        return found

    def predict_proba(self, X: Any) -> Array:
        """``p(class | x)``, calibrated: (N, classes), float64, rows adding up to 1."""
        found: Array = np.exp(self.predict_log_proba(X))
        return found

    def predict(self, X: Any) -> Array:
        """The most probable class of each row: (N,).

        It is the argmax of :meth:`predict_proba` and of :meth:`predict_joint_log_proba` alike: a
        temperature changes how sure a prediction is, and never which class it is.
        """
        best = self.predict_joint_log_proba(X).argmax(1)
        found: Array = self.classes_[best]
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the rows' weight whose class is predicted.

        ValueError for masked labels, and for weights that are not one a row, finite and not
        negative.
        """
        refuse_masked("y", y)
        weights = checked_weights("sample_weight", sample_weight, len(y))
        return float(super().score(X, y, weights))

    def decision_function(self, X: Any) -> Array:
        """:meth:`predict_joint_log_proba`; for two classes, the second's less the first's: (N,).

        These are not divided by the temperature: they are densities in nats.
        """
        joint = self.predict_joint_log_proba(X)
        return joint[:, 1] - joint[:, 0] if joint.shape[1] == 2 else joint

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "_densities" in state:
            state["_densities"] = [density.state() for density in state["_densities"]]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"class_weight": None, "calibrate": True} | dict(state)  # 0.1.0 had none
        if "_densities" in state:
            state.setdefault("temperature_", 1.0)
        if "_noisy" in state:  # pickled by 0.1.0: numbers of the columns of integers
            state["_spacing"] = spacings_of(state.pop("_noisy"), len(state["_kept"]))
            state["spacings_"] = spacings_of(state["integer_columns_"], state["n_features_in_"])
        if "_densities" in state:
            state["_densities"] = [
                FittedFlow.from_state(s, state["device"])
                if "model" in s
                else FittedGaussian.from_state(s)
                for s in state["_densities"]
            ]
        super().__setstate__(state)
