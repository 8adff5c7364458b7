"""Where the messages of an Arrow file or stream are: its schema, dictionaries and record batches.

pyarrow reads a record batch whole, or lets nobody know where its buffers lie in the file. The
format's own description of both, a few FlatBuffers tables, is read here instead: Message and
RecordBatch of Message.fbs, Footer and Block of File.fbs in the Arrow specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ...data.errors import FileFormatError
from .files import Paged

SCHEMA, DICTIONARY, BATCH = 1, 2, 3
_MAGIC = b"ARROW1"
_CONTINUES = b"\xff\xff\xff\xff"


class Message(NamedTuple):
    """A message's place in the file, in bytes: metadata, then the body that they describe.

    Attributes:
        start, body, end: where metadata and body begin, and where the body ends.
        kind: SCHEMA, DICTIONARY or BATCH.
        packed: whether the buffers of a BATCH are compressed.
    """

    start: int
    body: int
    end: int
    kind: int
    packed: bool


def messages(pages: Paged) -> tuple[bool, list[Message]]:
    """Whether it is a file with a footer, else a stream; and its messages in their order.

    A file's magic bytes and its footer, which has the schema, count as messages of kind SCHEMA.
    FileFormatError for what cannot be.
    """
    size = len(pages.bytes)
    random = bytes(pages.read(0, min(6, size))) == _MAGIC
    return random, list(_by_footer(pages) if random else _one_by_one(pages))


def _by_footer(pages: Paged) -> Iterator[Message]:
    size = len(pages.bytes)
    length, magic = struct.unpack("<i6s", pages.read(max(size - 10, 0), size))
    if magic != _MAGIC or not 0 < length <= size - 20:
        raise FileFormatError("not a readable Arrow file, or truncated: it has no footer")
    begin = size - 10 - length
    yield Message(0, 8, 8, SCHEMA, False)
    yield Message(begin, size, size, SCHEMA, False)
    footer = _Table.root(pages.read(begin, size - 10))
    for field in (2, 3):  # dictionaries, then record batches
        for block in footer.structs(field, 24):
            start, metadata, body = struct.unpack("<qi4xq", block)
            if metadata < 8 or body < 0:
                raise FileFormatError(
                    "not a readable Arrow file: a block of its footer has no size"
                )
            yield _message(pages, start, start + metadata, start + metadata + body)


def _one_by_one(pages: Paged) -> Iterator[Message]:
    at, size = 0, len(pages.bytes)
    while at < size:
        prefix = 8 if bytes(pages.read(at, at + 4)) == _CONTINUES else 4  # before Arrow 0.15: 4
        (length,) = struct.unpack("<i", pages.read(at + prefix - 4, at + prefix))
        if not length:
            return
        body = at + prefix + length
        if length < 0:
            raise FileFormatError("not a readable Arrow stream: a message has no size")
        more = _Table.root(pages.read(at + prefix, body)).number(3, "<q")
        if more < 0:
            raise FileFormatError("not a readable Arrow stream: a message has no size")
        yield _message(pages, at, body, body + more)
        at = body + more


def _message(pages: Paged, start: int, body: int, end: int) -> Message:
    if not 0 <= start < body <= end <= len(pages.bytes):
        raise FileFormatError(
            f"truncated: expected a message up to byte {end}, found {len(pages.bytes)} bytes"
        )
    metadata = pages.read(start, body)
    prefix = 8 if bytes(metadata[:4]) == _CONTINUES else 4
    table = _Table.root(metadata[prefix:])
    kind = table.number(1, "<B")
    packed = kind == BATCH and table.table(2).has(3)
    pages.drop(start, body)
    return Message(start, body, end, kind, packed)


class _Table:
    """A FlatBuffers table: fields by number, each where the table's list of offsets says."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - self._read("<i", at)
        self._count = (self._read("<H", self._fields) - 4) // 2

    @classmethod
    def root(cls, data: memoryview) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def has(self, field: int) -> bool:
        return self._place(field) is not None

    def number(self, field: int, code: str) -> int:
        """A number, 0 where it is not given."""
        place = self._place(field)
        return 0 if place is None else self._read(code, place)

    def table(self, field: int) -> _Table:
        place = self._place(field)
        if place is None:
            raise FileFormatError("not a readable Arrow file: a message lacks its header")
        return _Table(self._data, place + self._read("<I", place))

    def structs(self, field: int, size: int) -> Iterator[memoryview]:
        """A vector of structs of so many bytes."""
        place = self._place(field)
        if place is None:
            return
        at = place + self._read("<I", place)
        count = self._read("<I", at)
        if at + 4 + count * size > len(self._data):
            raise FileFormatError("not a readable Arrow file: its footer is too short")
        for i in range(count):
            begin = at + 4 + i * size
            yield self._data[begin : begin + size]

    def _place(self, field: int) -> int | None:
        if not 0 <= field < self._count:
            return None
        offset = self._read("<H", self._fields + 4 + 2 * field)
        return self._at + offset if offset else None

    def _read(self, code: str, at: int) -> int:
        if not 0 <= at <= len(self._data) - struct.calcsize(code):
            raise FileFormatError("not a readable Arrow file: its metadata point out of themselves")
        (value,) = struct.unpack_from(code, self._data, at)
        return int(value)
