"""Files: which ones a source means, what tells them from others, reading, and naming errors."""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...data.errors import FileFormatError
from .base import Unchanged

KINDS = {
    ".npy": ".npy",
    ".npz": ".npz",
    ".bin": ".bin",
    ".mat": ".mat",
    ".csv": ".csv",
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".arrow": "Arrow",
    ".arrows": "Arrow",
    ".feather": "Arrow",
    ".ipc": "Arrow",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".hdf": "HDF5",
    ".he5": "HDF5",
}
WITH_ARRAYS = (".npz", ".mat", "HDF5")  # of which ``::name`` picks one
SAMPLE, SAMPLES = 1 << 14, 64


def kind_of(path: Path) -> str:
    """The format, by the ending; any other is IDX.

    >>> kind_of(Path("rows.feather")), kind_of(Path("t10k-images-idx3-ubyte.gz"))
    ('Arrow', 'IDX')
    """
    return KINDS.get(path.suffix.lower(), "IDX")


@contextmanager
def guarded(path: Path | str, kind: str) -> Iterator[None]:
    """Whatever a parser makes of a broken file is one ValueError that begins with its path."""
    try:
        yield
    except (ImportError, Warning):
        raise
    except FileFormatError as why:
        raise ValueError(f"{path}: {why}") from None
    except Exception as error:
        if type(error) is MemoryError:  # pyarrow has one of its own for a length that cannot be
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path}: not a readable {kind} file, or truncated ({reason})") from error


def expand(source: str | Path | Sequence[str | Path]) -> list[tuple[Path, str | None]]:
    """The files, each with the name after ``::`` that picks an array in it.

    A folder means the Parquet files below it, a pattern all that it matches, both sorted by name.

    Raises:
        ValueError: nothing there, a pattern without a match, a folder without Parquet files, an
            empty list, or ``::`` at a format that holds one array.
    """
    if not isinstance(source, str | Path):
        if not source:
            raise ValueError("source is an empty list, expected one path or more")
        return [found for one in source for found in expand(one)]
    path, key = Path(source), None
    if "::" in str(source) and not path.exists():
        name, _, key = str(source).partition("::")
        path = Path(name)
    path = path.expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _is_part(p, path))
        if not found:
            raise ValueError(f"{path}: expected a folder of Parquet files, found none in it")
    elif not path.exists() and glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        found = [Path(match) for match in matches if os.path.isfile(match)]
        if not found:
            raise ValueError(f"{path}: no file matches this pattern")
    else:
        found = [path]
    for path in found:
        kind = kind_of(path)
        with guarded(path, kind):
            if not path.exists():
                raise FileFormatError("no such file")
            if not path.is_file():
                raise FileFormatError(f"not a readable {kind} file: it is a device")
            if not path.stat().st_size:
                raise FileFormatError(f"not a readable {kind} file: it is empty")
            if key is not None and kind not in WITH_ARRAYS:
                raise FileFormatError(f"'::{key}' picks an array of a .npz, .mat or HDF5 file")
    return [(path, key) for path in found]


def _is_part(path: Path, folder: Path) -> bool:
    hidden = any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)
    return kind_of(path) == "Parquet" and path.is_file() and not hidden


def fingerprint(files: Sequence[tuple[Path, str | None]], about: Sequence[Any]) -> str:
    """Of names, sizes, times and samples (files up to 1 MiB: all they hold), and ``about``."""
    digest = hashlib.sha256(repr(tuple(about)).encode())
    for path, key in files:
        with guarded(path, kind_of(path)), path.open("rb") as file:
            stat = os.fstat(file.fileno())
            said = (path.name, key, stat.st_size, stat.st_mtime_ns)
            digest.update(repr(said).encode())
            last = max(stat.st_size - SAMPLE, 0)
            for place in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


class Untouched(Unchanged):
    """A file as it was when this was made, by what the system says of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = os.stat(path)

    def check(self) -> None:
        """ValueError where the file has been written to, replaced or removed since."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise ValueError(
                f"{self.path}: it was removed while it was read ({error.strerror})"
            ) from None
        if _stamp(now) == _stamp(self._stat):
            return
        what = "it, or its name or permissions, were written to"
        if now.st_size != self._stat.st_size:
            what = f"expected {self._stat.st_size} bytes, found {now.st_size}"
        elif (now.st_dev, now.st_ino) != (self._stat.st_dev, self._stat.st_ino):
            what = "another file has its name"
        raise ValueError(f"{self.path}: it was changed while it was read: {what}")


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def read_into(file: IO[bytes], onto: Any, offset: int) -> None:
    """Fill the buffer ``onto`` with the bytes at ``offset`` of an unbuffered file.

    FileFormatError where the file ends before. Files are read this way and not mapped: touching a
    page that a mapped file has lost ends the process.
    """
    file.seek(offset)
    left = memoryview(onto).cast("B")
    size = len(left)
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise FileFormatError(
                f"truncated: expected {size} bytes at {offset}, found {size - len(left)}"
            )
        left = left[count:]


class Paged:
    """Memory of a file's size that holds those bytes of the file, at their places, that were read.

    Takes no more memory than what is read and not dropped again, and keeps the file open in a
    ``with`` block.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Paged:
        self._file = self._path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        # No memory is set aside for pages that may never be used.
        flags = {"flags": _ANONYMOUS} if _ANONYMOUS else {}
        self.bytes = mmap.mmap(-1, size, **flags)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes from ``start`` up to ``stop``, read anew; FileFormatError beyond the end."""
        if not 0 <= start <= stop <= len(self.bytes):
            raise FileFormatError(
                f"truncated: expected bytes {start} to {stop}, found {len(self.bytes)} bytes"
            )
        place = memoryview(self.bytes)[start:stop]
        read_into(self._file, place, start)
        return place

    def drop(self, start: int, stop: int) -> None:
        """Give back the memory of the pages between ``start`` and ``stop``, which become zeros."""
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.bytes.madvise(mmap.MADV_DONTNEED, start, length)


_ANONYMOUS = 0
if hasattr(mmap, "MAP_ANONYMOUS"):
    _ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
