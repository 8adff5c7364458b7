"""The file that compression writes: ``NFZ`` and a version, a head, chunks, two checksums.

======== ==========================================================================================
4 bytes  ``NFZ1``
1        kind of what was compressed
8, 6     digests of the model and of the arithmetic
varints  rows; number of the wrapper's bytes
...      the wrapper: what is left of the source besides its values
...      chunks: number of words as a varint, words of 32 bits, least byte first
8        digest of what decoding must give
6        digest of all before it
======== ==========================================================================================

Nothing is believed before the last digest has been checked, and nothing is allocated that the
file's own size does not warrant.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

MAGIC, VERSION = b"NFZ", b"1"
MODEL, ARITHMETIC, CONTENT, SEAL = 8, 6, 8, 6  # bytes of the digests
BLOCK = 1 << 20

Words = npt.NDArray[np.uint32]


class Head(NamedTuple):
    """What stands before the chunks."""

    kind: int
    model: bytes
    arithmetic: bytes
    rows: int
    wrapper: bytes


class Writer:
    """Writes a container piece by piece."""

    def __init__(self, file: IO[bytes], head: Head) -> None:
        self._file, self._seal = file, hashlib.blake2b(digest_size=SEAL)
        self._put(MAGIC + VERSION + bytes([head.kind]))
        self._put(head.model[:MODEL] + head.arithmetic[:ARITHMETIC])
        self._put(_varint(head.rows) + _varint(len(head.wrapper)) + head.wrapper)

    def chunk(self, words: Words) -> None:
        self._put(_varint(len(words)) + words.astype("<u4").tobytes())

    def finish(self, content: bytes) -> None:
        self._put(content[:CONTENT])
        self._file.write(self._seal.digest())

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._seal.update(data)


class Reader:
    """Reads a container whose last digest is right; ValueError for any other file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(4)
            if start[:3] != MAGIC:
                raise ValueError(f"{path} is not a file that nicefast compressed")
            if start[3:] != VERSION:
                raise ValueError(f"{path} is of another version, {start[3:]!r}, than {VERSION!r}")
            self._end = size - SEAL - CONTENT
            if self._end < file.tell() or _seal(file, size - SEAL) != file.read(SEAL):
                raise ValueError(f"{path} is damaged: its checksum is not that of its bytes")
            file.seek(self._end)
            self.content = file.read(CONTENT)
            file.seek(4)
            self.head = self._head(file)
            self._start = file.tell()

    def _head(self, file: IO[bytes]) -> Head:
        kind = self._bytes(file, 1)[0]
        model, arithmetic = self._bytes(file, MODEL), self._bytes(file, ARITHMETIC)
        rows = self._varint(file)
        return Head(kind, model, arithmetic, rows, self._bytes(file, self._varint(file)))

    def chunks(self, most: int) -> Iterator[tuple[int, Words]]:
        """``(rows, words)`` of each chunk, of ``most`` rows but for the last."""
        left = self.head.rows
        with self.path.open("rb") as file:
            file.seek(self._start)
            while left:
                words = np.frombuffer(self._bytes(file, 4 * self._varint(file)), "<u4")
                rows = min(left, most)
                left -= rows
                yield rows, words.astype(np.uint32)
            if file.tell() != self._end:
                raise ValueError(f"{self.path} holds more than its {self.head.rows} rows")

    def _bytes(self, file: IO[bytes], count: int) -> bytes:
        if file.tell() + count > self._end:
            raise ValueError(f"{self.path} ends before what its head promises")
        return file.read(count)

    def _varint(self, file: IO[bytes]) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self._bytes(file, 1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"{self.path} has a number of more than 63 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _seal(file: IO[bytes], size: int) -> bytes:
    """Digest of the first ``size`` bytes; the file stands behind them."""
    file.seek(0)
    seal = hashlib.blake2b(digest_size=SEAL)
    while size:
        block = file.read(min(BLOCK, size))
        if not block:
            break
        size -= len(block)
        seal.update(block)
    return seal.digest()
