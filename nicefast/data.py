"""Named data sets: integer levels or real values, in a fixed train / validation / test split.

To add a data set, write a function that returns its values and its number of levels and enter it
in ``DATASETS``.
"""

from __future__ import annotations

import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_LEVELS = 2**16
MIN_ROWS = 20


@dataclass(frozen=True)
class Dataset:
    """Rows of one data set, split once and for all.

    Attributes:
        name: what the data set is called.
        levels: ``k``, where the rows hold integers 0 .. k-1 that are to be dequantised; ``None``
            for continuous data.
        train, validation, test: tensors (N, \\*event_shape); uint8 (int32 where k > 256) for
            k-level data, float32 for continuous data.
    """

    name: str
    levels: int | None
    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row, such as (1, 8, 8) for an image or (D,) for a vector."""
        return tuple(self.train.shape[1:])

    @property
    def features(self) -> int:
        """D, the number of values in one row."""
        return self.train[0].numel()


def load_data(source: str | Path) -> Dataset:
    """Load a data set by its name, or from a path to a ``.npy`` file.

    A ``.npy`` array has two or more dimensions, rows first. Floating-point values are continuous
    data and stay as they are (float32); integers and bools are levels, ``k = max + 1``. Files
    that hold Python objects are refused, never unpickled.

    Raises:
        ValueError: unknown name; a file that is missing, truncated, of a non-numeric dtype, with
            non-finite values, negative levels, or too few rows, features or levels.
        ImportError: the data set's own library is missing; the message says what to install.

    >>> data = load_data("digits")
    >>> data.levels, data.event_shape, len(data.train), len(data.validation), len(data.test)
    (17, (1, 8, 8), 1258, 180, 359)
    """
    if str(source) in DATASETS:
        name, (values, levels) = str(source), DATASETS[str(source)]()
    elif Path(source).suffix == ".npy":
        name, (values, levels) = Path(source).stem, _read_npy(Path(source))
    else:
        known = ", ".join(DATASETS)
        raise ValueError(f"data must be one of {known}, or the path of a .npy file, got {source!r}")
    train, validation, test = (values[rows] for rows in split_rows(len(values)))
    return Dataset(name, levels, train, validation, test)


def split_rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers (int64) of the training, validation and test rows: 70, 10 and 20 per cent.

    The same ``count`` always gives the same split. Raises ValueError below 20 rows.

    >>> [len(rows) for rows in split_rows(100)]
    [70, 10, 20]
    """
    if count < MIN_ROWS:
        raise ValueError(f"a data set needs at least {MIN_ROWS} rows to be split, got {count}")
    # RandomState, because NumPy promises that its stream never changes.
    order = torch.from_numpy(np.random.RandomState(0).permutation(count).astype(np.int64))
    validation, test = round(0.1 * count), round(0.2 * count)
    train = count - validation - test
    return order[:train], order[train : train + validation], order[train + validation :]


def dequantise(levels: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform dequantisation: ``(level + u) / k`` with ``u ~ U[0, 1)``, float32 in [0, 1).

    A density ``p`` of the result bounds the probability of the levels from below:
    ``E_u[log p((level + u) / k)] - D log k <= log P(level)``, in nats.

    Args:
        levels: (N, ...), integers 0 .. k-1.
        k: number of levels.
        generator: source of ``u``, on the device of ``levels``.

    Raises:
        TypeError: ``levels`` is not of an integer dtype.
        ValueError: a level lies outside 0 .. k-1.

    >>> x = dequantise(torch.tensor([[0, 16]], dtype=torch.uint8), 17)
    >>> bool(x[0, 0] < 1 / 17), bool(16 / 17 <= x[0, 1] < 1)
    (True, True)
    """
    if levels.is_floating_point() or levels.is_complex():
        raise TypeError(f"levels must be integers, got dtype {levels.dtype}")
    if levels.numel():
        # As Python integers: a comparison in uint8 would take k = 256 for 0.
        low, high = int(levels.min()), int(levels.max())
        if not 0 <= low <= high < k:
            raise ValueError(f"levels must lie in 0 .. {k - 1}, got values from {low} to {high}")
    u = torch.rand(levels.shape, generator=generator, device=levels.device)
    # level + u may round up to level + 1, and k / k would fall outside [0, 1).
    return (levels + u).div_(k).clamp_(max=1 - 2**-24)


def _digits() -> tuple[Tensor, int]:
    """The 1,797 8x8 images of scikit-learn's ``load_digits``, levels 0 .. 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "data 'digits' needs scikit-learn: pip install 'nicefast[train]'"
        raise ImportError(message) from error
    images = load_digits().images.astype(np.uint8)
    return torch.from_numpy(images).unsqueeze(1), 17


DATASETS: dict[str, Callable[[], tuple[Tensor, int | None]]] = {"digits": _digits}


def _read_npy(path: Path) -> tuple[Tensor, int | None]:
    try:
        # open_memmap reads no pickles and no archives, and checks the length before it allocates.
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, OverflowError, SyntaxError, tokenize.TokenError) as why:
        raise ValueError(f"{path}: not a readable .npy file, or truncated ({why})") from None

    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected a real or integer dtype, got {array.dtype}")
    if array.ndim < 2 or len(array) < MIN_ROWS or array[0].size < 2:
        raise ValueError(
            f"{path}: expected shape (rows, features...) with at least {MIN_ROWS} rows "
            f"and 2 features, got {array.shape}"
        )
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: holds values that are not finite in float32")
        return torch.from_numpy(values), None

    low, levels = int(array.min()), int(array.max()) + 1
    if low < 0 or not 2 <= levels <= MAX_LEVELS:
        raise ValueError(
            f"{path}: expected integer levels 0 .. k-1 with k from 2 to {MAX_LEVELS}, "
            f"got values from {low} to {levels - 1}"
        )
    return torch.from_numpy(array.astype(np.uint8 if levels <= 256 else np.int32)), levels
