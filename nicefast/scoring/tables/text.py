"""CSV through pyarrow's streaming reader, and through Python's where an error has to be found."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import FileFormatError
from ...data.header import LOOKED_AT, MISSING, is_header, number_of, said_header
from ...data.readers import MOST_LINE, csv_rows
from .base import Dtype, Piece
from .columnar import arrow_of, matrix
from .files import guarded
from .selection import Wanted, select

BLOCK = 1 << 20  # bytes that are parsed at a time, unless rows are long
MOST_CELLS = 1 << 16  # in a row: pyarrow takes 9 KB for each


class CSV:
    """A CSV file under a header or none: int64 where every value is one, else float64.

    The first row is a header where it has every name that is asked for, else by the rule of
    :func:`nicefast.data.header.is_header`, the columns of features alone. Empty cells and what else
    stands for a missing value are NaN. Keys are text, as it stands in the file.
    """

    dtype: Dtype

    def __init__(self, path: Path, _: str | None, wanted: Wanted) -> None:
        self.name, self.path, self._pa = str(path), path, arrow_of(path)
        self._header = 0  # its last line's number
        rows = list(self._beginning())
        if not rows:
            raise FileFormatError("holds no rows")
        line, cells = rows[0]
        self._block = max(BLOCK, 8 * max(sum(map(len, row)) + len(row) for _, row in rows))
        self.width = len(cells)
        if self.width > MOST_CELLS:
            raise FileFormatError(
                f"line {line}: expected {MOST_CELLS} cells at most, got {self.width}"
            )
        asked = [c for c in (*(wanted.columns or ()), *wanted.keys) if isinstance(c, str)]
        header = [cell.strip() for cell in cells]
        named = bool(asked) and all(name in header for name in asked)
        auto = said_header(wanted.header) is None
        if (named and auto) or self._is_header(cells, [row for _, row in rows[1:]], wanted):
            self._header = line
            del rows[0]
        names = header if self._header else None
        selection = select(names, self.width, wanted)
        self.labels = [repr(n) for n in header] if names else [str(i) for i in range(self.width)]
        self.chosen, self.features = selection.features, len(selection.features)
        self.names = tuple(header[i] for i in self.chosen) if names else None
        kept = {header[i] if names else f"column_{i}": str(i) for i in selection.keys}
        self.kept, self.key_types = kept, dict.fromkeys(kept, self._pa.string())
        self.rows: int | None = None if rows else 0
        for line, cells in rows:
            self._check(line, cells)
        self.dtype = np.dtype(np.float64)
        values = [cells[i] for _, cells in rows for i in self.chosen]
        if all(map(_is_integer, values)) and self._all_integers():
            self.dtype = np.dtype(np.int64)

    def _is_header(self, cells: list[str], below: list[list[str]], wanted: Wanted) -> bool:
        chosen = wanted.keys if wanted.columns is None else wanted.columns
        at = {i % self.width for i in chosen if not isinstance(i, str)}
        if wanted.columns is None:
            at = set(range(self.width)) - at
        places = sorted(at) or range(self.width)
        rows = [[row[i] for i in places] for row in below if len(row) == self.width]
        own = [cells[i] for i in places]
        return is_header(self.name, own, rows, wanted.header, quiet=wanted.like is not None)

    def count(self) -> int:
        if self.rows is None:
            with guarded(self.path, ".csv"):
                self.rows = sum(batch.num_rows for batch in self._batches(None))
        return self.rows

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        names = self.names or tuple(self.labels[i] for i in self.chosen)
        with guarded(self.path, ".csv"):
            seen = 0
            for batch in self._batches(self._pa.from_numpy_dtype(self.dtype)):
                skipped = max(min(start - seen, batch.num_rows), 0)
                seen += batch.num_rows
                if skipped < batch.num_rows:
                    rows = batch.slice(skipped)
                    features = [rows.column(str(i)) for i in self.chosen]
                    keys = {name: rows.column(column) for name, column in self.kept.items()}
                    yield Piece(matrix(features, names, rows.num_rows, dtype, self.features), keys)
            self.rows = seen

    def _all_integers(self) -> bool:
        """Whether the whole file holds integers: one pass, which also counts its rows."""
        if self.rows == 0:
            return True
        count, some_missing = 0, False
        try:
            for batch in self._batches(self._pa.int64(), diagnose=False):
                count += batch.num_rows
                some_missing |= any(batch.column(str(i)).null_count for i in self.chosen)
        except self._pa.ArrowInvalid:  # which the pass that reads floats will tell
            return False
        self.rows = count
        return not some_missing

    def _batches(self, kind: Any, diagnose: bool = True) -> Iterator[Any]:
        """Batches of the chosen columns as ``kind``, and of the keys; None: to count rows."""
        if self.rows == 0:
            return
        from pyarrow import csv as pc

        numbers = [str(i) for i in self.chosen] if kind is not None else []
        texts = list(self.kept.values()) if kind is not None else [str(self.chosen[0])]
        string = self._pa.string()
        try:
            yield from pc.open_csv(
                self.name,
                pc.ReadOptions(
                    block_size=self._block,
                    column_names=[str(i) for i in range(self.width)],
                    skip_rows=self._header,
                ),
                pc.ParseOptions(newlines_in_values=True),
                pc.ConvertOptions(
                    column_types={**dict.fromkeys(numbers, kind), **dict.fromkeys(texts, string)},
                    include_columns=list(dict.fromkeys(numbers + texts)),
                    null_values=sorted(MISSING),
                    strings_can_be_null=False,
                ),
            )
        except self._pa.ArrowInvalid:
            if diagnose:
                for line, cells in self._lines():
                    if line > self._header:
                        self._check(line, cells)
            raise

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        return csv_rows(self.path, errors="replace")

    def _beginning(self) -> Iterator[tuple[int, list[str]]]:
        """The first rows, fewer where they are long."""
        size = 0
        for line, cells in islice(self._lines(), LOOKED_AT):
            yield line, cells
            size += sum(map(len, cells)) + len(cells)
            if size > MOST_LINE:
                return

    def _check(self, line: int, cells: list[str]) -> None:
        if len(cells) != self.width:
            raise FileFormatError(f"line {line}: expected {self.width} cells, found {len(cells)}")
        for i in self.chosen:
            if not (number_of(cells[i]) is not None or cells[i].strip() in MISSING):
                raise FileFormatError(
                    f"line {line}, column {self.labels[i]}: expected a number, "
                    f"found {cells[i][:40]!r}"
                )


def _is_integer(cell: str) -> bool:
    return cell.strip().lstrip("-").isdecimal()
