"""NICEDensity: a flow where KernelDensity and GaussianMixture would stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ..checks import check_count
from ..flow import NICE
from ..preprocessing import Preprocessing
from .columns import Array, columns_of, unmasked
from .fitted import SEEDS, FittedFlow, fit_flow, mean_log_prob, spacings_of
from .validation import validation_rows
from .weights import checked_weights, weighted_rows


class NICEDensity(DensityMixin, BaseEstimator):
    """Density of the rows of a table by a NICE flow, in nats on the table's own scale.

    Columns that hold nothing but integers, or multiples of another number such as 0.1 or 5, get
    noise: their density is that of ``x + spacing u``, u uniform on [0, 1), which bounds the
    probability of the values from below (plus ``log spacing``). In training the noise is new in
    every epoch. In scoring it is a function of the row's values alone, so that a row's score does
    not depend on the rows beside it; values that are no multiples there are scored as they are.

    Args:
        hidden: widths of each coupling's hidden layers.
        couplings: how many.
        prior: ``"logistic"`` or ``"normal"``.
        partition: as :class:`nicefast.NICE` takes it.
        activation: of the hidden layers.
        dropout: share of hidden units dropped in training.
        epochs: at most so many passes over the rows.
        patience: epochs without a better validation score before stopping; the best epoch's
            weights are kept.
        batch_size: rows in a step.
        lr: the learning rate, of AdamW.
        weight_decay: decoupled, on weight matrices.
        validation_fraction: share of the rows that decide on the best epoch and are not trained
            on. With 0, or fewer than 20 rows, the training rows do. Where fit is given
            ``validation_data``, this is not looked at.
        standardise: give every column mean 0 and standard deviation 1 first (those of all rows).
        drop_constant: leave constant columns out, see ``dropped_``; otherwise they are an error.
        dequantise: which columns get noise: ``"auto"`` (those to which
            :func:`nicefast.spacing.column_spacings` gives a spacing), True (all: an error where one
            is real) or False.
        noise_draws: a row's score is the mean over so many draws of its noise.
        random_state: None, an integer or a RandomState: of weights, shuffling, split and noise.
        device: where the flow is, ``"cuda"`` for a GPU; None for the CPU. Pickled on a GPU, it is
            on the CPU where there is none.
        dtype: of scoring and sampling: ``"float64"``, where a row's score is the same to 1e-10
            whatever rows are beside it, or ``"float32"``, to 1e-5 and several times faster.
            Training is float32.
        verbose: 0 for silence; 1 to print a line for the first epoch, each tenth and the end; 2 for
            a line after each epoch. False is 0 and True is 1.

    Attributes:
        model_: :class:`nicefast.NICE`, of preprocessed rows of the columns that were kept.
        preprocessing_: from these columns to what the model sees.
        n_features_in_, feature_names_in_: of X in fit; names where all are strings.
        dropped_: constant columns that were left out, by name where X had names, else by number.
        integer_columns_: numbers of the columns that get noise.
        spacings_: (n_features_in_,), the width of each column's noise: 1 for integers, 0 for none.
        n_iter_: epochs taken.
        validation_scores_: after each of them, mean log-density in nats of the validation rows.

    Raises:
        ValueError: in fit, for X of fewer than two rows or columns, with NaN or infinite values
            or constant columns (named), for weights that are not one a row, finite and not
            negative, for ``validation_data`` of other columns, and for hyperparameters that are
            not as above; in all other methods, for X of other columns.
        sklearn.exceptions.NotFittedError: before fit.
        FloatingPointError: the likelihood ceased to be finite: try a smaller ``lr``.

    Pickling keeps the model and the preprocessing as the bytes of safetensors files.

    >>> from sklearn.datasets import load_iris
    >>> x = load_iris().data
    >>> density = NICEDensity(hidden=(16,), couplings=2, epochs=3, random_state=0).fit(x)
    >>> density.score_samples(x).shape, density.sample(2, random_state=0).shape
    ((150,), (2, 4))
    """

    def __init__(
        self,
        *,
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
        self, X: Any, y: Any = None, sample_weight: Any = None, *, validation_data: Any = None
    ) -> NICEDensity:
        """Fit to the rows of X (N, D), array or data frame; ``y`` is not looked at.

        With ``sample_weight`` w (N,) the objective is ``sum_i w_i log p(x_i) / sum_i w_i``, over
        the training rows, and over the validation rows where the epoch is chosen: a weight of 2
        does what the row twice would do, and a row of weight 0 has no influence on anything.

        ``validation_data``, X or ``(X, y)`` or ``(X, y, sample_weight)`` with a y that is not
        looked at, chooses the epoch instead of a random share of the rows, all of which are then
        trained on. It is an argument of fit since it is data: ``clone`` and searches handle
        parameters. A Pipeline does not transform it unless it is told to (``transform_input``).
        """
        rows = validate_data(
            self, unmasked(X), dtype=np.float64, ensure_min_samples=2, ensure_min_features=2
        )
        weights = checked_weights("sample_weight", sample_weight, len(rows))
        validation = validation_rows(self, validation_data)
        seen = weighted_rows(weights)
        rows, weights = rows[seen], None if weights is None else weights[seen]
        names = getattr(self, "feature_names_in_", None)
        kept, constant, spacing = columns_of(rows, names, self.drop_constant, self.dequantise, 2)
        seed = int(check_random_state(self.random_state).randint(SEEDS))
        self._flow, history, _ = fit_flow(
            rows[:, kept],
            spacing,
            self.get_params(),
            seed,
            weights=weights,
            validation=validation and (validation.rows[:, kept], validation.weights),
        )
        self._kept, self._constants = kept, rows[0, constant]
        self.dropped_ = getattr(self, "feature_names_in_", np.arange(rows.shape[1]))[constant]
        self.integer_columns_ = kept[np.flatnonzero(spacing)]
        self.spacings_ = np.zeros(rows.shape[1])
        self.spacings_[kept] = spacing
        self.n_iter_ = len(history.epochs)
        _, log_det = self._flow.columns.exact(torch.from_numpy(rows[:1, kept]))
        self.validation_scores_ = np.array([e.validation for e in history.epochs]) + log_det.item()
        return self

    def score_samples(self, X: Any) -> Array:
        """Log-density of each row of X, in nats on X's own scale: (N,), float64."""
        check_is_fitted(self)
        rows = validate_data(self, unmasked(X), dtype=np.float64, reset=False)[:, self._kept]
        spacing = np.array(self._flow.columns.spacing or np.zeros(rows.shape[1]))
        return mean_log_prob(self._flow.log_prob, rows, spacing, self.noise_draws)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-density of the rows of X, by their weights, in nats, as GaussianMixture has it.

        KernelDensity's ``score`` is the sum over rows, which depends on how many there are.
        """
        scores = self.score_samples(X)
        weights = checked_weights("sample_weight", sample_weight, len(scores))
        return float(np.average(scores, weights=weights))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """``n_samples`` draws, (n_samples, D), float64, on X's own scale.

        Columns that get noise hold multiples of their spacing, which may lie beyond those seen in
        fit; dropped columns hold their constants. ValueError for a negative ``n_samples``.
        """
        check_is_fitted(self)
        n_samples = check_count("n_samples", n_samples)
        seed = int(check_random_state(random_state).randint(SEEDS))
        drawn = self._flow.sample(n_samples, seed)
        rows = np.empty((n_samples, self.n_features_in_))
        rows[:, self._kept] = drawn
        rows[:, np.setdiff1d(np.arange(self.n_features_in_), self._kept)] = self._constants
        return rows

    @property
    def model_(self) -> NICE:
        check_is_fitted(self)
        return self._flow.model

    @property
    def preprocessing_(self) -> Preprocessing:
        check_is_fitted(self)
        return self._flow.columns

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_flow")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "_flow" in state:
            state["_flow"] = state["_flow"].state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_flow" in state:
            if "spacings_" not in state:  # pickled by 0.1.0
                state["spacings_"] = spacings_of(state["integer_columns_"], state["n_features_in_"])
            state["_flow"] = FittedFlow.from_state(state["_flow"], state["device"])
        super().__setstate__(state)
