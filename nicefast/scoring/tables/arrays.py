"""Files of one array, read in rows: .npy, .npz, IDX and HDF5."""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ...data import readers
from ...data.errors import FileFormatError
from .base import STEP, Array, Dtype, Piece, flat, spans
from .files import guarded, kind_of, read_into
from .selection import Wanted, of_array

PROBE, PROBE_SECONDS = Path(__file__).with_name("probe.py"), 60
_Open = Callable[[], AbstractContextManager[IO[bytes]]]

Reader = Callable[[Iterator[tuple[int, int]]], Iterator[Array]]
"""Rows of consecutive spans, (n, *shape) each, as they are stored."""


class Rows:
    """A part that is one array of (N, \\*shape), by whatever reads spans of its rows."""

    names: tuple[str, ...] | None = None

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        reader: Reader,
        wanted: Wanted,
        limited: bool = False,
    ) -> None:
        readers.check_dtype(dtype)
        if dtype.itemsize > 8:
            raise FileFormatError(f"expected numbers of at most 64 bits, got {dtype}")
        if not shape:
            raise FileFormatError("holds one number, expected rows")
        if not math.prod(shape[1:]):
            raise FileFormatError(f"holds rows of no values: shape {shape}")
        readers.check_held(path, "a row", math.prod(shape[1:]) * dtype.itemsize)
        self.name, self.path = str(path), path
        self.rows: int | None = shape[0]
        self.dtype: Dtype = np.dtype(np.uint8 if dtype.kind == "b" else dtype.newbyteorder("="))
        self.key_types: dict[str, Any] = {}
        self._select, self.features = of_array(shape[1:], wanted)
        self._reader = reader
        self._limit = max(1, STEP // (math.prod(shape[1:]) * dtype.itemsize)) if limited else None

    def count(self) -> int:
        return self.rows or 0

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        end = self.count() if stop is None else min(stop, self.count())
        if start >= end:
            return
        with guarded(self.path, kind_of(self.path)):
            for values in self._reader(spans(start, end, first, size, self._limit)):
                yield Piece(flat(values, self._select, dtype), {})


def _stored(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int, columns_first: bool
) -> Reader:
    """Rows of an array that is in the file as it is in memory, from byte ``offset`` on."""
    row = math.prod(shape[1:]) * dtype.itemsize

    def rows(file: IO[bytes], start: int, stop: int) -> Array:
        values = np.empty((stop - start, *shape[1:]), dtype)
        read_into(file, values.reshape(-1).view(np.uint8), offset + start * row)
        return values

    def by_columns(file: IO[bytes], start: int, stop: int) -> Array:
        values = np.empty((*shape[:0:-1], stop - start), dtype)
        for i, column in enumerate(values.reshape(-1, stop - start)):
            place = offset + (i * shape[0] + start) * dtype.itemsize
            read_into(file, column.view(np.uint8), place)
        return values.T

    def read(places: Iterator[tuple[int, int]]) -> Iterator[Array]:
        with path.open("rb", buffering=0) as file:
            if not columns_first:
                for start, stop in places:
                    yield rows(file, start, stop)
                return
            first = last = 0  # rows that are held: many, for each column is read on its own
            held = np.empty((0, *shape[1:]), dtype)
            for start, stop in places:
                if not first <= start <= stop <= last:
                    first, last = start, min(max(stop, start + STEP // 2 // row), shape[0])
                    held = by_columns(file, first, last)
                yield held[start - first : stop - first]

    return read


def _streamed(
    opened: _Open,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    offset: int,
) -> Reader:
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(places: Iterator[tuple[int, int]]) -> Iterator[Array]:
        with opened() as stream:
            at = -offset  # in bytes of values
            stop = 0
            for start, stop in places:
                while at < start * row:
                    at += len(_exactly(stream, min(STEP, start * row - at), at, row * shape[0]))
                data = _exactly(stream, (stop - start) * row, at, row * shape[0])
                at += len(data)
                yield np.frombuffer(data, dtype).reshape(-1, *shape[1:])
            if stop == shape[0] and stream.read(1):  # and the checksums are looked at
                raise FileFormatError(f"expected {row * shape[0]} bytes of values, found more")

    return read


def _exactly(stream: IO[bytes], size: int, before: int, total: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        block = stream.read(min(STEP, size - len(data)))
        if not block:
            found = max(before + len(data), 0)
            raise FileFormatError(f"truncated: expected {total} bytes of values, found {found}")
        data += block
    return data


def npy(path: Path, _: str | None, wanted: Wanted) -> Rows:
    """A ``.npy`` file."""
    with path.open("rb") as stream:
        dtype, shape, columns_first = _header(stream)
        offset, found = stream.tell(), path.stat().st_size
    expected = offset + math.prod(shape) * dtype.itemsize
    if expected != found:
        raise FileFormatError(f"not a readable .npy file: expected {expected} bytes, found {found}")
    return Rows(path, dtype, shape, _stored(path, dtype, shape, offset, columns_first), wanted)


def npz(path: Path, key: str | None, wanted: Wanted) -> Rows:
    """An array of a ``.npz``: read at its place where it is stored, else decompressed forward."""
    with zipfile.ZipFile(path) as archive:
        arrays = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        name = readers.choose_member(arrays, ("X", "x_train"), key)
        info = archive.getinfo(f"{name}.npy")
        readers.check_packing(info)
        with archive.open(info) as stream:
            dtype, shape, columns_first = _header(stream)
            offset = stream.tell()
        expected = offset + math.prod(shape) * dtype.itemsize
        if expected != info.file_size:
            raise FileFormatError(
                f"array {name!r}: expected {expected} bytes, found {info.file_size}"
            )
        begins = _member_begins(path, info)
        if info.compress_type == zipfile.ZIP_STORED and begins + expected <= path.stat().st_size:
            reader = _stored(path, dtype, shape, begins + offset, columns_first)
            return Rows(path, dtype, shape, reader, wanted)
        if columns_first:  # the first row ends with the last bytes
            return held(path, readers.read_member(archive, name), wanted)

    return Rows(
        path,
        dtype,
        shape,
        _streamed(lambda: _Member(path, f"{name}.npy"), dtype, shape, offset),
        wanted,
        limited=True,
    )


class _Member:
    """A member of an archive, open as long as the archive is."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __enter__(self) -> IO[bytes]:
        self._archive = zipfile.ZipFile(self._path)
        return self._archive.open(self._name)

    def __exit__(self, *_: object) -> None:
        self._archive.close()


def _member_begins(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise FileFormatError(
            "not a readable .npz file: a member's header is not where it should be"
        )
    return info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))


def _header(stream: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    # Not np.load, which allocates what the header promises.
    version = np.lib.format.read_magic(stream)
    former = version == (1, 0)
    header = np.lib.format.read_array_header_1_0 if former else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = header(stream)
    readers.check_dtype(dtype)
    return dtype, shape, columns_first


def idx(path: Path, _: str | None, wanted: Wanted) -> Rows:
    """An IDX file: read at its places, or through gzip."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as stream:
        magic = stream.read(4)
        code, dimensions = (magic[2], magic[3]) if magic[:2] == b"\0\0" and magic[3:] else (0, 0)
        if code not in readers.IDX or not dimensions:
            raise FileFormatError(
                "not a readable file of a known format (.npy, .npz, .csv, Parquet, Arrow, HDF5, "
                f".mat, .bin, IDX): expected the magic bytes 00 00 of IDX, a type from 08 to 0e "
                f"and a number of dimensions, found {magic.hex(' ')}"
            )
        sizes = stream.read(4 * dimensions)
        if len(sizes) < 4 * dimensions:
            raise FileFormatError(f"truncated: expected {dimensions} dimensions in the IDX header")
    shape = struct.unpack(f">{dimensions}I", sizes)
    dtype, offset = np.dtype(readers.IDX[code]), 4 + 4 * dimensions
    if zipped:
        reader = _streamed(cast(_Open, partial(gzip.open, path)), dtype, shape, offset)
        return Rows(path, dtype, shape, reader, wanted, limited=True)
    expected, found = math.prod(shape) * dtype.itemsize, path.stat().st_size - offset
    if expected != found:
        raise FileFormatError(f"truncated: expected {expected} bytes of values, found {found}")
    return Rows(path, dtype, shape, _stored(path, dtype, shape, offset, False), wanted)


def hdf5(path: Path, key: str | None, wanted: Wanted) -> Rows:
    """A dataset of an HDF5 file, in slices."""
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        message = f"{path}: HDF5 needs h5py: pip install 'nicefast[hdf5]'"
        raise ImportError(message) from error

    def opened() -> Any:
        # As much of a dataset's chunks as a block may cut through, or each is unpacked repeatedly.
        return h5py.File(path, "r", rdcc_nbytes=1 << 26)

    found = _probed(path, key)
    name, shape, dtype = found["name"], tuple(found["shape"]), np.dtype(found["dtype"])
    readers.check_held(path, "a chunk", found["chunk"])

    def read(places: Iterator[tuple[int, int]]) -> Iterator[Array]:
        with opened() as file:
            for start, stop in places:
                yield file[name][start:stop]

    return Rows(path, dtype, shape, read, wanted)


def _probed(path: Path, key: str | None) -> dict[str, Any]:
    """What :mod:`.probe` says of the file, from a process that a damaged file may end."""
    request = {"sys_path": sys.path, "path": str(path), "key": key}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(PROBE)],
            input=json.dumps(request).encode(),
            capture_output=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FileFormatError(
            f"not a readable HDF5 file: the library was not done with it in {PROBE_SECONDS} seconds"
        ) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        died = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise FileFormatError(
            f"not a readable HDF5 file: the library ended with {died} when it read it"
        ) from None
    if "failed" in answer:
        raise FileFormatError(f"not a readable HDF5 file, or truncated ({answer['failed']})")
    if "wrong" in answer:
        raise FileFormatError(answer["wrong"])
    found: dict[str, Any] = answer
    return found


def other(path: Path, key: str | None, wanted: Wanted) -> Rows:
    """MATLAB and CIFAR-10 files, which are read whole."""
    return held(path, readers.read(path, key).values, wanted)


def held(path: Path, values: Array, wanted: Wanted) -> Rows:
    """An array in memory."""

    def read(places: Iterator[tuple[int, int]]) -> Iterator[Array]:
        for start, stop in places:
            yield values[start:stop]

    return Rows(path, values.dtype, values.shape, read, wanted)
