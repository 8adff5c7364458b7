"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden path beside ``path``, of the same ending, to write to; it gets its name when the
    block has ended well. After an error nothing is left of it, and ``path`` is what it was.

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
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
