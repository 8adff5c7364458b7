"""Tables to score: files larger than memory, arrays, iterables, in blocks of rows of one size.

base       blocks of an exact size out of parts of any
selection  which columns, by name or position
files      which files; fingerprints, reading, errors that name the file
arrays     .npy, .npz, IDX, HDF5;  columnar  Parquet, Arrow;  text  CSV;  memory  the rest
messages   where the record batches of an Arrow file are
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...data.errors import FileFormatError
from ...data.header import Header, said_header
from . import arrays
from .base import Block, Columns, Part, Table
from .columnar import Arrow, Parquet
from .files import Untouched, expand, fingerprint, guarded, kind_of
from .memory import Held, Iterated
from .selection import Wanted, listed
from .text import CSV

__all__ = ["Block", "Table", "open_table"]

_PARTS: dict[str, Callable[[Path, str | None, Wanted], Part]] = {
    ".npy": arrays.npy,
    ".npz": arrays.npz,
    ".bin": arrays.other,
    ".mat": arrays.other,
    "IDX": arrays.idx,
    "HDF5": arrays.hdf5,
    "Parquet": Parquet,
    "Arrow": Arrow,
    ".csv": CSV,
}


def open_table(
    source: Any,
    columns: Columns | None = None,
    keys: Columns = (),
    event_shape: Sequence[int] | None = None,
    header: Header = "auto",
) -> Table:
    """A table of ``source``'s rows, of which nothing is held in memory but what is read at a time.

    ============== ================================================================================
    .npy           by rows, whether rows or columns come first in it
    .npz           ``X``, ``x_train``, the only array, or ``file.npz::name``; as .npy where it is
                   stored, else decompressed as it is read (whole where columns come first)
    Parquet        by row groups; a folder means all ``.parquet`` below it, sorted by name
    Arrow, Feather ``.arrow``, ``.feather``, ``.ipc``: files and streams
    .csv           under a header or none; int64 where all values are, else float64
    IDX            any other ending, gzipped or not
    HDF5           ``.h5``, ``.hdf5``: the only dataset of numbers, or ``file.h5::/group/name``;
                   looked at in a process of its own first (a third of a second), which a damaged
                   file may end; virtual and external storage and links to other files are refused
    .mat, .bin     as :func:`nicefast.data.readers.read`, whole
    ============== ================================================================================

    Columns of a file become one array: float32 where all are floats of at most 32 bits, integers
    where all are, otherwise float64 or what holds them; bools are uint8; missing values are NaN,
    with which integers are float64, and so are values that are masked in an array. A column of
    Parquet or Arrow that is alone may hold vectors: lists, lists of a fixed size or tensors of
    numbers, all of one length; one that is missing is all NaN. Values that are not finite are left
    to whoever scores them.
    Several files are one table, in the order given; the first says what columns are called, the
    others have them by name in any order, or in the same number. No file is mapped; one that is
    written to, replaced or cut off after this is an error when its rows are read.

    Args:
        source: a path, a pattern such as ``"rows/*.parquet"``, a folder, a list of these; a NumPy
            array, a tensor, (N, \\*event_shape); a DataLoader or another iterable of such, or of
            tuples or lists that begin with one.
        columns: names or positions (from 0) of the columns with a row's values, in that order; all
            but ``keys`` where it is None.
        keys: of columns to be carried over as they are: of Parquet, Arrow and CSV files. In CSV
            they are text; without a header they are called ``column_0`` ...
        event_shape: of a row; checked, and flattened.
        header: whether the first line of CSV files is one: True, False or "auto", which is decided
            by :func:`nicefast.data.header.is_header`; of no meaning for other sources.

    Raises:
        ValueError: no such file, no match, damaged or truncated, of an unknown format; what would
            take 256 MiB and 256 times the file's size of memory at once; a missing or
            ambiguous column, one that is no number; rows of another width than ``event_shape`` or
            than in the first file. The message begins with the file or with ``source``.
        TypeError: a source, column or item of an iterable of the wrong type; a data frame, which
            is given as ``df.to_numpy()``.
        ImportError: Parquet, Arrow or CSV without pyarrow, HDF5 without h5py.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "rows.csv"
    >>> _ = file.write_text("id,a,b\\nx,1,2\\ny,3,4\\nz,5,6\\n")
    >>> table = open_table(file, keys=["id"])
    >>> table.names, table.keys, str(table.dtype)
    (('a', 'b'), ('id',), 'int64')
    >>> [(block.values.tolist(), block.keys["id"].to_pylist()) for block in table.blocks(2)]
    [([[1, 2], [3, 4]], ['x', 'y']), ([[5, 6]], ['z'])]
    """
    chosen = None if columns is None else listed("columns", columns)
    shape = None if event_shape is None else tuple(map(int, event_shape))
    said_header(header)
    wanted = Wanted(chosen, listed("keys", keys), shape, header=header)
    if isinstance(source, np.ndarray | Tensor):
        kind = "array" if isinstance(source, np.ndarray) else "tensor"
        name = f"{kind} of shape {tuple(source.shape)}"
        try:
            part = Held(source, name, wanted)
        except FileFormatError as why:
            raise ValueError(f"source, {name}: {why}") from None
        again = partial(part.fingerprint, chosen)
        return Table(name, [part], again(), fingerprint_now=again)
    if isinstance(source, str | Path) or _is_paths(source):
        return _of_files(source, wanted)
    if way := _of_frames(source):
        kind = f"{type(source).__module__.split('.')[0]} {type(source).__name__}"
        raise TypeError(f"source must be an array, got a {kind}: give {way}, of numeric columns")
    if isinstance(source, Iterable) and not isinstance(source, bytes | dict):
        iterated = Iterated(source, wanted)
        return Table(iterated.name, [iterated], None, seekable=False)
    raise TypeError(
        "source must be a path, a list of paths, an array, a tensor, or an iterable of arrays, "
        f"got {type(source).__name__}"
    )


def _of_frames(source: Any) -> str | None:
    """How a data frame or an Arrow table becomes an array; None for anything else."""
    library = type(source).__module__.split(".")[0]
    if library == "pyarrow" and hasattr(source, "column_names"):
        return "numpy.column_stack([column.to_numpy() for column in table.columns])"
    if library == "polars" and hasattr(source, "collect"):  # a LazyFrame
        return "df.collect().to_numpy()"
    return "df.to_numpy()" if callable(getattr(source, "to_numpy", None)) else None


def _is_paths(source: Any) -> bool:
    if not isinstance(source, list | tuple):
        return False
    paths = [isinstance(one, str | Path) for one in source]
    if any(paths) and not all(paths):
        raise TypeError(f"source: item {paths.index(False)} of a list of paths is none")
    return all(paths)


def _of_files(source: Any, wanted: Wanted) -> Table:
    files = expand(source)
    before = [Untouched(path) for path, _ in files]
    parts: list[Part] = []
    for path, key in files:
        kind = kind_of(path)
        with guarded(path, kind):
            part = _PARTS[kind](path, key, wanted)
            if parts:
                _check_keys(parts[0], part)
        if not parts:
            like = part.name, part.names, part.features
            wanted = wanted._replace(like=like)
        parts.append(part)
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    about = (parts[0].names, wanted.columns, tuple(parts[0].key_types), parts[0].features)
    again = partial(fingerprint, files, about)
    return Table(f"{parts[0].name}{more}", parts, again(), files=before, fingerprint_now=again)


def _check_keys(first: Part, other: Part) -> None:
    for name, kind in first.key_types.items():
        found = other.key_types.get(name)
        if found != kind:
            raise FileFormatError(
                f"key {name!r}: expected {kind} as in {first.name}, found {found}"
            )
