"""Parquet files by row groups, Arrow and Feather files by record batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...data.matlab import WrongError
from .base import STEP, Array, Dtype, Piece, common, converted, spans
from .files import Mapped, guarded, kind_of
from .selection import Wanted, select


def arrow_of(path: Path | str) -> Any:
    """The module pyarrow; ImportError says which file needs it."""
    try:
        import pyarrow as pa
    except ImportError as error:
        message = f"{path}: {kind_of(Path(path))} needs pyarrow: pip install 'nicefast[train]'"
        raise ImportError(message) from error
    return pa


class Columnar:
    """A part whose columns have names and types of their own, and whose rows are counted."""

    dtype: Dtype

    def __init__(self, path: Path, schema: Any, wanted: Wanted) -> None:
        self.name, self.path, self.schema = str(path), path, schema
        selection = select(schema.names, len(schema.names), wanted)
        self.columns = [schema.field(i) for i in selection.features]
        self.features = len(self.columns)
        self.names: tuple[str, ...] | None = tuple(field.name for field in self.columns)
        self.key_types = {schema.field(i).name: schema.field(i).type for i in selection.keys}
        self.read_names = list(dict.fromkeys([*self.names, *self.key_types]))
        self.rows: int | None = 0
        for field in self.columns:
            _check_type(field)

    def decide(self, with_nulls: set[str]) -> None:
        """The dtype, given the integer columns in which values are missing."""
        kinds = [dtype_of(field.type, field.name in with_nulls) for field in self.columns]
        dtype = common(kinds)
        assert dtype is not None
        self.dtype = dtype
        self.step = max(1, STEP // (self.features * dtype.itemsize))

    def may_lack(self) -> list[str]:
        """Integer columns in which values may be missing, which makes them floats."""
        return [
            f.name
            for f in self.columns
            if f.nullable
            and dtype_of(f.type, True).kind == "f"
            and dtype_of(f.type, False).kind in "iu"
        ]

    def count(self) -> int:
        return self.rows or 0

    def piece(self, batch: Any, dtype: Dtype) -> Piece:
        """A record batch of ``read_names``, whose keys stay as they are."""
        own = batch.schema.names
        columns = [batch.column(own.index(name)) for name in self.names or ()]
        keys = {name: batch.column(own.index(name)) for name in self.key_types}
        for key in keys.values():
            key.validate(full=True)
        return Piece(matrix(columns, self.names or (), batch.num_rows, dtype), keys)


def matrix(columns: list[Any], names: tuple[str, ...], rows: int, dtype: Dtype) -> Array:
    """Pyarrow arrays side by side: (rows, columns) of ``dtype``; missing values are NaN."""
    assert isinstance(dtype, np.dtype)
    values = np.empty((rows, len(columns)), dtype)
    for i, column in enumerate(columns):
        if column.null_count and dtype.kind in "iu":
            raise WrongError(
                f"column {names[i]!r}: values are missing, against the file's own word"
            )
        if column.type == "bool":
            column = column.cast("uint8")  # noqa: PLW2901
        try:
            values[:, i] = converted(column.to_numpy(zero_copy_only=False), dtype)
        except WrongError as why:
            raise WrongError(f"column {names[i]!r}: {why}") from None
    return values


def dtype_of(kind: Any, with_nulls: bool) -> np.dtype[Any]:
    """What a column of that pyarrow type becomes: bools uint8, half floats float32."""
    from pyarrow import types

    if types.is_floating(kind):
        return np.dtype(np.float64 if types.is_float64(kind) else np.float32)
    if with_nulls:
        return np.dtype(np.float64)
    return np.dtype(np.uint8 if types.is_boolean(kind) else kind.to_pandas_dtype())


def _check_type(field: Any) -> None:
    from pyarrow import types

    real = (types.is_integer, types.is_floating, types.is_boolean)
    if not any(is_type(field.type) for is_type in real):
        raise WrongError(
            f"column {field.name!r}: expected integers, floats or bools, found {field.type}; "
            f"leave it out of columns or make it a key"
        )


class Parquet(Columnar):
    """A Parquet file; a row group is read from its beginning, a column's pages as they come."""

    def __init__(self, path: Path, _: str | None, wanted: Wanted) -> None:
        arrow_of(path)
        with self._opened(path) as file:
            super().__init__(path, file.schema_arrow, wanted)
            meta = file.metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            self.lengths = [group.num_rows for group in groups]
            self.rows = sum(self.lengths)
            self.decide(self._with_nulls(file, groups))

    @staticmethod
    def _opened(path: Path) -> Any:
        import pyarrow.parquet as pq

        # Pages as they come, not a row group's column at once.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 17)

    def _with_nulls(self, file: Any, groups: list[Any]) -> set[str]:
        found = set()
        for name in self.may_lack():
            at = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
            place = at.index(name)
            unsaid = []
            for i, group in enumerate(groups):
                said = group.column(place).statistics
                if said is None or not said.has_null_count:
                    unsaid.append(i)
                elif said.null_count:
                    found.add(name)
                    break
            if name not in found and unsaid:
                batches = file.iter_batches(columns=[name], row_groups=unsaid)
                if any(batch.column(0).null_count for batch in batches):
                    found.add(name)
        return found

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        with guarded(self.path, "Parquet"):
            groups = list(range(len(self.lengths)))
            while groups and start >= self.lengths[groups[0]]:
                start -= self.lengths[groups.pop(0)]
            if not groups:
                return
            with self._opened(self.path) as file:
                step = min(size, self.step)
                for batch in file.iter_batches(step, groups, self.read_names):
                    if start >= batch.num_rows:
                        start -= batch.num_rows
                        continue
                    yield self.piece(batch.slice(start), dtype)
                    start = 0


class Arrow(Columnar):
    """An Arrow file or stream, mapped; Feather (version 2) is the former."""

    def __init__(self, path: Path, _: str | None, wanted: Wanted) -> None:
        arrow_of(path)
        with path.open("rb") as file:
            self._random = file.read(6) == b"ARROW1"
        self._packed = False
        with self._opened(Mapped(path), None) as reader:
            super().__init__(path, reader.schema, wanted)
        # A column of each batch says how many rows it has; the integers also what is missing.
        lacking = self.may_lack()
        asked = lacking or [min(self.read_names, key=self._width)]
        with_nulls: set[str] = set()
        self.lengths: list[int] = []
        mapping = Mapped(path)
        one = next(self._batches(mapping, asked), None)
        self._packed = one is not None and not _within(one, mapping)
        del one
        for batch in self._batches(mapping, asked):
            self.lengths.append(batch.num_rows)
            names = batch.schema.names
            with_nulls |= {n for n in lacking if batch.column(names.index(n)).null_count}
        self.rows = sum(self.lengths)
        self.decide(with_nulls)

    def _width(self, name: str) -> int:
        try:
            return self.schema.field(name).type.bit_width
        except ValueError:  # of no fixed width
            return 1 << 20

    def _opened(self, mapping: Mapped, names: list[str] | None) -> Any:
        import pyarrow as pa
        from pyarrow import ipc

        options = ipc.IpcReadOptions()
        if names is not None and self._packed:  # a choice copies, where all would be views
            options.included_fields = sorted(self.schema.names.index(name) for name in names)
        source = pa.BufferReader(pa.py_buffer(mapping.bytes))
        return (ipc.open_file if self._random else ipc.open_stream)(source, options=options)

    def _batches(self, mapping: Mapped, names: list[str], first: int = 0) -> Iterator[Any]:
        with self._opened(mapping, names) as reader:
            if self._random:
                for i in range(first, reader.num_record_batches):
                    mapping.check()
                    yield reader.get_batch(i)
            else:
                for i, batch in enumerate(reader):
                    mapping.check()
                    if i >= first:
                        yield batch

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        with guarded(self.path, "Arrow"):
            skipped = 0
            while skipped < len(self.lengths) and start >= self.lengths[skipped]:
                start -= self.lengths[skipped]
                skipped += 1
            mapping = Mapped(self.path)
            for batch in self._batches(mapping, self.read_names, skipped):
                # Nothing else looks whether the buffers are as long as the metadata say.
                batch.validate()
                for begin, end in spans(start, batch.num_rows, first, size, self.step):
                    yield self.piece(batch.slice(begin, end - begin), dtype)
                    mapping.taken((end - begin) * self.features * dtype.itemsize)
                    first = (first - (end - begin)) % size or size
                start = 0


def _within(batch: Any, mapping: Mapped) -> bool:
    """Whether the batch's values are the mapping's own bytes: not compressed."""
    import pyarrow as pa

    whole = pa.py_buffer(mapping.bytes)
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer]
    return all(whole.address <= buffer.address < whole.address + whole.size for buffer in buffers)
