"""Columns of a table: which hold integers, which are constant, and the noise of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import functional
from ..checks import filled
from ..preprocessing import Preprocessing, Standardise

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST = float(1 << 40)  # magnitude of integers: beyond, float64 has too few digits for noise
NOISE_VARIANCE = 1 / 12  # of u uniform on [0, 1), whose mean is 1/2
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Columns(Preprocessing):
    """Preprocessing of a table some of whose columns hold integers.

    Attributes:
        noisy: the columns to whose values :meth:`forward` adds u, uniform on [0, 1), before the
            steps: entry (i, d) depends on seed, ``row_offset + i`` and d alone.

    >>> steps = Columns.standardising(np.array([[0.0, 0.5], [2.0, 1.5]]), [0])
    >>> x, _ = steps.forward(torch.tensor([[0.0, 0.5]], dtype=torch.float64), seed=1)
    >>> bool(0 <= steps.inverse(x.double())[0, 0] < 1), x[0, 1].item()
    (True, -1.0)
    """

    noisy: tuple[int, ...] = ()

    @classmethod
    def standardising(cls, rows: Array, noisy: Sequence[int] | Array) -> Columns:
        """Each column of ``rows + u`` to mean 0 and standard deviation 1, u's part being exact."""
        mean, variance = rows.mean(0), rows.var(0)
        mean[noisy] += 0.5
        variance[noisy] += NOISE_VARIANCE
        step = Standardise(torch.from_numpy(mean), torch.from_numpy(np.sqrt(variance)))
        return cls((step,), tuple(int(c) for c in noisy))

    def forward(self, raw: Tensor, seed: int = 0, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        if self.noisy:
            zeros = torch.zeros((len(raw), len(self.noisy)), dtype=torch.uint8, device=raw.device)
            noise = functional.dequantise(zeros, None, seed=seed, row_offset=row_offset)
            raw = raw.clone()
            raw[:, list(self.noisy)] += noise.to(raw.dtype)
        return super().forward(raw, seed, row_offset)

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Steps alone, without noise, in the dtype of ``x``: ``(y, log_det)``."""
        return self._flat(x, 0, 0)


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


def integer_columns(rows: Array, dequantise: str | bool, label: Callable[[int], str]) -> Array:
    """Ascending numbers of the columns that get noise.

    Args:
        rows: (N, D), float64.
        dequantise: ``"auto"``: those that hold nothing but integers; True: all; False: none.
        label: how a column is called.

    Raises:
        ValueError: another ``dequantise``; True, and a column that holds other values.
    """
    if not isinstance(dequantise, bool | np.bool_) and dequantise != "auto":
        raise ValueError(f"dequantise must be 'auto', True or False, got {dequantise!r}")
    whole = ((rows == np.floor(rows)) & (np.abs(rows) <= LARGEST)).all(0)
    if not isinstance(dequantise, str):
        if dequantise and not whole.all():
            column = int(np.argmin(whole))
            values = rows[:, column]
            wrong = values[(values != np.floor(values)) | (np.abs(values) > LARGEST)][0]
            raise ValueError(
                f"dequantise=True needs integers in every column, got {wrong:g} in {label(column)}"
            )
        whole[:] = dequantise
    return np.flatnonzero(whole)


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


def with_noise(rows: Array, columns: Sequence[int] | Array, draw: int = 0) -> Array:
    """``rows`` (N, D, float64) with u, uniform on [0, 1), added to the integers in ``columns``.

    u is a function of the row's values, the column and ``draw``: a row has the same noise
    whatever rows are beside it. Values that are no integers stay as they are, so that rows which
    have their noise already are not given more.

    >>> x = np.array([[1.0, 2.0], [1.5, 2.5]])
    >>> y = with_noise(x, [0])
    >>> bool(1 < y[0, 0] < 2), y[1, 0], y[:, 1]
    (True, np.float64(1.5), array([2. , 2.5]))
    """
    if not len(columns):
        return rows
    bits = np.ascontiguousarray(rows + 0.0).view(np.uint64)  # + 0.0: -0.0 is 0.0
    state = np.full(len(rows), np.uint64(draw))
    for column in bits.T:
        state = _mixed((state + _GOLDEN) ^ column)
    numbers = np.arange(1, len(columns) + 1, dtype=np.uint64) * _GOLDEN
    u = (_mixed(state[:, None] + numbers) >> np.uint64(40)) * 2.0**-24
    found = rows.copy()
    chosen = rows[:, columns]
    found[:, columns] = chosen + np.where(chosen == np.floor(chosen), u, 0.0)
    return found


def _mixed(x: Array) -> Array:
    """SplitMix64's output function: every bit of ``x`` changes half of the bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
