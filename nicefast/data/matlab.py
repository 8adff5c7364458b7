"""Numeric arrays out of MATLAB 5 files, in memory that what is there bounds, not what is promised.

:func:`scipy.io.loadmat` allocates what an element's header claims.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors import FileFormatError

BLOCK = 2**20
_Array = np.ndarray[Any, np.dtype[Any]]


# MATLAB's classes of arrays, and the types its numbers are stored in, maybe narrower.
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_CLASSES |= {14: "i8", 15: "u8"}
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_STORED |= {12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED, _COMPLEX = 14, 15, 0x0800


def elements(data: memoryview) -> Iterator[tuple[str, _Array]]:
    """Name and array of each real array in a MATLAB 5 file."""
    marks = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
    order = marks.get(bytes(data[124:128]))
    if order is None:
        hint = " (MATLAB 7.3: save it with -v7)" if bytes(data[:10]) == b"MATLAB 7.3" else ""
        found = bytes(data[124:128]).hex(" ")
        raise FileFormatError(
            f"expected MATLAB 5's marks 00 01 49 4d at byte 124, found {found}{hint}"
        )
    at = 128
    while at < len(data):
        kind, size = struct.unpack(order + "II", _cut(data, at, 8))
        body = _cut(data, at + 8, size)
        if kind == _COMPRESSED:
            body, kind = _inflate(body, order), _MATRIX
        element = _matrix(body, order) if kind == _MATRIX else None
        if element is not None:
            yield element
        at += 8 + size


def _inflate(packed: memoryview, order: str) -> memoryview:
    # The tag may come only after the code's own tables, a few hundred bytes.
    tag = zlib.decompressobj().decompress(packed[:4096], 8)
    kind, size = struct.unpack(order + "II", tag)
    if kind != _MATRIX:
        raise FileFormatError(f"expected a compressed matrix (type {_MATRIX}), found type {kind}")
    unpacker, data = zlib.decompressobj(), bytearray()
    for start in range(0, len(packed), BLOCK):
        data += unpacker.decompress(packed[start : start + BLOCK], size + 9 - len(data))
        if len(data) > size + 8:
            break
    if len(data) != size + 8 or not unpacker.eof:
        found = f"found {'more' if len(data) > size + 8 else len(data) - 8}"
        raise FileFormatError(f"expected {size} bytes in a compressed matrix, {found}")
    return memoryview(data)[8:]


def _matrix(body: memoryview, order: str) -> tuple[str, _Array] | None:
    """One array (copied out of ``body``), or None for text, cells, structures and sparse ones."""
    at, parts = 0, []
    for _ in range(4):  # flags, dimensions, name, values
        kind, size = struct.unpack(order + "II", _cut(body, at, 8))
        start, step = at + 8, 8 + -(-size // 8) * 8
        if kind >> 16:  # four bytes or fewer lie in the tag itself
            kind, size, start, step = kind & 0xFFFF, kind >> 16, at + 4, 8
        parts.append((kind, _cut(body, start, size)))
        at += step
        if len(parts) == 3:
            flags = struct.unpack(order + "I", _cut(parts[0][1], 0, 4))[0]
            if flags & 0xFF not in _CLASSES:
                return None
    name = bytes(parts[2][1]).decode("ascii")
    shape = struct.unpack(f"{order}{len(parts[1][1]) // 4}i", parts[1][1])
    kind, data = parts[3]
    if flags & _COMPLEX:
        raise FileFormatError(f"array {name!r} holds complex numbers")
    if kind not in _STORED:
        raise FileFormatError(f"array {name!r}: expected numbers, found data of type {kind}")
    stored = np.dtype(order + _STORED[kind])
    if min(shape) < 0 or math.prod(shape) * stored.itemsize != len(data):
        raise FileFormatError(
            f"array {name!r}: expected {math.prod(shape) * stored.itemsize} bytes for shape {shape}"
            f" of {stored}, found {len(data)}"
        )
    values = np.frombuffer(data, stored).astype(_CLASSES[flags & 0xFF])  # a copy
    return name, values.reshape(shape, order="F")


def _cut(data: memoryview, start: int, size: int) -> memoryview:
    if start + size > len(data):
        left = max(0, len(data) - start)
        raise FileFormatError(f"truncated: expected {size} bytes at byte {start}, found {left}")
    return data[start : start + size]
