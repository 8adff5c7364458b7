"""Files: which ones a source means, what tells them from others, mapping, and naming errors."""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...data.matlab import WrongError
from .base import Array

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
RELEASE = 1 << 25  # bytes of a mapped file, once read, that stay in this process's memory
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
    except ImportError:
        raise
    except WrongError as why:
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
                raise WrongError("no such file")
            if not path.is_file():
                raise WrongError(f"not a readable {kind} file: it is a device")
            if not path.stat().st_size:
                raise WrongError(f"not a readable {kind} file: it is empty")
            if key is not None and kind not in WITH_ARRAYS:
                raise WrongError(f"'::{key}' picks an array of a .npz, .mat or HDF5 file")
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


class Mapped:
    """A file mapped into memory, read-only, whose pages are let go of once they were read.

    They come back where they are still looked at: only how much is held changes.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read = 0

    def array(
        self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int, columns_first: bool
    ) -> Array:
        """The array of ``shape`` that begins at byte ``offset``."""
        if 0 in shape:
            return np.empty(shape, dtype)
        values = np.ndarray(shape[::-1] if columns_first else shape, dtype, self.bytes, offset)
        return values.T if columns_first else values

    def check(self) -> None:
        """WrongError where the file has become shorter: its pages must not be touched."""
        if self.bytes.size() < len(self.bytes):
            raise WrongError(
                f"it was changed while it was read: expected {len(self.bytes)} bytes, "
                f"found {self.bytes.size()}"
            )

    def taken(self, size: int) -> None:
        """Note that ``size`` bytes have been read."""
        self._read += size
        if self._read >= RELEASE and hasattr(mmap, "MADV_DONTNEED"):
            self.bytes.madvise(mmap.MADV_DONTNEED)
            self._read = 0
