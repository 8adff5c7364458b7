"""What can be compressed: files and folders as rows of integers, and those rows as files again.

A source has a kind, rows, and a wrapper: what its file holds besides its values, in as few bytes as
will do. ``pieces`` are the bytes that decoding has to give back, in order; a :class:`Sink` of the
same kind writes them from rows and wrapper.

IDX files (uint8, gzipped or not: what comes back is the unzipped file), ``.npy`` arrays of
integers, ``.csv`` tables of integers, folders of PNG images (names and pixels come back, the files
are written anew).
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ..data.header import number_of
from ..data.readers import read
from ..io.files import put

Integers = npt.NDArray[np.int64]
KINDS = ("idx", "npy", "csv", "png")
BLOCK = 1 << 20
MOST_WRAPPER = 1 << 26  # bytes, unpacked


class Source(NamedTuple):
    """Integers (size, features), a range of rows at a time."""

    kind: str
    size: int
    features: int
    wrapper: bytes
    rows: Callable[[int, int], Integers]
    pieces: Callable[[], Iterator[bytes]]


def open_source(path: str | os.PathLike[str]) -> Source:
    """The source at ``path``; ValueError or FileNotFoundError for what is none."""
    path = Path(path)
    if path.is_dir():
        return _png_source(path)
    if not path.is_file():
        raise FileNotFoundError(f"input {path}: no such file or folder")
    empty = _empty(path)
    kind = {".npy": "npy", ".csv": "csv"}.get(path.suffix.lower(), "idx")
    if empty is not None:
        values = empty
    elif kind == "csv":
        values = read(
            path, header=all(number_of(cell) is None for cell in _first_cells(path))
        ).values
    else:
        values = read(path).values
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"input {path} must hold integers, got {values.dtype}: compression is of levels"
        )
    if kind == "idx" and (path.suffix.lower() in (".npz", ".mat", ".parquet", ".bin")):
        raise ValueError(f"input {path} must be IDX, .npy, .csv or a folder of PNG images")
    if values.ndim < 2:
        raise ValueError(f"input {path} must hold rows, got shape {values.shape}")
    wrapper = {"idx": _idx_wrapper, "npy": _npy_wrapper, "csv": _csv_wrapper}[kind](path, values)

    def rows(start: int, stop: int) -> Integers:
        part = values[start:stop]
        if part.dtype == np.uint64 and part.size and part.max() > np.iinfo(np.int64).max:
            raise ValueError(f"input {path} has integers beyond 2^63 in rows {start} to {stop}")
        return part.reshape(len(part), features).astype(np.int64)

    features = math.prod(values.shape[1:])
    return Source(kind, len(values), features, wrapper, rows, lambda: _file_pieces(path))


def _empty(path: Path) -> npt.NDArray[Any] | None:
    """The array of a file without rows, which :func:`read` refuses; None for any other file."""
    kind, pieces = path.suffix.lower(), _file_pieces(path)
    try:
        start = next(pieces, b"")
    except (OSError, EOFError, zlib.error):
        return None
    if kind == ".csv":
        lines = start.decode("latin1").splitlines()
        if len(lines) > 1 or any(map(str.isdigit, "".join(lines))):  # rather a row than names
            return None
        return np.empty((0, lines[0].count(",") + 1 if lines else 0), np.int64)
    if kind == ".npy" and start[:8] == b"\x93NUMPY\x01\0":
        try:
            shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(start[8:]))
        except ValueError:
            return None
        return np.empty(shape, dtype) if shape[:1] == (0,) and dtype.kind in "iufb" else None
    if start[:3] == b"\0\0\x08" and len(start) == 4 + 4 * start[3] and not any(start[4:8]):
        return np.empty(struct.unpack(f">{start[3]}I", start[4:]), np.uint8)
    return None


def _file_pieces(path: Path) -> Iterator[bytes]:
    """The file's bytes, unzipped."""
    with path.open("rb") as raw:
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        with cast(IO[bytes], gzip.GzipFile(fileobj=raw) if zipped else raw) as stream:
            while block := stream.read(BLOCK):
                yield block


class Sink:
    """Writes rows as they came, beside ``path``, which gets its name in :meth:`finish`.

    ``wrapper`` and ``count`` are from outside: ValueError where they are none of this kind.
    """

    def __init__(
        self, kind: str, count: int, features: int, wrapper: bytes, path: str | os.PathLike[str]
    ) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        self._file: IO[bytes] | None = None
        maker = {"idx": _idx_writer, "npy": _npy_writer, "csv": _csv_writer, "png": _png_writer}
        try:
            self._head, self._write = maker[kind](count, features, wrapper)
        except (KeyError, IndexError, TypeError, ValueError, struct.error, zlib.error) as problem:
            raise ValueError(f"what is around the values is no {kind}: {problem}") from None
        self._folder = kind == "png"

    def __enter__(self) -> Sink:
        if self._folder:
            self._partial.mkdir(parents=True)
        else:
            self._file = self._partial.open("wb")
        return self

    def begin(self) -> bytes:
        """What comes before the values."""
        if self._file is not None:
            self._file.write(self._head)
        return self._head

    def put(self, rows: Integers) -> bytes:
        """The bytes of more rows."""
        data = self._write(rows, self._partial if self._folder else None)
        if self._file is not None:
            self._file.write(data)
        return data

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
        put(self._partial, self.path)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        self._partial.unlink(missing_ok=True)


_Writer = tuple[bytes, Callable[[Integers, Path | None], bytes]]


def _checked(count: int, features: int, shape: Sequence[int]) -> None:
    if shape[0] != count or math.prod(shape[1:]) != features:
        raise ValueError(f"shape {tuple(shape)} for {count} rows of {features} features")


# IDX: the dimensions after the first ------------------------------------------------------------


def _idx_wrapper(path: Path, values: npt.NDArray[Any]) -> bytes:
    if values.dtype != np.uint8:
        raise ValueError(f"input {path} must hold uint8, as images in IDX do, got {values.dtype}")
    return struct.pack(f">{values.ndim - 1}I", *values.shape[1:])


def _idx_writer(count: int, features: int, wrapper: bytes) -> _Writer:
    dims = struct.unpack(f">{len(wrapper) // 4}I", wrapper)
    _checked(count, features, (count, *dims))
    head = bytes([0, 0, 8, len(dims) + 1]) + struct.pack(f">{len(dims) + 1}I", count, *dims)
    return head, lambda rows, _: rows.astype(np.uint8).tobytes()


# .npy: dtype and shape, or the whole header, where it is not NumPy's own --------------------------


def _npy_wrapper(path: Path, values: npt.NDArray[Any]) -> bytes:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        reader = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        _, fortran, dtype = reader(file)
        size = file.tell()
        file.seek(0)
        header = file.read(size)
    if fortran and values.ndim > 1:
        raise ValueError(f"input {path} is in Fortran order: save numpy.ascontiguousarray of it")
    own = json.dumps([dtype.str, *values.shape[1:]], separators=(",", ":")).encode()
    if _npy_header(dtype, values.shape) == header:
        return own
    return own + b"\0" + zlib.compress(header, 9)


def _npy_header(dtype: np.dtype[Any], shape: Sequence[int]) -> bytes:
    out = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, about)
    return out.getvalue()


def _npy_writer(count: int, features: int, wrapper: bytes) -> _Writer:
    own, _, header = wrapper.partition(b"\0")
    name, *dims = json.loads(own)
    dtype = np.dtype(name)
    if dtype.kind not in "iu":
        raise ValueError(f"dtype {dtype}")
    _checked(count, features, (count, *dims))
    head = _unpacked(header) if header else _npy_header(dtype, (count, *dims))

    def write(rows: Integers, _: Path | None) -> bytes:
        cast_rows = rows.astype(dtype)
        if (cast_rows.astype(np.int64) != rows).any():
            raise ValueError(f"values that are no {dtype}")
        return cast_rows.tobytes()

    return head, write


# .csv: the header line and the ends of lines ------------------------------------------------------


def _csv_wrapper(path: Path, values: npt.NDArray[Any]) -> bytes:
    with path.open("rb") as file:
        first = final_line = file.readline()
        for line in file:
            final_line = line
        final = final_line.endswith(b"\n")
    end = "\r\n" if first.endswith(b"\r\n") else "\n"
    head = first.decode()
    cells = head.strip().split(",")
    about = ["" if _are_integers(cells) else head, end, final]
    if about == ["", "\n", True]:
        return b""
    return zlib.compress(json.dumps(about).encode(), 9)


def _first_cells(path: Path) -> list[str]:
    with path.open("rb") as file:
        return file.readline().decode("utf-8", "replace").strip().split(",")


def _are_integers(cells: Sequence[str]) -> bool:
    return all(cell.strip().lstrip("+-").isdigit() for cell in cells)


def _csv_writer(count: int, features: int, wrapper: bytes) -> _Writer:
    head, end, final = json.loads(_unpacked(wrapper)) if wrapper else ("", "\n", True)
    left = count

    def write(rows: Integers, _: Path | None) -> bytes:
        nonlocal left
        left -= len(rows)
        lines = [",".join(map(str, row)) for row in rows.tolist()]
        text = end.join(lines) + ("" if not lines or (left == 0 and not final) else end)
        return text.encode()

    return head.encode(), write


# folders of PNG: size, bands and names ------------------------------------------------------------


def _png_source(path: Path) -> Source:
    image = _pillow()
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if not name.lower().endswith(".png")]
    if not names or others:
        found = others[0] if others else "nothing"
        raise ValueError(f"input {path} must be a folder of PNG images alone, got {found}")

    def pixels(name: str) -> npt.NDArray[np.uint8]:
        try:
            with image.open(path / name) as opened:
                if opened.format != "PNG" or opened.mode not in ("L", "RGB"):
                    raise ValueError(f"expected a PNG of mode L or RGB, got mode {opened.mode}")
                if getattr(opened, "n_frames", 1) > 1 or "transparency" in opened.info:
                    raise ValueError(
                        "expected one opaque picture, got several or a transparent one"
                    )
                found = np.asarray(opened)
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as problem:
            raise ValueError(f"input {path / name}: {problem}") from None
        return found if found.ndim == 2 else found.transpose(2, 0, 1)

    shape = pixels(names[0]).shape

    def rows(start: int, stop: int) -> Integers:
        found = [pixels(name) for name in names[start:stop]]
        for name, one in zip(names[start:stop], found, strict=True):
            if one.shape != shape:
                raise ValueError(
                    f"input {path / name} has shape {one.shape}, where {names[0]} has {shape}"
                )
        return np.stack(found).reshape(len(found), -1).astype(np.int64)

    wrapper = zlib.compress(json.dumps([shape, names]).encode(), 9)

    def pieces() -> Iterator[bytes]:
        yield _png_head(shape, names)
        for name in names:
            yield pixels(name).tobytes()

    return Source("png", len(names), math.prod(shape), wrapper, rows, pieces)


def _png_head(shape: Sequence[int], names: Sequence[str]) -> bytes:
    return json.dumps([list(shape), list(names)]).encode()


def _png_writer(count: int, features: int, wrapper: bytes) -> _Writer:
    image = _pillow()
    shape, names = json.loads(_unpacked(wrapper))
    _checked(count, features, (len(names), *shape))
    if len({*names}) != count or any(
        Path(name).name != name or name[:1] in ("", ".") for name in names
    ):
        raise ValueError("names of files that are no names of files")
    left = iter(names)

    def write(rows: Integers, folder: Path | None) -> bytes:
        assert folder is not None
        for row in rows.astype(np.uint8).reshape(-1, *shape):
            picture = row if row.ndim == 2 else row.transpose(1, 2, 0)
            image.fromarray(np.ascontiguousarray(picture)).save(folder / next(left))
        return rows.astype(np.uint8).tobytes()

    return _png_head(shape, names), write


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, MOST_WRAPPER)
    if not unpacker.eof:
        raise ValueError("it is cut off, or too long")
    return found


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            "folders of PNG images need pillow: pip install 'nicefast[compress]'"
        ) from None
    return Image
