"""Where results go: arrays, or the finished chunks of a .npy, .csv or .parquet file.

Pieces of a chunk come in order, a chunk is finished by its last one, and its journal line is
written when its bytes are on the disk. Bytes depend on the pieces alone, and
:meth:`FileSink.assemble` makes one file of all chunks, whichever process wrote which when.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..runtime.devices import processor
from .journal import LISTED, Entry, Journal, blocks, write_all

COMMIT_SECONDS = 0.2  # finished chunks wait that long for others, to share a wait for the disk


class Piece(NamedTuple):
    """Results of consecutive rows, the first being row ``start``.

    Attributes:
        values: (n,) or (n, D) for each output.
        keys: (n,) for each key column, pyarrow or NumPy.
        bad: numbers of the rows that are NaN.
        batch: rows that were computed together.
    """

    start: int
    rows: int
    values: Mapping[str, np.ndarray]
    keys: Mapping[str, Any]
    bad: Sequence[int]
    batch: int


class Layout(NamedTuple):
    """What a row of the result is: outputs with their dtypes and widths (None: a scalar), keys."""

    outputs: Mapping[str, tuple[np.dtype, int | None]]
    keys: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Of the columns of a text file: keys, outputs, ``z_0``, ``z_1``, ..."""
        found = list(self.keys)
        for name, (_, width) in self.outputs.items():
            found += [name] if width is None else [f"{name}_{i}" for i in range(width)]
        return found

    @property
    def array(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of a row in one array: all columns side by side."""
        dtype = np.result_type(*(dtype for dtype, _ in self.outputs.values()))
        widths = [width for _, width in self.outputs.values()]
        scalar = widths == [None]
        return dtype.newbyteorder("<"), () if scalar else (sum(w or 1 for w in widths),)


class ArraySink:
    """Keeps everything, in :attr:`values`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.rows, self.bad = 0, 0
        self.bad_rows: list[int] = []
        self._pieces: dict[str, list[Any]] = {n: [] for n in (*layout.keys, *layout.outputs)}

    def add(self, piece: Piece) -> None:
        self.rows += piece.rows
        self.bad += len(piece.bad)
        self.bad_rows += piece.bad[: LISTED - len(self.bad_rows)]
        for name, value in (*piece.keys.items(), *piece.values.items()):
            self._pieces[name].append(value)

    def flush(self) -> None:
        pass

    def commit(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def values(self) -> dict[str, np.ndarray]:
        found = {}
        for name, pieces in self._pieces.items():
            dtype, width = self.layout.outputs.get(name, (np.dtype(object), None))
            empty = np.empty((0,) if width is None else (0, width), dtype)
            found[name] = np.concatenate([np.asarray(p) for p in pieces]) if pieces else empty
        return found


class FileSink:
    """What the three kinds of file share; see the module.

    Args:
        folder: of the unfinished score.
        journal: this rank's; None for chunks that are to be looked at, and not kept.
        rows: of the whole table, None where that is not known yet.
    """

    kind = ""

    _chunk: int  # what is being written, so far
    _rows: int
    _bad: int
    _batch: int
    _length: int
    _crc: int

    def __init__(
        self,
        folder: Path,
        journal: Journal | None,
        rank: int,
        layout: Layout,
        chunk_rows: int,
        rows: int | None,
    ) -> None:
        self.folder, self.journal, self.layout = folder, journal, layout
        self.chunk_rows = chunk_rows
        self.path = folder / self._name(rank)
        self.file: IO[bytes] = open(  # noqa: SIM115
            os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0
        )
        self.end = self.file.seek(0, os.SEEK_END)
        self._finished: list[Entry] = []
        self._last = time.monotonic()
        self._new_chunk()
        self._prepare(rank, rows)

    def add(self, piece: Piece) -> None:
        """The next rows of a chunk; the last of them finish it."""
        if not self._rows:
            self._chunk = piece.start // self.chunk_rows
        self._rows += piece.rows
        self._bad += len(piece.bad)
        self._bad_rows += piece.bad[: LISTED - len(self._bad_rows)]
        self._batch = piece.batch
        self._store(piece)
        if (piece.start + piece.rows) % self.chunk_rows == 0:
            self.flush()

    def flush(self) -> None:
        """Finish the chunk, full or the table's last."""
        if not self._rows:
            return
        self._seal()
        offset = self._offset if self._offset is not None else self.end
        self._finished.append(
            Entry(
                self._chunk, self._rows, self._bad, tuple(self._bad_rows), self._batch,
                self.path.name, offset, self._length, self._crc, processor(),
            )
        )  # fmt: skip
        self._new_chunk()
        if time.monotonic() - self._last > COMMIT_SECONDS:
            self.commit()

    @property
    def uncommitted(self) -> Sequence[Entry]:
        """Finished chunks that are not in the journal."""
        return self._finished

    def commit(self) -> None:
        """Wait until finished chunks are on the disk, and put them into the journal."""
        if not self._finished or self.journal is None:
            return
        os.fsync(self.file.fileno())
        finished, self._finished = self._finished, []
        self.journal.append(entry._asdict() for entry in finished)
        self._last = time.monotonic()

    def close(self) -> None:
        self.file.close()

    def assemble(self, entries: Iterable[Entry], rows: int) -> Path:
        """The complete file of all chunks, in order, on the disk; ValueError for damaged ones."""
        raise NotImplementedError

    def can_hold(self, entry: Entry) -> bool:
        """Whether a chunk of so many rows can be where the journal says."""
        return entry.file.endswith(self.kind)

    def decode(self, data: bytes) -> tuple[list[Any], np.ndarray]:
        """A chunk's keys, column by column, and its results (rows, C) out of its bytes."""
        raise NotImplementedError

    def _name(self, rank: int) -> str:
        return f"data.{rank}{self.kind}"

    def _prepare(self, rank: int, rows: int | None) -> None:
        pass

    def _store(self, piece: Piece) -> None:
        raise NotImplementedError

    def _seal(self) -> None:
        """Write what is left of the chunk."""

    def _new_chunk(self) -> None:
        self._chunk = self._rows = self._bad = self._batch = self._length = self._crc = 0
        self._bad_rows: list[int] = []
        self._offset: int | None = None

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        if self._offset is None:
            self._offset = offset
        self.file.seek(offset)
        write_all(self.file, data)
        self._crc = zlib.crc32(data, self._crc)
        self._length += len(data)
        self.end = max(self.end, offset + len(data))

    def _read(self, entry: Entry) -> Iterable[bytes]:
        crc = 0
        for block in blocks(self.folder / entry.file, entry):
            crc = zlib.crc32(block, crc)
            yield block
        if crc != entry.crc:
            raise ValueError(
                f"{self.folder / entry.file}: chunk {entry.chunk} is damaged: expected CRC "
                f"{entry.crc:08x}, found {crc:08x}; resume does it again"
            )
