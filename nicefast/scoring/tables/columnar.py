"""Parquet files by row groups, Arrow and Feather files by record batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import FileFormatError
from ...data.readers import check_held, check_parquet
from .base import STEP, Array, Dtype, Piece, common, converted, spans
from .files import Paged, guarded, kind_of
from .messages import BATCH, Message, messages
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
            raise FileFormatError("holds rows of no values")
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
        except FileFormatError as why:
            raise FileFormatError(f"column {names[i]!r}: {why}") from None
    return values


def _vectors(column: Any, width: int, dtype: np.dtype[Any]) -> Array:
    """A column's (rows, width) values."""
    from pyarrow import types

    column = getattr(column, "storage", column)
    if column.null_count and dtype.kind in "iu":
        raise FileFormatError("values are missing, against the file's own word")
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
        raise FileFormatError(f"expected vectors of {length} in every row, found one of {other}")
    found = np.full((len(column), width), np.nan if dtype.kind == "f" else 0, dtype)
    if len(there):
        rows = _vectors(inner, width // length, dtype)
        if rows.size != len(there) * width:
            raise FileFormatError(f"expected vectors of {width} values, found others")
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
        raise FileFormatError(
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
    """An Arrow file or stream, read by rows; Feather (version 2) is the former.

    Record batches that are not compressed may be of any size: only the bytes of the rows that are
    asked for are read.
    """

    def __init__(self, path: Path, _: str | None, wanted: Wanted) -> None:
        arrow_of(path)
        with Paged(path) as pages:
            self._random, self._messages = messages(pages)
            with self._opened(pages, None) as reader:
                self.schema = reader.schema

                def batches(names: list[str]) -> Iterator[Any]:
                    return (batch for _, batch in self._batches(pages, names))

                super().__init__(path, self.schema, wanted, batches)
            # A column of each batch says how many rows it has; the integers also what is missing.
            lacking = self.may_lack()
            asked = lacking or [min(self.read_names, key=self._width)]
            with_nulls: set[str] = set()
            self.lengths: list[int] = []
            for _message, batch in self._batches(pages, asked):
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

    def _opened(self, pages: Paged, names: list[str] | None) -> Any:
        import pyarrow as pa
        from pyarrow import ipc

        for message in self._messages:
            if message.kind != BATCH:  # schema and dictionaries
                pages.read(message.start, message.end)
        options = ipc.IpcReadOptions()
        packed = any(message.packed for message in self._messages)
        if names is not None and packed:  # each column is unpacked, where all would be views
            options.included_fields = sorted(self.schema.names.index(name) for name in names)
        source = pa.BufferReader(pa.py_buffer(pages.bytes))
        return (ipc.open_file if self._random else ipc.open_stream)(source, options=options)

    def _batches(
        self, pages: Paged, names: list[str], first: int = 0
    ) -> Iterator[tuple[Message, Any]]:
        """Batches from number ``first`` on, whose values are not read unless they are packed."""
        batches = [message for message in self._messages if message.kind == BATCH]
        with self._opened(pages, names) as reader:
            for i, message in enumerate(batches):
                if self._random and i < first:
                    continue
                pages.read(message.start, message.end if message.packed else message.body)
                batch = reader.get_batch(i) if self._random else reader.read_next_batch()
                if i >= first:
                    if not message.packed:
                        self._read_vectors(pages, batch, names)
                    # Nothing else looks whether the buffers are as long as the metadata say.
                    batch.validate()
                    yield message, batch
                pages.drop(message.start, message.end)

    @staticmethod
    def _read_vectors(pages: Paged, batch: Any, names: list[str]) -> None:
        """The columns of vectors among ``names``, before anything looks at their values."""
        for name in names:
            column = batch.column(batch.schema.names.index(name))
            if is_vector(column.type):
                _read_whole(pages, column)

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        with guarded(self.path, "Arrow"):
            skipped = 0
            while skipped < len(self.lengths) and start >= self.lengths[skipped]:
                start -= self.lengths[skipped]
                skipped += 1
            with Paged(self.path) as pages:
                for message, batch in self._batches(pages, self.read_names, skipped):
                    names = batch.schema.names
                    columns = [batch.column(names.index(name)) for name in self.read_names]
                    whole = [one for one in columns if not _has_rows(one.type)]
                    if not message.packed:
                        for column in whole:
                            _read_whole(pages, column)
                    for begin, end in spans(start, batch.num_rows, first, size, self.step):
                        if not message.packed:
                            for column in columns:
                                _read_rows(pages, column, begin, end)
                        piece = self.piece(batch.slice(begin, end - begin), dtype)
                        # Keys are used later than the pages that they are in.
                        keys = {name: _copied(key) for name, key in piece.keys.items()}
                        if not message.packed and not whole:
                            pages.drop(message.body, message.end)
                        yield Piece(piece.values, keys)
                        first = (first - (end - begin)) % size or size
                    start = 0


def _copied(column: Any) -> Any:
    """The column in memory of its own; a dictionary stays where it is."""
    import pyarrow as pa

    if _has_rows(column.type):
        return column.take(pa.array(np.arange(len(column))))
    batch = pa.record_batch([column], [""])
    data = pa.BufferOutputStream()
    with pa.ipc.new_stream(data, batch.schema) as stream:
        stream.write_batch(batch)
    return pa.ipc.open_stream(data.getvalue()).read_next_batch().column(0)


def _has_rows(kind: Any) -> bool:
    """Whether a row's bytes can be told from other rows' without reading them all."""
    return _fixed_bits(kind) is not None or _offset_bytes(kind) is not None


def _fixed_bits(kind: Any) -> int | None:
    """Bits of a value in a buffer of values of one size; of a dictionary's column, of its index."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return int(kind.index_type.bit_width)
    if types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        return int(kind.bit_width)
    return None


def _offset_bytes(kind: Any) -> int | None:
    """Bytes of an offset of texts that are one after the other in a buffer."""
    from pyarrow import types

    if types.is_string(kind) or types.is_binary(kind):
        return 4
    return 8 if types.is_large_string(kind) or types.is_large_binary(kind) else None


def _read_rows(pages: Paged, column: Any, start: int, stop: int) -> None:
    """Read what rows ``start`` up to ``stop`` of a batch's column consist of."""
    bits, offset = _fixed_bits(column.type), _offset_bytes(column.type)
    if bits is None and offset is None:
        return  # read whole
    validity, values, *more = column.buffers()
    start, stop = start + column.offset, stop + column.offset
    _read_part(pages, validity, start // 8, -(-stop // 8))
    if bits is not None:
        _read_part(pages, values, start * bits // 8, -(-stop * bits // 8))
        return
    assert offset is not None
    if values is None or not values.size:  # of no rows
        return
    _read_part(pages, values, start * offset, (stop + 1) * offset)
    ends = np.frombuffer(values, f"<i{offset}", stop + 1 - start, start * offset)
    _read_part(pages, more[0], int(ends[0]), int(ends[-1]))


def _read_whole(pages: Paged, column: Any) -> None:
    for buffer in column.buffers():
        _read_part(pages, buffer, 0, buffer.size if buffer is not None else 0)


def _read_part(pages: Paged, buffer: Any, start: int, stop: int) -> None:
    """Bytes ``start`` up to ``stop`` of a buffer that lies in the pages."""
    import pyarrow as pa

    if buffer is None or not buffer.size:
        return
    if not 0 <= start <= stop <= buffer.size:
        raise FileFormatError(f"expected bytes {start} to {stop} of {buffer.size} in a column")
    place = buffer.address - pa.py_buffer(pages.bytes).address
    pages.read(place + start, place + stop)
