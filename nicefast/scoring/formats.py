"""The three kinds of file that results go to.

.npy      one file with room for all rows, each piece written at its place
.csv      text, appended to one file for each rank
.parquet  Arrow streams, likewise; assembled, each chunk is a row group
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

from .journal import Entry, write_all
from .sinks import FileSink, Piece

TEXT_ROWS = 2048  # formatted at a time: Python's lock is held meanwhile


class NpySink(FileSink):
    """One array (N,) or (N, C)."""

    kind = ".npy"

    def _name(self, rank: int) -> str:
        return "data.npy"

    def _header(self, rows: int) -> bytes:
        dtype, shape = self.layout.array
        text = io.BytesIO()
        head = {"descr": dtype.str, "fortran_order": False, "shape": (rows, *shape)}
        np.lib.format.write_array_header_1_0(text, head)
        return text.getvalue()

    def _prepare(self, rank: int, rows: int | None) -> None:
        dtype, shape = self.layout.array
        self._row = dtype.itemsize * int(np.prod(shape, dtype=int))
        self._start = len(self._header(0))
        if rank == 0 and rows is not None:
            os.truncate(self.path, self._start + rows * self._row)  # no blocks are taken yet
            self.file.seek(0)
            write_all(self.file, self._header(rows))

    def can_hold(self, entry: Entry) -> bool:
        offset = self._start + entry.chunk * self.chunk_rows * self._row
        return (entry.file, entry.offset, entry.length) == (
            self.path.name,
            offset,
            entry.rows * self._row,
        )

    def _store(self, piece: Piece) -> None:
        dtype, shape = self.layout.array
        columns = [v.reshape(piece.rows, -1) for v in piece.values.values()]
        block = np.ascontiguousarray(np.concatenate(columns, 1) if shape else columns[0], dtype)
        self._write(block.data.cast("B"), self._start + piece.start * self._row)

    def decode(self, data: bytes) -> tuple[list[Any], np.ndarray]:
        dtype, shape = self.layout.array
        return [], np.frombuffer(data, dtype).reshape(-1, *(shape or (1,)))

    def assemble(self, entries: Iterable[Entry], rows: int) -> Path:
        header = self._header(rows)
        if len(header) != self._start:
            raise ValueError(f"{self.path}: the header of {rows} rows does not fit its place")
        os.truncate(self.path, self._start + rows * self._row)
        self.file.seek(0)
        write_all(self.file, header)
        os.fsync(self.file.fileno())
        return self.path


class CsvSink(FileSink):
    """A header line, then a line for each row; floats with all the digits they have."""

    kind = ".csv"

    def _header(self) -> bytes:
        return f"{_quoted([self.layout.names])[0]}\n".encode()

    def _prepare(self, rank: int, rows: int | None) -> None:
        header = self._header()
        if rank == 0:
            self.file.seek(0)
            write_all(self.file, header)
            self.end = max(self.end, len(header))
        formats = []
        for dtype, width in self.layout.outputs.values():
            formats += ["%.9g" if dtype.itemsize <= 4 else "%.17g"] * (width or 1)
        self._format = ",".join(formats)

    def _store(self, piece: Piece) -> None:
        for at in range(0, piece.rows, TEXT_ROWS):
            self._write(self._text(piece, slice(at, at + TEXT_ROWS)).encode(), self.end)

    def _text(self, piece: Piece, part: slice) -> str:
        columns: list[list[Any]] = []
        for value in piece.values.values():
            columns += value[part].reshape(len(value[part]), -1).T.tolist()
        lines = [self._format % row for row in zip(*columns, strict=True)]
        if piece.keys:
            keys = _quoted(zip(*(_plain(key[part]) for key in piece.keys.values()), strict=True))
            lines = [f"{own},{line}" for own, line in zip(keys, lines, strict=True)]
        return "\n".join(lines) + "\n"

    def decode(self, data: bytes) -> tuple[list[Any], np.ndarray]:
        lines, keys = list(csv.reader(io.StringIO(data.decode(), newline=""))), self.layout.keys
        columns = list(zip(*lines, strict=True))
        values = np.array(columns[len(keys) :], np.float64).T
        return columns[: len(keys)], values

    def assemble(self, entries: Iterable[Entry], rows: int) -> Path:
        header, entries = self._header(), list(entries)
        at, name = len(header), self._name(0)
        for entry in entries:
            if (entry.file, entry.offset) != (name, at):
                break
            at += entry.length
        else:
            if (self.folder / name).stat().st_size == at:  # it is the complete file
                os.fsync(self.file.fileno())
                return self.folder / name
        path = self.folder / "assembled.csv"
        with open(path, "wb") as file:
            file.write(header)
            for entry in entries:
                file.writelines(self._read(entry))
            file.flush()
            os.fsync(file.fileno())
        return path


class ParquetSink(FileSink):
    """Key columns, then outputs; rows of D values are lists of fixed size."""

    kind = ".arrow"

    def _prepare(self, rank: int, rows: int | None) -> None:
        import_pyarrow()
        self._pieces: list[Piece] = []

    def _store(self, piece: Piece) -> None:
        self._pieces.append(piece)

    def _schema(self, keys: Mapping[str, Any]) -> Any:
        pa = import_pyarrow()
        fields = [(name, keys[name].type if name in keys else pa.null()) for name in keys]
        for name, (dtype, width) in self.layout.outputs.items():
            kind = pa.from_numpy_dtype(dtype)
            fields.append((name, kind if width is None else pa.list_(kind, width)))
        return pa.schema(fields)

    def _seal(self) -> None:
        pa = import_pyarrow()
        pieces, self._pieces = self._pieces, []
        columns: dict[str, Any] = {}
        for name in self.layout.keys:
            arrays = [_arrow(piece.keys[name]) for piece in pieces]
            columns[name] = pa.chunked_array([c for a in arrays for c in a.chunks])
        schema = self._schema(columns)
        for name, (_, width) in self.layout.outputs.items():
            value = np.concatenate([piece.values[name] for piece in pieces])
            flat = pa.array(value.reshape(-1))
            columns[name] = (
                flat if width is None else pa.FixedSizeListArray.from_arrays(flat, width)
            )
        data = io.BytesIO()
        with pa.ipc.new_stream(data, schema) as stream:
            stream.write_table(pa.table(columns, schema=schema).combine_chunks())
        self._write(data.getbuffer(), self.end)

    def decode(self, data: bytes) -> tuple[list[Any], np.ndarray]:
        table = import_pyarrow().ipc.open_stream(data).read_all()
        values = []
        for name, (_, width) in self.layout.outputs.items():
            column = table[name].combine_chunks()
            flat = column if width is None else column.flatten()
            values.append(flat.to_numpy(zero_copy_only=False).reshape(-1, width or 1))
        return [table[name].to_pylist() for name in self.layout.keys], np.concatenate(values, 1)

    def assemble(self, entries: Iterable[Entry], rows: int) -> Path:
        pa = import_pyarrow()
        import pyarrow.parquet as pq

        path = self.folder / "assembled.parquet"
        writer, schema = None, None
        with open(path, "wb") as file:
            try:
                for entry in entries:
                    table = pa.ipc.open_stream(b"".join(self._read(entry))).read_all()
                    if writer is None:
                        schema = table.schema
                        writer = self._writer(pq, file, schema)
                    writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))
                if writer is None:
                    writer = self._writer(pq, file, self._schema({}))
            finally:
                if writer is not None:
                    writer.close()
            file.flush()
            os.fsync(file.fileno())
        return path

    def _writer(self, pq: Any, file: IO[bytes], schema: Any) -> Any:
        return pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=list(self.layout.keys)
        )


SINKS: dict[str, type[FileSink]] = {".npy": NpySink, ".csv": CsvSink, ".parquet": ParquetSink}


def import_pyarrow() -> Any:
    """pyarrow, or what to do about it."""
    try:
        import pyarrow.ipc
    except ImportError:
        raise ImportError("writing .parquet needs pyarrow: pip install 'nicefast[train]'") from None
    return pyarrow


def _arrow(column: Any) -> Any:
    """A key column as a pyarrow.ChunkedArray."""
    pa = import_pyarrow()
    if isinstance(column, pa.ChunkedArray):
        return column
    return pa.chunked_array([column if isinstance(column, pa.Array) else pa.array(column)])


def _quoted(rows: Iterable[Iterable[Any]]) -> list[str]:
    """Rows as lines of CSV without their ends.

    These are the writer's own: it quotes them within a value, on some Pythons no others.
    """
    found: list[str] = []
    csv.writer(SimpleNamespace(write=found.append)).writerows(rows)
    return [line.removesuffix("\r\n") for line in found]


def _plain(column: Any) -> list[Any]:
    """A key column as Python values."""
    return column.to_pylist() if hasattr(column, "to_pylist") else np.asarray(column).tolist()
