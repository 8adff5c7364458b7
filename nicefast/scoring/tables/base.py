"""What every source becomes: parts that give rows in pieces, and a table of blocks of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...data.errors import FileFormatError

Array = np.ndarray[Any, np.dtype[Any]]
Dtype = np.dtype[Any] | torch.dtype
Columns = str | int | Sequence[str | int]

STEP = 1 << 23  # bytes that are read or converted at a time where rows may be many


class Block(NamedTuple):
    """Consecutive rows of a table.

    Attributes:
        start: number of the first row in the table.
        values: (n, D), an array or a tensor of the table's dtype; a view of an array in memory.
        keys: for each key column its n values, a pyarrow array of its own type.

    >>> from nicefast.scoring.tables import open_table
    >>> [block.start for block in open_table(np.zeros((5, 2))).blocks(2)]
    [0, 2, 4]
    """

    start: int
    values: Array | Tensor
    keys: dict[str, Any]


class Piece(NamedTuple):
    """Rows as a part gives them: (n, D) and, for each key, n values."""

    values: Array | Tensor
    keys: dict[str, Any]


class Unchanged(Protocol):
    """What tells whether a source is still what it was."""

    def check(self) -> None:
        """ValueError, naming the source, where it is not."""
        ...


class Part(Protocol):
    """A file or another run of rows.

    Attributes:
        name: as messages call it.
        features: D, how many values a row has.
        names: of these, where there are any.
        dtype: of the values as they are stored, in this machine's byte order.
        key_types: of each key, its pyarrow type.
        rows: how many, or None until they have been counted or read.
    """

    name: str
    features: int
    names: tuple[str, ...] | None
    dtype: Dtype
    key_types: dict[str, Any]
    rows: int | None

    def count(self) -> int:
        """How many rows there are, whatever it takes."""
        ...

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        """Rows from ``start`` on, at least to ``stop``, in pieces of any lengths.

        Pieces of ``first`` rows, then ``size`` each, spare a copy.
        """
        ...


@dataclass
class Table:
    """Rows of one width in a fixed order; see :func:`open_table`.

    Attributes:
        name: the source, as messages call it.
        parts: its files.
        fingerprint: hex SHA-256 of the files' names, sizes, modification times and a sample of
            their contents, and of the columns that are read; None where rows come only once.
        seekable: whether every ``blocks(size, start)`` gives the same rows.
        files: of each part, its file as it was before anything was read of it; empty for sources
            in memory.
        fingerprint_now: makes the fingerprint again.

    >>> from nicefast.scoring.tables import open_table
    >>> table = open_table(np.zeros((5, 2), np.uint8))
    >>> table.rows, table.features, table.dtype, table.keys
    (5, 2, dtype('uint8'), ())
    """

    name: str
    parts: Sequence[Part]
    fingerprint: str | None
    seekable: bool = True
    files: Sequence[Unchanged] = ()
    fingerprint_now: Callable[[], str] | None = None

    @property
    def rows(self) -> int | None:
        """How many there are; None until they have been read, where nothing else says it."""
        counts = [part.rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def features(self) -> int:
        """D, values in a row."""
        return self.parts[0].features

    @property
    def names(self) -> tuple[str, ...] | None:
        """The D columns' names, where the source has them."""
        return self.parts[0].names

    @property
    def dtype(self) -> Dtype:
        """Of the values, one for all files: what holds what each of them has."""
        kinds = [part.dtype for part in self.parts]
        return common([kind for kind in kinds if isinstance(kind, np.dtype)]) or kinds[0]

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the columns that are carried over."""
        return tuple(self.parts[0].key_types)

    @property
    def key_types(self) -> dict[str, Any]:
        """The pyarrow type of each key."""
        return self.parts[0].key_types

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """Rows ``start`` up to ``stop`` (all) in blocks of ``size``, the last may be shorter.

        What comes before ``start`` is not read, or, in CSV and compressed files, passed over.
        The memory taken is that of two blocks and a few MiB, whatever the number of rows.

        Raises:
            ValueError: size, start or stop out of range; whatever is wrong with the rows, naming
                file, row or column, once that place is reached; a file that was written to since
                the table was opened.
            TypeError: they are no integers.
        """
        for name, value, least in (("size", size, 1), ("start", start, 0), ("stop", stop, 0)):
            if value is None and name == "stop":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        return _blocks(self._pieces(size, start, stop), size, start)

    def check_unchanged(self) -> None:
        """ValueError where the source is not what it was when the table was opened.

        Every block is checked by what the system says of its file; this looks at all files and
        makes the fingerprint again.
        """
        for file in self.files:
            file.check()
        if self.fingerprint_now is not None and self.fingerprint_now() != self.fingerprint:
            raise ValueError(
                f"{self.name}: it was changed while it was read: expected other values"
            )

    def _pieces(self, size: int, start: int, stop: int | None) -> Iterator[Piece]:
        todo = math.inf if stop is None else stop - start
        done, skip, dtype = 0, start, self.dtype
        for i, part in enumerate(self.parts):
            if todo <= done:
                return
            # Only where rows follow does it matter how many an uncounted file has.
            if part.rows is not None or (skip and part is not self.parts[-1]):
                rows = part.count()
                if skip >= rows:
                    skip -= rows
                    continue
            until = None if stop is None else skip + int(todo - done)
            pieces = part.pieces(skip, until, size - done % size, size, dtype)
            for piece in _while_unchanged(pieces, self.files[i]) if self.files else pieces:
                left = todo - done
                whole = len(piece.values) <= left
                yield piece if whole else cut(piece, 0, int(left))
                done += len(piece.values)
                if done >= todo:
                    return
            skip = 0


def _while_unchanged(pieces: Iterator[Piece], file: Unchanged) -> Iterator[Piece]:
    """Pieces that were read before anything was written to their file; an error tells of it."""
    try:
        for piece in pieces:
            file.check()
            yield piece
    except Exception:
        file.check()  # a reader may have stumbled over what was written
        raise


def _blocks(pieces: Iterable[Piece], size: int, start: int) -> Iterator[Block]:
    held: list[Piece] = []
    rows = 0
    for piece in pieces:
        at, length = 0, len(piece.values)
        while at < length:
            end = min(at + size - rows, length)
            held.append(cut(piece, at, end))
            rows += end - at
            at = end
            if rows == size:
                yield Block(start, *_joined(held))
                start += rows
                held, rows = [], 0
    if held:
        yield Block(start, *_joined(held))


def cut(piece: Piece, start: int, stop: int) -> Piece:
    """Rows ``start`` up to ``stop`` of a piece: views."""
    if start == 0 and stop == len(piece.values):
        return piece
    return Piece(piece.values[start:stop], {k: v[start:stop] for k, v in piece.keys.items()})


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    keys = {}
    if pieces[0].keys:
        import pyarrow as pa

        keys = {k: pa.concat_arrays([piece.keys[k] for piece in pieces]) for k in pieces[0].keys}
    values = [piece.values for piece in pieces]
    if isinstance(values[0], Tensor):
        return Piece(torch.cat(values), keys)  # type: ignore[arg-type]
    return Piece(np.concatenate(values), keys)  # type: ignore[arg-type]


def common(dtypes: Sequence[np.dtype[Any]]) -> np.dtype[Any] | None:
    """One dtype for all: integers where all are, else the narrowest float that holds them."""
    if not dtypes:
        return None
    if len(set(dtypes)) == 1:
        return dtypes[0]
    if all(dtype.kind in "iu" for dtype in dtypes):
        joint = np.result_type(*dtypes)
        return joint if joint.kind in "iu" else np.dtype(np.int64)  # of uint64 and signed ones
    return np.result_type(*dtypes)


def spans(
    start: int, stop: int, first: int, size: int, limit: int | None = None
) -> Iterator[tuple[int, int]]:
    """``first`` rows, then ``size`` each, up to ``stop``; none of more than ``limit``.

    >>> list(spans(10, 20, 1, 4))
    [(10, 11), (11, 15), (15, 19), (19, 20)]
    """
    want = first
    while start < stop:
        end = min(start + want, stop, start + (limit or want))
        yield start, end
        want = want - (end - start) or size
        start = end


def flat(values: Array, select: slice | Array | None, dtype: Dtype) -> Array:
    """(n, \\*shape) as (n, D) of ``dtype``; a view where nothing has to be converted."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if select is not None:
        values = values[:, select]
    if values.dtype == bool:
        values = values.view(np.uint8)
    if not values.flags.aligned:  # a member of an archive starts anywhere
        values = values.copy()
    return converted(values, dtype)


def converted(values: Array, dtype: Dtype) -> Array:
    """As ``dtype``, its own where possible; FileFormatError for a uint64 beyond int64."""
    assert isinstance(dtype, np.dtype)
    if values.dtype.kind == "u" and values.dtype.itemsize == 8 and dtype.kind == "i":
        over = values > np.iinfo(np.int64).max
        if over.any():
            raise FileFormatError(f"expected integers below 2^63, found {values[over].flat[0]}")
    return values.astype(dtype, copy=False)
