"""What keeps an unfinished score: its folder, its identity, and a line for every finished chunk.

``OUT.unfinished/`` holds the chunks' data and ``journal.jsonl``: first the identity of the job,
then one line for each chunk, written only when its data are on the disk, at last a line for the
assembled file. Other ranks keep a ``journal.RANK.jsonl`` of their own; resuming gathers them all.

Every line ends with a checksum of its own content and of the identity. A line whose checksum or
whose fields are wrong counts as missing, and its chunk is scored again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..io.files import sync_names

FORMAT = "nicefast.scores/2"
WITHOUT_CHECKSUMS = "nicefast.scores/1"  # the format of nicefast 0.1.0
JOURNAL = "journal.jsonl"
LOCK = "lock"
ASIDE = "again"
LISTED = 20  # bad rows that are kept by number
_DATA = re.compile(r"data(\.\d+)?\.(npy|csv|arrow)")
_ASSEMBLED = re.compile(r"data\.npy|data\.0\.csv|assembled\.(csv|parquet)")
_OURS = re.compile(
    rf"journal(\.\d+)?\.jsonl(\.partial)?|data(\.\d+)?\.\w+|assembled\.\w+|{LOCK}|{ASIDE}"
)
_BLOCK = 1 << 22


class Entry(NamedTuple):
    """A finished chunk: which rows were bad, and where its bytes are.

    ``batch`` is the number of rows that were computed together when it ended, ``processor`` what
    they were computed by.
    """

    chunk: int
    rows: int
    bad: int
    bad_rows: tuple[int, ...]
    batch: int
    file: str
    offset: int
    length: int
    crc: int
    processor: str = ""


class Total(NamedTuple):
    """What a finished job says: its rows, how many of them are bad, and the first of these."""

    rows: int
    bad: int
    bad_rows: tuple[int, ...]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Total:
        """Of all chunks, in order."""
        listed = [row for entry in entries for row in entry.bad_rows][:LISTED]
        return cls(sum(e.rows for e in entries), sum(e.bad for e in entries), tuple(listed))


class Assembled(NamedTuple):
    """The complete file: its name in the folder, its size in bytes, and what it says."""

    file: str
    length: int
    total: Total


class Kept(NamedTuple):
    """What a folder's journals say."""

    identity: dict[str, Any] | None
    entries: dict[int, Entry]
    assembled: Assembled | None


class Journal:
    """The open journal of one rank, at whose end lines are added for good."""

    def __init__(self, folder: Path, rank: int, identity: Mapping[str, Any]) -> None:
        path = folder / (JOURNAL if rank == 0 else f"journal.{rank}.jsonl")
        self._identity = identity
        self.file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        if not path.stat().st_size:
            self.append([{"identity": identity}])
            sync_names(folder)

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines and wait until they are on the disk."""
        write_all(self.file, b"".join(_lines(self._identity, lines)))
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class Folder:
    """``OUT.unfinished`` beside ``out``, for the one process that may write there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     folder = Folder(Path(place, "scores.npy"))
    ...     _ = folder.claim({"seed": 0}, resume=False, overwrite=False)
    ...     folder.release()
    ...     folder.claim({"seed": 1}, resume=True, overwrite=False)
    Traceback (most recent call last):
    ValueError: resume: seed differs: expected 0, found 1
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.unfinished")
        self._old = out.with_name(f".{out.name}.finished")
        self._lock: IO[bytes] | None = None
        self._claimed = False

    def check(self, resume: bool, overwrite: bool) -> None:
        """ValueError where ``out`` or the folder is there and should not be, or the reverse."""
        if self.out.is_dir():
            raise ValueError(f"out {self.out} is a folder, expected a file or nothing")
        there = self.path.is_dir()
        if self.path.exists() and not there:
            raise ValueError(f"{self.path} is there and no folder: move it away")
        if there:
            other = [p.name for p in self.path.iterdir() if not _OURS.fullmatch(p.name)]
            if other:
                raise ValueError(f"{self.path} is no unfinished score: it holds {sorted(other)[0]}")
        if resume and not there:
            raise ValueError(f"resume: there is no {self.path} to go on from")
        if resume:
            return
        if there and not overwrite:
            raise ValueError(
                f"{self.path} is there, unfinished: resume to go on with it, or overwrite"
            )
        if self.out.exists() and not overwrite:
            raise ValueError(f"out {self.out} exists already: overwrite to replace it")

    def claim(
        self,
        identity: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        defaults: Mapping[str, Any] | None = None,
    ) -> Kept:
        """Make the folder, or take over what is in it, with a single and consistent journal.

        ``defaults`` are entries of the identity on which nobody insists: those of the journal go
        before them. Only chunks whose bytes match their CRC are kept; whatever else is in the
        folder goes. Where ``assembled`` is in the result, ``out`` is complete already.

        Raises ValueError as :meth:`check` does, where another process is at work in the folder,
        and where ``identity`` is not that of the journal, naming what differs.
        """
        self.check(resume, overwrite)
        given = identity
        shutil.rmtree(self._old, ignore_errors=True)
        if self.path.exists():
            self._hold()
            if not resume:
                self.release()
                shutil.rmtree(self.path)
        if not self.path.exists():
            self.path.mkdir(parents=True)
            self._hold()
        kept = read(self.path)
        identity = {**(defaults or {}), **identity}
        if kept.identity is not None:
            before = {k: kept.identity[k] for k in defaults or {} if k in kept.identity}
            identity = _agreed(kept.identity, {**identity, **before, **given})
            if kept.assembled is not None and not (self.path / kept.assembled.file).is_file():
                if self.out.is_file() and self.out.stat().st_size == kept.assembled.length:
                    return kept  # it was given its name just before the interruption
                kept = kept._replace(assembled=None)
        if self.out.exists() and not overwrite:
            raise ValueError(f"out {self.out} exists already: overwrite to replace it")
        self._claimed = True
        return self._settle(kept._replace(identity=dict(identity)))

    def finish(self, journal: Journal, assembled: Path, total: Total) -> None:
        """Give the complete file ``assembled`` the name ``out``."""
        size = assembled.stat().st_size
        journal.append([{"assembled": assembled.name, "length": size, **total._asdict()}])
        os.replace(assembled, self.out)
        sync_names(self.out.parent)

    def remove(self) -> None:
        """Remove the folder: at once as far as anyone can see."""
        shutil.rmtree(self._old, ignore_errors=True)
        os.replace(self.path, self._old)
        self.release()
        shutil.rmtree(self._old, ignore_errors=True)

    @contextmanager
    def aside(self) -> Iterator[Path]:
        """A folder in the folder, for what is not kept."""
        place = self.path / ASIDE
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def discard(self) -> None:
        """Remove the folder if it was claimed: what it holds is of no use."""
        if self._claimed and self.path.exists():
            self.remove()

    def release(self) -> None:
        """Let others claim the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def share(self) -> None:
        """Let no other job claim the folder while this process works in it, with its ranks."""
        self._hold(exclusively=False)

    def _hold(self, exclusively: bool = True) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        if self._lock is None:
            self._lock = open(self.path / LOCK, "ab")  # noqa: SIM115
        kind = fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(f"another process is at work in {self.path}") from None
        except OSError:  # a file system without locks
            self.release()

    def _settle(self, kept: Kept) -> Kept:
        """One journal of the chunks that are whole; data files end where the last of them does."""
        entries = {i: e for i, e in kept.entries.items() if _is_whole(self.path / e.file, e)}
        kept = kept._replace(entries=entries, assembled=None)
        lines: list[Mapping[str, Any]] = [{"identity": kept.identity}]
        lines += [e._asdict() for _, e in sorted(entries.items())]
        partial = self.path / f"{JOURNAL}.partial"
        with open(partial, "wb") as file:
            file.writelines(_lines(kept.identity or {}, lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / JOURNAL)
        sync_names(self.path)
        for path in self.path.iterdir():
            if re.fullmatch(r"journal\.\d+\.jsonl", path.name) or path.stem == "assembled":
                path.unlink()
            elif path.name.startswith("data."):
                ends = [e.offset + e.length for e in entries.values() if e.file == path.name]
                os.truncate(path, max(ends, default=0))
        return kept


def read(folder: Path) -> Kept:
    """What the lines of the journals in ``folder`` say whose checksums and fields are right.

    ValueError for the journal of nicefast 0.1.0, whose lines have no checksums.
    """
    path = folder / JOURNAL
    identity = _identity_of(path) if path.is_file() else None
    if identity is None:
        return Kept(None, {}, None)
    assembled: Assembled | None = None
    entries: dict[int, Entry] = {}
    for path in sorted(folder.glob("journal*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            found = _checked(line, identity)
            if found is None or "identity" in found:
                continue
            if "assembled" in found:
                assembled = _assembled(found) or assembled
            elif (entry := _entry(found, identity)) is not None:
                entries[entry.chunk] = entry
    return Kept(identity, entries, assembled)


def _identity_of(path: Path) -> dict[str, Any] | None:
    """What the journal's first line says; None where it is damaged, and all is to be done again."""
    with path.open("rb") as file:
        line = file.readline()
    content = _parsed(line)
    identity = content.get("identity")
    if not isinstance(identity, dict):
        return None
    said = identity.get("versions")
    if isinstance(said, dict) and said.get("format") == WITHOUT_CHECKSUMS:
        raise ValueError(
            f"{path.parent} was begun by nicefast 0.1.0, whose journal has no checksums: finish it "
            f"with that version, or overwrite to score all rows again"
        )
    if not line.endswith(b"\n") or _checked(line[:-1], identity) is None:
        return None
    return identity if _is_count(identity.get("batch_rows", 1), 1) else None


def _entry(found: Mapping[str, Any], identity: Mapping[str, Any]) -> Entry | None:
    """A line as an entry, None unless every field is what it can be."""
    if set(found) != set(Entry._fields):
        return None
    others = ("bad_rows", "file", "processor")
    counts = [found[name] for name in Entry._fields if name not in others]
    if not all(_is_count(count) for count in counts) or not _is_total(found):
        return None
    entry = Entry(**{**found, "bad_rows": tuple(found["bad_rows"])})
    batch = identity.get("batch_rows", entry.batch)
    chunk = chunk_of(identity) or entry.rows
    first = entry.chunk * chunk
    right = (
        1 <= entry.rows <= chunk
        and 1 <= entry.batch <= batch
        and entry.length > 0
        and entry.crc < 1 << 32
        and isinstance(entry.processor, str)
        and isinstance(entry.file, str)
        and _DATA.fullmatch(entry.file) is not None
        and all(first <= row < first + entry.rows for row in entry.bad_rows)
    )
    return entry if right else None


def _assembled(found: Mapping[str, Any]) -> Assembled | None:
    if set(found) != {"assembled", "length", *Total._fields}:
        return None
    name, length = found["assembled"], found["length"]
    if not isinstance(name, str) or not _ASSEMBLED.fullmatch(name):
        return None
    if not _is_count(length) or not _is_total(found):
        return None
    return Assembled(name, length, Total(found["rows"], found["bad"], tuple(found["bad_rows"])))


def _is_total(found: Mapping[str, Any]) -> bool:
    """Whether rows, bad and bad_rows go together."""
    rows, bad, listed = found["rows"], found["bad"], found["bad_rows"]
    return (
        _is_count(rows)
        and _is_count(bad)
        and bad <= rows
        and isinstance(listed, list)
        and len(listed) == min(bad, LISTED)
        and all(map(_is_count, listed))
        and listed == sorted(set(listed))
    )


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 63


def chunk_of(identity: Mapping[str, Any]) -> int | None:
    """Rows of a chunk: whole batches; None where the identity does not say it."""
    batch, chunk = identity.get("batch_rows", 0), identity.get("chunk_rows", 0)
    if not (_is_count(batch, 1) and _is_count(chunk, 1)):
        return None
    piece = int(min(batch, chunk))
    return int(chunk) // piece * piece


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """All of ``data`` to an unbuffered file, which may take it in parts."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


def blocks(path: Path, entry: Entry) -> Iterator[bytes]:
    """The bytes of a chunk, some at a time; shorter where the file is."""
    with open(path, "rb") as file:
        file.seek(entry.offset)
        left = entry.length
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            left -= len(block)
            yield block


def _lines(identity: Mapping[str, Any], contents: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Contents as lines of a journal, each under a checksum of itself and of the identity."""
    whose = _encoded(identity)
    for content in contents:
        digest = hashlib.blake2b(whose + b"\n" + _encoded(content), digest_size=8).hexdigest()
        yield _encoded({**content, "sum": digest}) + b"\n"


def _checked(line: bytes, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a line without its end, None unless it is what :func:`_lines` writes."""
    content = _parsed(line)
    content.pop("sum", None)
    if not content or next(_lines(identity, [content])) != line + b"\n":
        return None
    return content


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _is_whole(path: Path, entry: Entry) -> bool:
    crc, length = 0, 0
    if path.is_file():
        for block in blocks(path, entry):
            crc, length = zlib.crc32(block, crc), length + len(block)
    return (crc, length) == (entry.crc, entry.length)


def _agreed(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(json.loads(json.dumps(given)))  # tuples are lists there
    differing = [k for k in (*stored, *given) if stored.get(k) != given.get(k)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"resume: {key} differs: expected {stored.get(key)!r}, found {given.get(key)!r}"
        )
    return dict(given)
