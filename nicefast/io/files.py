"""Files that are there whole or not at all, on the disk and with the usual permissions."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, or the largest file


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden path beside ``path``, of the same ending, to write to; it gets its name when the
    block has ended well and the content is on the disk.

    After an error nothing is left of it, and ``path`` is what it was. The file gets the
    permissions that the umask leaves. OSError names ``path`` where the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written(folder + "/file.txt") as partial:
    ...         _ = partial.write_text("all of it")
    ...     os.listdir(folder)
    ['file.txt']
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        with naming(path):
            yield partial
            put(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put(partial: Path, path: Path) -> None:
    """Give the complete ``partial``, a file or a folder beside it, the name ``path``, for good."""
    if not partial.is_dir() and (mode := _usual_mode(partial)) != partial.stat().st_mode & 0o777:
        os.chmod(partial, mode)
    sync(partial)
    os.replace(partial, path)
    sync_names(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            sync(inside)
        sync_names(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_names(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where a system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """In this block, an error that says that a disk is full names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def _usual_mode(partial: Path) -> int:
    """The permissions of a new file in the same folder, which only the system knows: asking for the
    umask would set it for other threads, too."""
    probe = partial.with_name(f"{partial.name}.mode")
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()
