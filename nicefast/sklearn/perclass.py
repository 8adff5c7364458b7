"""One density for each class: fitted in turn, with what is constant or singular refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import check_random_state

from ..checks import check_choice
from .columns import Array, Columns, constant_columns, labels, moments, with_noise
from .fitted import SEEDS, FittedGaussian, RawDensity, fit_flow

DECAY_ROWS, MOST_DECAY = 3000, 30.0  # of weight_decay="auto"


class PerClass(NamedTuple):
    """The classes' densities, the rows that none was trained on, the most epochs that one took."""

    densities: list[RawDensity]
    held: Array
    epochs: int


def fit_classes(
    rows: Array,
    number: Array,
    classes: Array,
    columns: Columns,
    options: dict[str, Any],
    weights: Array | None = None,
    validation: Sequence[tuple[Array, Array | None] | None] = (),
    names: Array | None = None,
) -> PerClass:
    """Fit ``options["density"]`` to the rows of each class.

    Args:
        rows: (N, D), float64, of all columns.
        number: (N,), of each row's class.
        classes: (K,), the labels, for messages.
        columns: which of the D columns are fitted, with what noise.
        options: the classifier's hyperparameters, by name.
        weights: (N,), above zero; None for equal ones.
        validation: for each class, its validation rows and their weights, or None.
        names: of the columns, for messages.

    Raises:
        ValueError: a column of real values that is constant within a class, for a flow; a singular
            covariance, for a Gaussian; and as :func:`fit_flow` does.
    """
    kept, _, spacing = columns
    real = kept[spacing == 0]
    random = check_random_state(options["random_state"])
    ridge = options["reg"] * moments(with_noise(rows[:, kept], spacing), weights)[1]
    densities: list[RawDensity] = []
    held, epochs = [np.empty(0, np.intp)], 1
    for k, (name, part) in enumerate(zip(classes, validation, strict=True)):
        members = np.flatnonzero(number == k)
        own, counted = rows[members], None if weights is None else weights[members]
        seed = int(random.randint(SEEDS))
        if options["density"] == "gaussian":
            try:
                fitted = FittedGaussian.fit(with_noise(own[:, kept], spacing), ridge, counted)
            except ValueError as problem:
                raise ValueError(f"class {name!r}: {problem}; give a larger reg") from None
            densities.append(fitted)
            continue
        within = real[constant_columns(own[:, real])]
        if len(within):
            raise ValueError(
                f"{labels(names)(within[0])} is constant within class {name!r}, where it has no "
                f"density; leave it out, or take density='gaussian'"
            )
        flow, history, apart = fit_flow(
            own[:, kept],
            spacing,
            options | {"weight_decay": decay(options["weight_decay"], len(own))},
            seed,
            f"class {name}",
            counted,
            part and (part[0][:, kept], part[1]),
        )
        densities.append(flow)
        held.append(members[apart])
        epochs = max(epochs, len(history.epochs))
    return PerClass(densities, np.concatenate(held), epochs)


def decay(weight_decay: Any, rows: int) -> Any:
    """``"auto"`` as a number: 3000 / rows, within 1 and 30; anything else as it is.

    ValueError for another word.

    >>> decay("auto", 50), decay("auto", 300), decay("auto", 10_000), decay(2.0, 50)
    (30.0, 10.0, 1.0, 2.0)
    """
    if not isinstance(weight_decay, str):
        return weight_decay
    check_choice("weight_decay", weight_decay, ("auto",))
    return min(max(DECAY_ROWS / rows, 1.0), MOST_DECAY)
