"""Data sets, by name or out of any readable file, in a fixed train / validation / test split.

To add a named data set, write a function that makes a :class:`Dataset` of the paths of its files
and enter a :class:`Source` in ``DATASETS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_path
from ..spacing import column_spacings
from . import sources
from .header import Header
from .readers import has_format, read
from .sources import Entry, Source, entry_of, not_found, paths_in, roots
from .toys import TOYS, toy

MAX_LEVELS = 2**16
MIN_ROWS = 20
TOY_ROWS = 20_000
SPLITS = {  # images for training, validation (the last ones of the training files) and test
    "mnist": (50_000, 10_000, 10_000),
    "fashion-mnist": (50_000, 10_000, 10_000),
    "cifar10": (40_000, 10_000, 10_000),
    "svhn": (63_257, 10_000, 26_032),
}
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Dataset:
    """Rows of one data set, split once and for all.

    Attributes:
        name: what the data set is called.
        levels: ``k``, where the rows hold integers 0 .. k-1 that are to be dequantised; ``None``
            for a table of other integers and for continuous data.
        train, validation, test: tensors (N, \\*event_shape); uint8 (int32 where k > 256) for
            k-level data, int32 for a table of integers, float32 for continuous data; float64 where
            float32 would round values and columns of them have a spacing.
        weights: None, or a weight at least 0 for each row of training and of validation, (N,)
            floating-point tensors: a fit then maximises ``sum_i w_i log p(x_i) / N``, and chooses
            the epoch by the weighted mean over the validation rows.
    """

    name: str
    levels: int | None
    train: Tensor
    validation: Tensor
    test: Tensor
    weights: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one row, such as (1, 8, 8) for an image or (D,) for a vector."""
        return tuple(self.train.shape[1:])

    @property
    def features(self) -> int:
        """D, the number of values in one row."""
        return self.train[0].numel()

    @property
    def discrete(self) -> bool:
        """Whether the rows are integers, which need noise before a density is fitted to them."""
        return not self.train.is_floating_point()


def load_data(
    source: str | Path,
    data_dir: str | Path | None = None,
    download: bool = False,
    header: Header = "auto",
) -> Dataset:
    """Load a data set by its name, or from the path of any file that :func:`readers.read` reads.

    Named sets have their official split. Another file has two or more dimensions, rows first, and
    is split by :func:`split_rows`. Its floating-point values stay as they are (float32; float64
    where that would round them and columns have a spacing, as
    :func:`nicefast.spacing.column_spacings` finds it); integers from 0 to less than 65,536 are
    levels, ``k = max + 1``, and bools two levels; other integers, and tables in which a column has
    a spacing above 1, are a table of integers (int32, ``levels=None``).

    Args:
        source: a name in ``DATASETS``, or a path.
        data_dir: where a named set's files lie, directly or in a folder of its name. Default: the
            folders in the environment variable ``NICEFAST_DATA`` (between ``os.pathsep``), else
            ``./data`` and ``/usr/share/datasets``.
        download: get the files that are missing, into a folder of the set's name in the first of
            these folders; their MD5 is checked. Nothing is downloaded otherwise.
        header: of a ``.csv`` file, as :func:`readers.read` takes it.

    Raises:
        ValueError: unknown name; files that are missing, or are not what they should be; a
            download that fails; values that are not finite in float32, integers beyond int32 or
            all the same; too few rows or features.
        ImportError: a library that the data need is missing; the message says what to install.

    >>> data = load_data("digits")
    >>> data.levels, data.event_shape, len(data.train), len(data.validation), len(data.test)
    (17, (1, 8, 8), 1258, 180, 359)
    """
    check_path("source", source)
    if data_dir is not None:
        check_path("data_dir", data_dir)
    name = str(source)
    if name in DATASETS:
        known = DATASETS[name]
        entry = entry_of(name, known, data_dir)
        if known.files and not entry.found and download and known.remote:
            sources.download(known, roots(data_dir)[0] / name)
            entry = entry_of(name, known, data_dir)
        if known.files and not entry.found:
            raise ValueError(not_found(entry))
        paths = [] if entry.place is None else paths_in(known, entry.place)
        return known.load(name, [path for path in paths if path is not None])
    path = Path(source)
    if not (path.exists() or has_format(path)):
        names = ", ".join(DATASETS)
        raise ValueError(f"data must be one of {names}, or the path of a file, got {name!r}")
    return _split(path.stem, *_rows(path, read(path, header=header).values))


def inventory(data_dir: str | Path | None = None) -> list[Entry]:
    """Every named data set: what it is, and whether :func:`load_data` finds it.

    Looks for files and opens none. ``data_dir`` as in :func:`load_data`.

    >>> [entry.name for entry in inventory()][:3]
    ['digits', 'mnist', 'fashion-mnist']
    """
    return [entry_of(name, source, data_dir) for name, source in DATASETS.items()]


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


def _digits(name: str, _: Sequence[Path]) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "data 'digits' needs scikit-learn: pip install 'nicefast[train]'"
        raise ImportError(message) from error
    images = torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)
    return Dataset(name, 17, *(images[rows] for rows in split_rows(len(images))))


def _table(name: str, paths: Sequence[Path]) -> Dataset:
    """One file's rows, split by :func:`split_rows`."""
    return _split(name, *_rows(paths[0], read(paths[0]).values))


def _split(name: str, values: Tensor, levels: int | None) -> Dataset:
    return Dataset(name, levels, *(values[rows] for rows in split_rows(len(values))))


def _integer_table(name: str, paths: Sequence[Path]) -> Dataset:
    """As :func:`_table`, where ADBench's own file has the integers as floats."""
    values = read(paths[0]).values
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if not (whole == values).all():
            raise ValueError(f"{paths[0]}: expected whole numbers in {name!r}")
        values = whole.astype(np.int64)
    rows, levels = _rows(paths[0], values)
    return Dataset(name, levels, *(rows[part] for part in split_rows(len(rows))))


def _rows(path: Path, values: _Array) -> tuple[Tensor, int | None]:
    if values.ndim < 2 or len(values) < MIN_ROWS or values[0].size < 2:
        raise ValueError(
            f"{path}: expected shape (rows, features...) with at least {MIN_ROWS} rows "
            f"and 2 features, got {values.shape}"
        )
    if values.dtype.kind == "b":
        return _tensor(values, np.uint8), 2
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            floats = _tensor(values, np.float32)
        if not (floats.min().isfinite() and floats.max().isfinite()):
            raise ValueError(f"{path}: holds values that are not finite in float32")
        if not np.array_equal(floats.numpy(), values) and column_spacings(values).any():
            return _tensor(values, np.float64), None
        return floats, None

    low, high = int(values.min()), int(values.max())
    if low == high:
        raise ValueError(f"{path}: expected integers that differ, got {low} everywhere")
    scaled = values.ndim == 2 and (column_spacings(values) > 1).any()
    if low >= 0 and high < MAX_LEVELS and not scaled:
        return _tensor(values, np.uint8 if high < 256 else np.int32), high + 1
    if not -(2**31) <= low <= high < 2**31:
        raise ValueError(f"{path}: expected 32-bit integers, got values from {low} to {high}")
    return _tensor(values, np.int32), None


def _tensor(values: _Array, dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.require(values, dtype, ["C", "W"]))


def _images(path: Path, event_shape: tuple[int, ...]) -> Tensor:
    """8-bit images (N, height, width) or (N, channels, height, width), as (N, \\*event_shape)."""
    values, ends = read(path).values, (event_shape, event_shape[1:])
    if values.dtype != np.uint8 or values.shape[1:] not in ends or values.ndim < 3:
        raise ValueError(
            f"{path}: expected 8-bit images of shape {event_shape}, "
            f"got an array {values.shape} of {values.dtype}"
        )
    return _tensor(values, np.uint8).view(-1, *event_shape)


def _official(
    name: str, paths: Sequence[Path], test_path: Path, event_shape: tuple[int, ...]
) -> Dataset:
    """The training files' images but for the last ones, these, and the test file's."""
    train, validation, test = SPLITS[name]
    images = torch.cat([_images(path, event_shape) for path in paths])
    held_out = _images(test_path, event_shape)
    for path, found, expected in (
        (paths[0], len(images), train + validation),
        (test_path, len(held_out), test),
    ):
        if found != expected:
            part = "training" if path is paths[0] else "test"
            raise ValueError(f"{path}: expected {expected} {part} images of {name!r}, got {found}")
    return Dataset(name, 256, images[:train], images[train:], held_out)


# The first training labels: the one thing that tells two sets of the same form apart at once.
_FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
}


def _mnist(name: str, paths: Sequence[Path]) -> Dataset:
    first = read(paths[1]).values[:10].tolist()
    for other, labels in _FIRST_LABELS.items():
        if other != name and first == labels:
            raise ValueError(f"{paths[1]}: expected the labels of {name!r}, got those of {other!r}")
    return _official(name, paths[:1], paths[2], (1, 28, 28))


def _cifar10(name: str, paths: Sequence[Path]) -> Dataset:
    return _official(name, paths[:5], paths[5], (3, 32, 32))


def _svhn(name: str, paths: Sequence[Path]) -> Dataset:
    return _official(name, paths[:1], paths[1], (3, 32, 32))


def _tfd(name: str, paths: Sequence[Path]) -> Dataset:
    """Fold 0: unlabelled (0) and training (1) images, validation (2), test (3)."""
    path, images = paths[0], _images(paths[0], (1, 48, 48))
    folds = read(path, key="folds").values
    if folds.ndim != 2 or len(folds) != len(images) or not np.isin(folds[:, 0], range(4)).all():
        raise ValueError(
            f"{path}: expected 'folds' of shape ({len(images)}, folds) with 0 .. 3 in column 0, "
            f"got shape {folds.shape}, values from {folds.min()} to {folds.max()}"
        )
    fold = torch.from_numpy(folds[:, 0].astype(np.int64))
    parts = images[fold <= 1], images[fold == 2], images[fold == 3]
    if not all(map(len, parts)):
        counts = torch.bincount(fold, minlength=4).tolist()
        raise ValueError(f"{path}: expected images in fold 0's three parts, got {counts} of 0 .. 3")
    return Dataset(name, 256, *parts)


_PARTS = (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))
_MNIST_FILES = tuple(
    (f"{part}-idx{n}-ubyte", f"{part}-idx{n}-ubyte.gz", f"{part}.idx{n}-ubyte")
    for part, n in _PARTS
)


def _mnist_remote(place: str, *digests: str) -> tuple[tuple[str, str], ...]:
    urls = (place + names[1] for names in _MNIST_FILES)
    return tuple(zip(urls, digests, strict=True))


_CIFAR10 = "https://www.cs.toronto.edu/~kriz/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_ADBENCH = "From ADBench (BSD-2-Clause), after UCI: github.com/Minqi824/ADBench, {}"


def _toy(name: str, _: Sequence[Path]) -> Dataset:
    rows = toy(name, TOY_ROWS, seed=0)
    return Dataset(name, None, *(rows[part] for part in split_rows(len(rows))))


DATASETS: dict[str, Source] = {
    "digits": Source(
        "1,797 handwritten digits, 8x8, 17 levels",
        "UCI's optical digits, part of scikit-learn: pip install 'nicefast[train]'",
        _digits,
        package="sklearn",
    ),
    "mnist": Source(
        "70,000 handwritten digits, 28x28, 256 levels",
        "LeCun, Cortes and Burges; CC BY-SA 3.0",
        _mnist,
        _MNIST_FILES,
        ("MNIST/raw",),
        _mnist_remote(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": Source(
        "70,000 pictures of clothes, 28x28, 256 levels",
        "Zalando (Xiao, Rasul and Vollgraf 2017), MIT licence; Debian: dataset-fashion-mnist",
        _mnist,
        _MNIST_FILES,
        ("FashionMNIST/raw",),
        _mnist_remote(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": Source(
        "60,000 colour photographs of ten kinds, 32x32, 256 levels",
        "Krizhevsky 2009, binary version; no licence stated",
        _cifar10,
        (*((f"data_batch_{n}.bin",) for n in range(1, 6)), ("test_batch.bin",)),
        ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
        ((_CIFAR10 + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
    ),
    "svhn": Source(
        "99,289 house numbers, cropped to 32x32 in colour, 256 levels",
        "Netzer et al. 2011; for non-commercial use",
        _svhn,
        (("train_32x32.mat",), ("test_32x32.mat",)),
        (),
        (
            (_SVHN + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            (_SVHN + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    "tfd": Source(
        "Toronto Face Database, 48x48, 256 levels; the first of its five folds",
        "Given out on request only, by its authors (Susskind, Anderson and Hinton 2010)",
        _tfd,
        (("TFD_48x48.mat", "TFD_ranzato_48x48.mat"),),
        ("TFD",),
    ),
    "cover": Source(
        "Forest cover, 286,048 rows of 10 integers",
        _ADBENCH.format("10_cover.npz"),
        _integer_table,
        (("adbench_cover.npz", "10_cover.npz"),),
        ("tabular", "adbench"),
    ),
    "shuttle": Source(
        "Shuttle, 49,097 rows of 9 integers",
        _ADBENCH.format("32_shuttle.npz"),
        _integer_table,
        (("adbench_shuttle.npz", "32_shuttle.npz"),),
        ("tabular", "adbench"),
    ),
    "magic-gamma": Source(
        "Gamma telescope, 19,020 rows of 10 real values",
        _ADBENCH.format("22_magic.gamma.npz"),
        _table,
        (("adbench_magic_gamma.npz", "22_magic.gamma.npz"),),
        ("tabular", "adbench"),
    ),
}
DATASETS |= {
    name: Source(f"{TOY_ROWS:,} points in the plane", "drawn from a density that is known", _toy)
    for name in TOYS
}
