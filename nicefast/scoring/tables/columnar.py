"""Parquet files by row groups, Arrow and Feather files by record batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...data.matlab import WrongError
from ...data.readers import check_held, check_parquet
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
    """A part whose columns have names and types of their own, and whose rows are counted.

    Columns hold numbers; one that is alone may hold vectors of them: lists, lists of a fixed size
    or tensors, of one length, that of the first one where the type does not say it.
    """

    dtype: Dtype

    def __init__(
        self,
        path: Path,
        schema: Any,
        wanted: Wanted,
        batches: Callable[[list[str]], Iterator[Any]],
    ) -> None:
        self.name, self.path, self.schema = str(path), path, schema

        def width(features: tuple[int, ...]) -> int:
            """How many values a row has: of one column of vectors, or of columns of numbers."""
            fields = [schema.field(i) for i in features]
            for field in fields:
                _check_type(field, alone=len(fields) == 1)
            self.features = len(fields)
            if not is_vector(fields[0].type):
                return self.features
            said = fixed_width(fields[0].type)
            if said is None:
                said = _first_width(fields[0].name, batches([fields[0].name]))
            if said is None:  # there is no row
                said = wanted.like[2] if wanted.like else math.prod(wanted.event_shape or (0,))
            self.features = said
            return said

        selection = select(schema.names, len(schema.names), wanted, width)
        self.columns = [schema.field(i) for i in selection.features]
        if not self.features:
            raise WrongError("holds rows of no values")
        check_held(path, "a row", self.features * 8)
        self.names: tuple[str, ...] | None = tuple(field.name for field in self.columns)
        self.key_types = {schema.field(i).name: schema.field(i).type for i in selection.keys}
        self.read_names = list(dict.fromkeys([*self.names, *self.key_types]))
        self.rows: int | None = 0

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
            if (f.nullable or is_vector(f.type))
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
        for column in (*keys.values(), *(c for c in columns if is_vector(c.type))):
            column.validate(full=True)
        return Piece(matrix(columns, self.names or (), batch.num_rows, dtype, self.features), keys)


def matrix(
    columns: list[Any], names: tuple[str, ...], rows: int, dtype: Dtype, features: int
) -> Array:
    """Pyarrow arrays side by side, or one of vectors: (rows, features) of ``dtype``.

    Missing values are NaN, and so is all of a missing vector.
    """
    assert isinstance(dtype, np.dtype)
    values = np.empty((rows, features), dtype)
    width = features // len(columns)
    for i, column in enumerate(columns):
        try:
            values[:, i * width : (i + 1) * width] = _vectors(column, width, dtype)
        except WrongError as why:
            raise WrongError(f"column {names[i]!r}: {why}") from None
    return values


def _vectors(column: Any, width: int, dtype: np.dtype[Any]) -> Array:
    """A column's (rows, width) values."""
    from pyarrow import types

    column = getattr(column, "storage", column)
    if column.null_count and dtype.kind in "iu":
        raise WrongError("values are missing, against the file's own word")
    if not _is_list(column.type):
        if types.is_boolean(column.type):
            column = column.cast("uint8")
        return converted(column.to_numpy(zero_copy_only=False), dtype)[:, None]
    there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    inner = column.flatten()  # without what is missing
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)[there]
    length = int(lengths[0]) if len(lengths) and _is_list(inner.type) else width
    wrong = lengths[lengths != length]
    if len(wrong) or not length or width % length:
        other = int(wrong[0]) if len(wrong) else length
        raise WrongError(f"expected vectors of {length} in every row, found one of {other}")
    found = np.full((len(column), width), np.nan if dtype.kind == "f" else 0, dtype)
    if len(there):
        rows = _vectors(inner, width // length, dtype)
        if rows.size != len(there) * width:
            raise WrongError(f"expected vectors of {width} values, found others")
        found[there] = rows.reshape(len(there), width)
    return found


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def is_vector(kind: Any) -> bool:
    """Whether a column of this type holds vectors, or tensors, and not numbers."""
    return _is_list(getattr(kind, "storage_type", kind))


def number_of(kind: Any) -> Any:
    """The type of the numbers in a column of this type: of vectors, that of their values."""
    kind = getattr(kind, "storage_type", kind)
    return number_of(kind.value_type) if _is_list(kind) else kind


def fixed_width(kind: Any) -> int | None:
    """How many values a column of this type has in each row; None where the type leaves it open."""
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)
    if not _is_list(kind):
        return 1
    inner = fixed_width(kind.value_type)
    known = types.is_fixed_size_list(kind) and inner is not None
    return kind.list_size * inner if known else None


def _first_width(name: str, batches: Iterator[Any]) -> int | None:
    """Of the first row that is not missing."""
    for batch in batches:
        column = batch.column(batch.schema.names.index(name))
        column.validate(full=True)
        column = getattr(column, "storage", column).drop_null()
        if len(column):
            width = 1
            while _is_list(column.type):
                column = column.slice(0, 1).flatten()
                width *= len(column)
                column = column.drop_null()
                if not len(column):
                    break
            return width
    return None


def dtype_of(kind: Any, with_nulls: bool) -> np.dtype[Any]:
    """What a column of that pyarrow type becomes: bools uint8, half floats float32."""
    from pyarrow import types

    kind = number_of(kind)
    if types.is_floating(kind):
        return np.dtype(np.float64 if types.is_float64(kind) else np.float32)
    if with_nulls:
        return np.dtype(np.float64)
    return np.dtype(np.uint8 if types.is_boolean(kind) else kind.to_pandas_dtype())


def has_nulls(column: Any) -> bool:
    """Whether a value is missing, or, among vectors, one of them or a value of one."""
    column = getattr(column, "storage", column)
    if column.null_count or not _is_list(column.type):
        return bool(column.null_count)
    column.validate(full=True)
    return has_nulls(column.flatten())


def _check_type(field: Any, alone: bool) -> None:
    from pyarrow import types

    real = (types.is_integer, types.is_floating, types.is_boolean)
    numbers = any(is_type(number_of(field.type)) for is_type in real)
    if not numbers or (is_vector(field.type) and not alone):
        also = "; vectors must be the only column" if numbers else ""
        raise WrongError(
            f"column {field.name!r}: expected integers, floats or bools, found {field.type}{also}; "
            f"leave it out of columns or make it a key"
        )


class Parquet(Columnar):
    """A Parquet file; a row group is read from its beginning, a column's pages as they come."""

    def __init__(self, path: Path, _: str | None, wanted: Wanted) -> None:
        arrow_of(path)
        with self._opened(path) as file:
            check_parquet(path, file)
            super().__init__(
                path,
                file.schema_arrow,
                wanted,
                lambda names: file.iter_batches(64, columns=names),
            )
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
            places = [i for i, one in enumerate(at) if one == name or one.startswith(f"{name}.")]
            place = places[0]
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
                if any(has_nulls(batch.column(0)) for batch in batches):
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
            self.schema = reader.schema
        super().__init__(
            path, self.schema, wanted, lambda names: self._batches(Mapped(path), names)
        )
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
            with_nulls |= {n for n in lacking if has_nulls(batch.column(names.index(n)))}
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
