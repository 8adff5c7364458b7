"""Arrays out of files: IDX, CIFAR-10 binary, MATLAB 5, .npy, .npz, .csv and .parquet.

A file is material from outside. Nothing in it is executed or unpickled, and memory grows with what
it holds, never with what its header promises.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import math
import struct
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from .errors import FileFormatError
from .header import LOOKED_AT, Header, is_header, said_header
from .matlab import BLOCK, elements

_Array = np.ndarray[Any, np.dtype[Any]]

HELD, EXPANSION = 1 << 28, 256  # bytes, and times a file's size, that may be held at once
MOST_LINE = 1 << 22  # characters in a row of a CSV file


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        values: the rows, first axis first; integers, bools or finite floats, in the byte order of
            this machine. A ``.npy`` file is mapped into memory, not read.
        labels: (N,), int64, where the format has one label for each row.
        columns: the columns' names, where the file has them.
    """

    values: _Array
    labels: _Array | None = None
    columns: tuple[str, ...] | None = None


def read(path: str | Path, key: str | None = None, header: Header = "auto") -> Content:
    """Read one file; its ending says the format, and any other ending is IDX, gzipped or not.

    ======== ======================================================================================
    IDX      every type code; big-endian, as in MNIST's files
    .bin     CIFAR-10 binary: (N, 3, 32, 32) uint8 and labels 0 .. 9
    .mat     MATLAB 5: SVHN's cropped digits (``X``, ``y``; label 10 is digit 0): (N, 3, 32, 32);
             TFD (``images``, ``labs_ex``): (N, 48, 48) or (N, 96, 96); else its only array
    .npy     an array, never a pickle
    .npz     the array ``X``, ``x_train``, or the only one; ``y`` or ``y_train`` are labels
    .csv     numbers between commas, under a header or none: (N, columns), int64 or float64
    .parquet integer, floating and boolean columns: (N, columns); needs pyarrow
    ======== ======================================================================================

    Args:
        path: the file.
        key: which array of a ``.npz`` or ``.mat`` file, as it stands there.
        header: of ``.csv``: whether the first line is one, True, False or "auto", the rule of
            :func:`nicefast.data.header.is_header`.

    Raises:
        ValueError: the file is missing, empty, corrupt, shorter or longer than its header says;
            of another format; it holds Python objects, text, complex numbers or values that are
            not finite. The message begins with the path.
        ImportError: ``.parquet`` without pyarrow.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "table.csv"
    >>> _ = file.write_text("height,weight\\n1,2\\n3,4\\n")
    >>> read(file).columns, read(file).values.tolist()
    (('height', 'weight'), [[1, 2], [3, 4]])
    """
    path = Path(path)
    kind = path.suffix.lower() if has_format(path) else "IDX"
    try:
        if not path.exists():
            raise FileFormatError("no such file")
        if not path.is_file():
            raise FileFormatError(f"not a readable {kind} file: it is a folder or a device")
        if not path.stat().st_size:
            raise FileFormatError(f"not a readable {kind} file: it is empty")
        if key is not None and kind not in (".npz", ".mat"):
            raise FileFormatError(f"key selects an array of a .npz or .mat file, got {key!r}")
        if kind != ".csv" and said_header(header) is not None:
            raise FileFormatError(f"header is for .csv files, got {header!r}")
        content = _csv(path, header) if kind == ".csv" else _READERS.get(kind, _idx)(path, key)
        _check(content)
    except (ImportError, Warning):
        raise
    except FileFormatError as why:
        raise ValueError(f"{path}: {why}") from None
    except Exception as why:  # whatever a parser makes of a corrupt file
        reason = f"{type(why).__name__}: {why}"
        raise ValueError(f"{path}: not a readable {kind} file, or truncated ({reason})") from why
    return content


def has_format(path: str | Path) -> bool:
    """Whether the ending names one of the formats other than IDX.

    >>> has_format("table.csv"), has_format("train-images-idx3-ubyte")
    (True, False)
    """
    return Path(path).suffix.lower() in (".csv", *_READERS)


def check_held(path: Path, what: str, size: int) -> None:
    """FileFormatError where ``what``, held in memory at once, takes more than can be meant.

    That is 256 MiB, or 256 times the file's size where this is more.
    """
    found = path.stat().st_size
    if size > max(HELD, EXPANSION * found):
        raise FileFormatError(f"{what} would take {size} bytes of memory, in a file of {found}")


def check_parquet(path: Path, file: Any) -> None:
    """FileFormatError where a column in a row group would take more memory than can be meant."""
    meta = file.metadata
    for i in range(meta.num_row_groups):
        for j in range(meta.num_columns):
            column = meta.row_group(i).column(j)
            what = f"column {column.path_in_schema!r} in row group {i}"
            check_held(path, what, column.total_uncompressed_size)
            if meta.schema.column(j).max_repetition_level:  # a row may have all of them
                check_held(path, what, column.num_values * 8)


def csv_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """The number of the last line and the cells of each row that has any.

    FileFormatError for a row of more than 4 MiB, before more of it is read.
    """
    held = 0
    with path.open(encoding="utf-8-sig", errors=errors, newline="") as text:

        def lines() -> Iterator[str]:
            nonlocal held
            while line := text.readline(MOST_LINE + 1):
                held += len(line)
                if held > MOST_LINE:
                    raise FileFormatError(
                        f"line {rows.line_num + 1}: expected rows of at most {MOST_LINE} "
                        f"characters, found a longer one"
                    )
                yield line

        rows = csv.reader(lines())
        for cells in rows:
            held = 0
            if cells:
                yield rows.line_num, cells


def check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "fiub":
        named = {"O": "Python objects", "c": "complex numbers", "U": "text", "S": "text"}
        held = named.get(dtype.kind, "values that are no numbers")
        raise FileFormatError(f"expected a real or integer dtype, got {held} ({dtype})")


def _check(content: Content) -> None:
    values = content.values
    check_dtype(values.dtype)
    if values.ndim == 0 or values.size == 0:
        raise FileFormatError(f"holds no rows: shape {values.shape}")
    # The extremes are NaN where any value is, and take no memory, unlike isfinite of everything.
    if values.dtype.kind == "f" and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        place = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
        column = f", column {content.columns[place[1]]!r}" if content.columns else ""
        raise FileFormatError(
            f"holds values that are not finite: {values[place]} at {place}{column}"
        )
    if content.labels is not None and len(content.labels) != len(values):
        raise FileFormatError(f"expected {len(values)} labels, found {len(content.labels)}")


def _payload(stream: IO[bytes], size: int) -> bytearray:
    """The stream's last ``size`` bytes, neither more nor fewer, read as they come."""
    data = bytearray()
    while len(data) < size:
        block = stream.read(min(BLOCK, size - len(data)))
        if not block:
            raise FileFormatError(f"truncated: expected {size} bytes of values, found {len(data)}")
        data += block
    if stream.read(1):
        raise FileFormatError(f"expected {size} bytes of values, found more")
    return data


def _array(data: bytearray | memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> _Array:
    if not data:
        return np.empty(shape, dtype)
    values = np.frombuffer(data, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


IDX = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _idx(path: Path, _: str | None) -> Content:
    with path.open("rb") as raw:
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        with cast(IO[bytes], gzip.GzipFile(fileobj=raw) if zipped else raw) as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX or not magic[3]:
                known = ", ".join((*sorted((".csv", *_READERS)), "IDX"))
                raise FileFormatError(
                    f"not a readable file of a known format ({known}): expected the magic bytes "
                    f"00 00 of IDX, a type from 08 to 0e and a number of dimensions, found "
                    f"{magic.hex(' ')}"
                )
            sizes = stream.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise FileFormatError(
                    f"truncated: expected {magic[3]} dimensions in the IDX header"
                )
            shape, dtype = struct.unpack(f">{magic[3]}I", sizes), np.dtype(IDX[magic[2]])
            data = _payload(stream, math.prod(shape) * dtype.itemsize)
            return Content(_array(data, dtype, shape))


def _cifar(path: Path, _: str | None) -> Content:
    row, size = 1 + 3 * 32 * 32, path.stat().st_size
    if size % row:
        raise FileFormatError(
            f"expected CIFAR-10 records of {row} bytes, found {size} bytes: "
            f"{size % row} more than {size // row} records"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, row)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        at = int(labels.argmax())
        raise FileFormatError(f"expected CIFAR-10 labels 0 .. 9, found {labels[at]} in record {at}")
    return Content(np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), labels)


def _npy(path: Path, _: str | None) -> Content:
    # open_memmap reads no pickles and no archives, and checks the length before it maps.
    values = np.lib.format.open_memmap(path, mode="r")
    expected, found = values.offset + values.nbytes, path.stat().st_size
    if expected != found:
        raise FileFormatError(f"not a readable .npy file: expected {expected} bytes, found {found}")
    return Content(values)


def _npz(path: Path, key: str | None) -> Content:
    with zipfile.ZipFile(path) as archive:
        arrays = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        name = choose_member(arrays, ("X", "x_train"), key)
        values, beside = read_member(archive, name), {"X": "y", "x_train": "y_train"}.get(name)
        if key is not None or beside not in arrays:
            return Content(values)
        labels = read_member(archive, beside)
        one_each = labels.dtype.kind in "iub" and labels.size == len(values)
        return Content(values, _labels(beside, labels) if one_each else None)


def read_member(archive: zipfile.ZipFile, name: str) -> _Array:
    # Not np.load, which allocates what the member's header promises.
    check_packing(archive.getinfo(f"{name}.npy"))
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, columns_first, dtype = header(stream)
        check_dtype(dtype)  # before memory is taken; text may have 0 bytes a cell
        data = _payload(stream, math.prod(shape) * dtype.itemsize)
        values = _array(data, dtype, shape[::-1] if columns_first else shape)
        return values.T if columns_first else values


def check_packing(member: zipfile.ZipInfo) -> None:
    """FileFormatError for other compressions than NumPy's, which may expand much further."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileFormatError(
            f"array {member.filename.removesuffix('.npy')!r}: expected a member that is stored or "
            f"deflated, found compression type {member.compress_type}"
        )


def choose_member(names: list[str], usual: tuple[str, ...], key: str | None) -> str:
    wanted = usual if key is None else (key,)
    for name in wanted:
        if name in names:
            return name
    if key is None and len(names) == 1:
        return names[0]
    text = " or ".join(map(repr, wanted))
    raise FileFormatError(f"expected an array called {text}, found {', '.join(names) or 'none'}")


def _labels(name: str, values: _Array) -> _Array:
    labels = values.reshape(-1)
    if labels.dtype.kind == "f" and not (labels == np.rint(labels)).all():
        raise FileFormatError(f"expected whole numbers as labels {name!r}")
    return labels.astype(np.int64)


def _csv(path: Path, header: Header) -> Content:
    columns: tuple[str, ...] | None = None
    width = 0
    numbers: array = array("q")  # 64-bit integers, until a cell is none
    rows = csv_rows(path)
    first = list(itertools.islice(rows, 1 + LOOKED_AT))
    if first:
        cells = first[0][1]
        width = len(cells)
        if is_header(str(path), cells, [row for _, row in first[1:]], header):
            columns = tuple(cell.strip() for cell in cells)
            del first[0]
    for line, cells in itertools.chain(first, rows):
        row = _numbers(cells)
        if len(cells) != width:
            raise FileFormatError(f"line {line}: expected {width} cells, found {len(cells)}")
        if row is None:
            at = next(i for i, cell in enumerate(cells) if _numbers([cell]) is None)
            found = f"line {line}, column {at + 1}: expected a number"
            raise FileFormatError(f"{found}, found {cells[at][:40]!r}")
        if numbers.typecode == "q" and row.typecode == "d":
            numbers = array("d", numbers)
        numbers.extend(row if row.typecode == numbers.typecode else array("d", row))
    values = np.array(numbers, np.int64 if numbers.typecode == "q" else np.float64)
    return Content(values.reshape(-1, width or 1), None, columns)


def _numbers(cells: list[str]) -> array | None:
    """A row's cells as 64-bit integers, else as floats, else None."""
    for code, number in (("q", int), ("d", float)):
        try:
            # Python's own 1_000 is not a number in a table.
            return None if any("_" in cell for cell in cells) else array(code, map(number, cells))
        except (ValueError, OverflowError):
            continue
    return None


def _parquet(path: Path, _: str | None) -> Content:
    try:
        import pyarrow.parquet as pq
        from pyarrow import types
    except ImportError as error:
        message = f"{path}: .parquet needs pyarrow: pip install 'nicefast[train]'"
        raise ImportError(message) from error
    with pq.ParquetFile(path) as file:
        for field in file.schema_arrow:
            real = (types.is_integer, types.is_floating, types.is_boolean)
            if not any(is_type(field.type) for is_type in real):
                wanted = f"column {field.name!r}: expected integers, floats or bools"
                raise FileFormatError(f"{wanted}, got {field.type}")
        check_parquet(path, file)
        meta = file.metadata
        check_held(path, "its values", meta.num_rows * meta.num_columns * 8)
        table = file.read()
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise FileFormatError(f"column {name!r}: {column.null_count} of its values are missing")
    values = np.column_stack([column.to_numpy() for column in table.columns])
    return Content(values, None, tuple(table.column_names))


def _mat(path: Path, key: str | None) -> Content:
    arrays = dict(elements(memoryview(path.read_bytes())))  # not mapped: it may be cut off
    name = choose_member(list(arrays), ("X", "images"), key)
    values = arrays[name]
    if key is None and name == "X" and "y" in arrays and values.shape[:3] == (32, 32, 3):
        labels = _labels("y", arrays["y"])
        if labels.min() < 0 or labels.max() > 10:
            raise FileFormatError(
                f"expected SVHN labels 1 .. 10, found {labels.min()}..{labels.max()}"
            )
        return Content(np.ascontiguousarray(values.transpose(3, 2, 0, 1)), labels % 10)
    if key is None and name == "images" and values.ndim == 3:
        each = _labels("labs_ex", arrays["labs_ex"]) if "labs_ex" in arrays else None
        if values.shape[1] != values.shape[2] or (each is not None and len(each) != len(values)):
            values = values.transpose(2, 0, 1)
        return Content(np.ascontiguousarray(values), each)
    return Content(np.ascontiguousarray(values))


_READERS: dict[str, Callable[[Path, str | None], Content]] = {
    ".bin": _cifar,
    ".mat": _mat,
    ".npy": _npy,
    ".npz": _npz,
    ".parquet": _parquet,
}
