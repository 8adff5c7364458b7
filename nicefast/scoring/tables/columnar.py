"""Parquet files by row groups, Arrow and Feather files by record batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...data.matlab import WrongError
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
    """An Arrow file or stream, read by rows; Feather (version 2) is the former.

    Record batches that are not compressed may be of any size: only the bytes of the rows that are
    asked for are read.
    """

    def __init__(self, path: Path, _: str | None, wanted: Wanted) -> None:
        arrow_of(path)
        pages = Paged(path)
        self._random, self._messages = messages(pages)
        with self._opened(pages, None) as reader:
            super().__init__(path, reader.schema, wanted)
        # A column of each batch says how many rows it has; the integers also what is missing.
        lacking = self.may_lack()
        asked = lacking or [min(self.read_names, key=self._width)]
        with_nulls: set[str] = set()
        self.lengths: list[int] = []
        for _message, batch in self._batches(pages, asked):
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
                    # Nothing else looks whether the buffers are as long as the metadata say.
                    batch.validate()
                    yield message, batch
                pages.drop(message.start, message.end)

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        with guarded(self.path, "Arrow"):
            skipped = 0
            while skipped < len(self.lengths) and start >= self.lengths[skipped]:
                start -= self.lengths[skipped]
                skipped += 1
            pages = Paged(self.path)
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
        raise WrongError(f"expected bytes {start} to {stop} of {buffer.size} in a column")
    place = buffer.address - pa.py_buffer(pages.bytes).address
    pages.read(place + start, place + stop)
