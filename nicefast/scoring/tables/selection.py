"""Which columns are features and which are keys, by name or position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...checks import check_type
from ...data.errors import FileFormatError
from ...data.header import Header
from .base import Array, Columns


class Wanted(NamedTuple):
    """What is asked of every file of a table.

    Attributes:
        columns: names or positions of the features; None: all but the keys.
        keys: of those to carry over.
        event_shape: whose number of values a row must have.
        like: what the first file said: its name, and the names of its features.
        header: whether the first line of a CSV file is one, or "auto".
    """

    columns: tuple[str | int, ...] | None = None
    keys: tuple[str | int, ...] = ()
    event_shape: tuple[int, ...] | None = None
    like: tuple[str, tuple[str, ...] | None, int] | None = None
    header: Header = "auto"


class Selection(NamedTuple):
    """Positions in a file of the features and of the keys."""

    features: tuple[int, ...]
    keys: tuple[int, ...]


def select(
    names: Sequence[str] | None,
    width: int,
    wanted: Wanted,
    count: Callable[[tuple[int, ...]], int] = len,
) -> Selection:
    """Where the wanted columns are among ``width``, called ``names``.

    The first file of several says how positions are called; others have them by these names, in
    any order. ``count`` says how many values a row has in the columns at these positions.

    Raises:
        FileFormatError: a column that is not there, or twice; another number of columns than the
            first file or ``event_shape`` has.

    >>> select(("id", "a", "b"), 3, Wanted(keys=("id",)))
    Selection(features=(1, 2), keys=(0,))
    >>> select(None, 3, Wanted(columns=(2, 0)))
    Selection(features=(2, 0), keys=())
    """
    keys = _positions(names, width, wanted.keys, "keys")
    if wanted.columns is None:
        features = tuple(i for i in range(width) if i not in keys)
    else:
        features = _positions(names, width, wanted.columns, "columns")
    if wanted.like is not None:
        features = _as_in(wanted, names, width, features)
    if names is not None:
        times = Counter(names)
        for i in (*features, *keys):
            if times[names[i]] > 1:
                raise FileFormatError(f"column {names[i]!r} is there {times[names[i]]} times")
    if not features:
        raise FileFormatError("no columns are left for the values of a row")
    check_width(count(features), wanted)
    return Selection(features, keys)


def check_width(features: int, wanted: Wanted) -> None:
    """FileFormatError unless a row has as many values as in the first file and ``event_shape``."""
    if wanted.like is not None and features != wanted.like[2]:
        first, _, number = wanted.like
        raise FileFormatError(f"expected {number} columns as in {first}, found {features}")
    shape = wanted.event_shape
    if shape is not None and math.prod(shape) != features:
        raise FileFormatError(
            f"expected rows of {math.prod(shape)} values, the event shape being {tuple(shape)}, "
            f"found {features}"
        )


def of_array(shape: tuple[int, ...], wanted: Wanted) -> tuple[slice | Array | None, int]:
    """The wanted columns of (N, \\*shape) rows, a slice where it can be, None for all; how many.

    Takes no memory for a width that a header merely promises.
    """
    width = math.prod(shape)
    if wanted.keys:
        raise FileFormatError(
            f"keys are columns of Parquet, Arrow and CSV files, an array has none: {wanted.keys!r}"
        )
    if wanted.columns is None:
        check_width(width, wanted)
        return None, width
    features = select(None, width, wanted).features
    run = range(features[0], features[0] + len(features))
    if features == tuple(run):
        return slice(run.start, run.stop), len(run)
    return np.array(features), len(features)


def listed(what: str, columns: Columns) -> tuple[str | int, ...]:
    """``columns`` as a tuple, one alone as a list of one; TypeError for no names or positions."""
    check_type(what, columns, Iterable | int, "names or positions of columns")
    found = (columns,) if isinstance(columns, str | int) else tuple(columns)
    for column in found:
        if isinstance(column, bool) or not isinstance(column, str | int | np.integer):
            raise TypeError(f"{what} must be names or positions of columns, got {column!r}")
    return tuple(column if isinstance(column, str) else int(column) for column in found)


def _positions(
    names: Sequence[str] | None, width: int, columns: tuple[str | int, ...], what: str
) -> tuple[int, ...]:
    found = []
    for column in columns:
        if isinstance(column, str):
            if names is None:
                raise FileFormatError(
                    f"{what}: it has no names of columns, give positions for {column!r}"
                )
            if column not in names:
                raise FileFormatError(f"no column {column!r}: expected one of {_list(names)}")
            found.append(list(names).index(column))
        elif not -width <= column < width:
            raise FileFormatError(f"no column {column}: expected a position below {width}")
        else:
            found.append(column % width)
    for i in found:
        if found.count(i) > 1:
            raise FileFormatError(f"{what} has column {names[i] if names else i!r} twice")
    return tuple(found)


def _as_in(
    wanted: Wanted, names: Sequence[str] | None, width: int, features: tuple[int, ...]
) -> tuple[int, ...]:
    assert wanted.like is not None
    first, theirs, number = wanted.like
    if theirs is None or names is None:
        if (theirs is None) != (names is None):
            with_names = "names of columns, found none" if names is None else "no names of columns"
            raise FileFormatError(f"expected {with_names}, as in {first}")
        return features
    missing = [name for name in theirs if name not in names]
    more = [names[i] for i in features if names[i] not in theirs]
    if missing or (more and wanted.columns is None):
        said = f"lacks {_list(missing)}" if missing else f"has also {_list(more)}"
        raise FileFormatError(
            f"expected the {number} columns of {first}, found {len(features)}: it {said}"
        )
    return tuple(list(names).index(name) for name in theirs)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
