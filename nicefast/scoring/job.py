"""A job whose result is a file: what identifies it, which chunks are left, and all its ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._version import __version__
from ..runtime.ranks import Ranks
from .formats import SINKS, import_pyarrow
from .journal import FORMAT, Entry, Folder, Journal, Kept, Total, blocks, chunk_of, read
from .sinks import FileSink, Layout

Span = tuple[int, int | None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of errors that do not say which disk is full
TOLERANCE = 1e-4  # relative and absolute, of a chunk that another processor scores again


class Work(NamedTuple):
    """What one rank is to do: spans of rows into ``sink``, in pieces and batches; ``done`` rows
    are done (None: nobody is told of progress)."""

    spans: list[Span]
    sink: FileSink
    piece: int
    batch: int
    done: int | None


class Job(NamedTuple):
    """From a claimed folder to the complete file.

    Attributes:
        path: of the file.
        identity: what makes two jobs the same, as JSON holds it.
        layout: of a row of the result.
        rows: of the source, None where that is not known.
        chunk_rows: rows that are finished together, before rounding to whole batches.
        strict: bad rows of finished chunks are an error, too.
        ranks, device: the processes, and where this one computes.
    """

    path: Path
    identity: Mapping[str, Any]
    layout: Layout
    rows: int | None
    chunk_rows: int
    strict: bool
    ranks: Ranks
    device: torch.device

    def carry_out(
        self,
        work: Callable[[Work], object],
        resume: bool,
        overwrite: bool,
        batch: int,
        check: Callable[[], None],
    ) -> Total:
        """Chunk by chunk by ``work``, then assemble; what is known of all rows.

        Of a job that is resumed, the last finished chunk is scored again and compared: bit for bit
        where the same processor did it in the same batches, else to :data:`TOLERANCE`.

        ``batch`` is the number of rows computed together where the identity does not give it;
        ``check`` raises where the source is another than at first, and is asked before the file
        gets its name.

        Raises ValueError as :meth:`nicefast.scoring.journal.Folder.claim`, where there is nothing
        by which a job to resume could be recognised, where a finished chunk comes out otherwise
        now, and what ``work`` raises; RuntimeError where another rank has failed.
        """
        why_not = _unrecognised(self.identity)
        if resume and why_not:
            raise ValueError(f"resume: {why_not}")
        folder, chief = Folder(self.path), self.ranks.rank == 0
        try:
            with together(self.ranks, self.device):
                if chief:
                    folder.claim(self.identity, resume, overwrite, {"batch_rows": batch})
                    folder.share()
            with together(self.ranks, self.device):
                folder.share()
                kept = read(folder.path)
            if kept.assembled is None:
                total = self._finish_chunks(folder, kept, work, check)
            else:
                total = kept.assembled.total
            with together(self.ranks, self.device):
                if chief:
                    folder.remove()
        except BaseException as error:
            if why_not and chief:
                folder.discard()
            if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
                error.filename = str(folder.path)
            if isinstance(error, KeyboardInterrupt):
                what = f"go on with --resume: {folder.path}"
                raise KeyboardInterrupt(
                    f", {what if folder.path.exists() else 'nothing was kept'}"
                ) from None
            raise
        finally:
            folder.release()
        return total

    def _finish_chunks(
        self,
        folder: Folder,
        kept: Kept,
        work: Callable[[Work], object],
        check: Callable[[], None],
    ) -> Total:
        identity = kept.identity or {}
        batch, chunk = int(identity["batch_rows"]), chunk_of(identity)
        piece = min(batch, self.chunk_rows)
        assert chunk is not None  # for both numbers are in every job's identity
        journal: Journal | None = None
        sink: FileSink | None = None
        try:
            with together(self.ranks, self.device):
                if self.strict:
                    _check_no_bad_rows(kept)
                rank = self.ranks.rank
                journal = Journal(folder.path, rank, identity)
                sink = SINKS[self.path.suffix](
                    folder.path, journal, rank, self.layout, chunk, self.rows
                )
                kept = self._held(kept, sink, chunk)
                if rank == 0:
                    self._compare(folder, kept, work, piece, chunk)
            with together(self.ranks, self.device):
                # where memory was short before, it need not be found out again
                batch = min([batch, *(e.batch for e in _ordered(kept)[-1:])])
                spans = todo(kept, self.rows, chunk, self.ranks)
                work(Work(spans, sink, piece, batch, sum(e.rows for e in kept.entries.values())))
            kept = read(folder.path)
            with together(self.ranks, self.device):
                if self.ranks.rank == 0:
                    entries = _ordered(kept)
                    count = _counted(entries, self.rows, chunk)
                    assembled = sink.assemble(entries, count)
                    check()
                    folder.finish(journal, assembled, Total.of(entries))
        finally:
            if sink is not None:
                sink.close()
            if journal is not None:
                journal.close()
        return Total.of(_ordered(kept))

    def _compare(
        self,
        folder: Folder,
        kept: Kept,
        work: Callable[[Work], object],
        piece: int,
        chunk: int,
    ) -> None:
        """Score the last finished chunk again; ValueError where it comes out otherwise.

        What a digest of the model does not see, such as the attribute of a wrapper, is seen here.
        """
        if not kept.entries:
            return
        entries = _ordered(kept)
        old = next((e for e in reversed(entries) if e.bad < e.rows), entries[-1])
        first = old.chunk * chunk
        with folder.aside() as place:
            sink = SINKS[self.path.suffix](place, None, 0, self.layout, chunk, self.rows)
            try:
                span = (first, first + old.rows)
                work(Work([span], sink, piece, old.batch, None))
                (new,) = sink.uncommitted
                before, now = (
                    b"".join(blocks(where / entry.file, entry))
                    for where, entry in ((folder.path, old), (place, new))
                )
            finally:
                sink.close()
        if before == now:
            return
        batch = int((kept.identity or {})["batch_rows"])
        exactly = (
            self.device.type == "cpu"
            and old.processor == new.processor
            and old.batch == new.batch == batch
        )
        tolerance = 0.0 if exactly else TOLERANCE
        (old_keys, a), (new_keys, b) = sink.decode(before), sink.decode(now)
        if a.shape != b.shape or old_keys != new_keys:
            raise ValueError(
                f"resume: rows {first} to {first + old.rows - 1} have other keys than before the "
                f"interruption: the data are not the same; overwrite to score all rows again"
            )
        near = np.isclose(a, b, tolerance, tolerance, equal_nan=True)
        if not near.all():
            row, column = np.argwhere(~near)[0]
            raise ValueError(
                f"resume: row {first + row} comes out otherwise: {a[row, column]:.9g} before the "
                f"interruption, {b[row, column]:.9g} now, expected the same "
                f"{'bits' if exactly else f'to {TOLERANCE:g}'}: the model or the data are not the "
                f"same; overwrite to score all rows again"
            )

    def _held(self, kept: Kept, sink: FileSink, chunk: int) -> Kept:
        """Without chunks that this table and this kind of file cannot have."""

        def can_be(entry: Entry) -> bool:
            left = chunk if self.rows is None else min(self.rows - entry.chunk * chunk, chunk)
            return (self.rows is None or entry.rows == left) and sink.can_hold(entry)

        return kept._replace(entries={i: e for i, e in kept.entries.items() if can_be(e)})


@contextmanager
def together(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Do something in all ranks, wait for all of them, and fail in all if it fails in one."""
    try:
        yield
    except Exception:
        with suppress(RuntimeError):  # the others may be gone
            ranks.sum(torch.ones((), dtype=torch.float32, device=device))
        raise
    if ranks.sum(torch.zeros((), dtype=torch.float32, device=device)).item():
        raise RuntimeError(f"rank {ranks.rank} stops: another rank has failed")


def todo(kept: Kept, rows: int | None, chunk: int, ranks: Ranks) -> list[Span]:
    """The rows of this rank's share of the chunks that are left, consecutive ones as one span.

    >>> kept = Kept(None, {1: Entry(1, 10, 0, (), 10, "", 0, 0, 0)}, None)
    >>> todo(kept, 35, 10, Ranks()), todo(kept, None, 10, Ranks()), todo(kept, 35, 10, Ranks(1, 2))
    ([(0, 10), (20, 35)], [(0, 10), (20, None)], [(30, 35)])
    """
    entries, endless = kept.entries, rows is None
    if rows is None:  # there is one rank, and what follows the last chunk is read to see
        last = max(entries, default=-1)
        rows = (last + 1) * chunk
        endless = last < 0 or entries[last].rows == chunk
    left = [i for i in range(-(-rows // chunk)) if i not in entries]
    left = left[ranks.share(len(left))]
    spans: list[Span] = []
    for i in left:
        stop = min((i + 1) * chunk, rows)
        start = spans.pop()[0] if spans and spans[-1][1] == i * chunk else i * chunk
        spans.append((start, stop))
    if endless:
        start = spans.pop()[0] if spans and spans[-1][1] == rows else rows
        spans.append((start, None))
    return spans


def count_rows(table: Any, ranks: Ranks) -> int | None:
    """Of a table; where they are to be shared out, whatever it takes."""
    if table.rows is not None or ranks.world == 1:
        return table.rows
    if not table.seekable:
        raise ValueError(
            f"{table.name}: several ranks cannot share rows that come only once; "
            f"write them to files"
        )
    return sum(len(block.values) for block in table.blocks(1 << 16))


def versions(suffix: str) -> dict[str, str]:
    """Of what the bytes of a result may depend on."""
    found = {"nicefast": __version__, "torch": torch.__version__, "numpy": np.__version__}
    if suffix == ".parquet":
        found["pyarrow"] = import_pyarrow().__version__
    return {"format": FORMAT, **found}


def _unrecognised(identity: Mapping[str, Any]) -> str | None:
    if identity["source"] is None:
        return "the source is an iterable, whose rows come only once"
    if identity["model"] is None:
        return "the model holds what cannot be compared, so it cannot be recognised again"
    return None


def _check_no_bad_rows(kept: Kept) -> None:
    for entry in _ordered(kept):
        if entry.bad:
            raise ValueError(
                f"row {entry.bad_rows[0]} holds values that are not finite, or has no finite "
                f"log_prob; it was scored before the interruption"
            )


def _ordered(kept: Kept) -> list[Entry]:
    return [entry for _, entry in sorted(kept.entries.items())]


def _counted(entries: Sequence[Entry], rows: int | None, chunk: int) -> int:
    """The rows of all chunks, none of which is missing."""
    found = sum(e.rows for e in entries)
    whole = all(e.chunk == i for i, e in enumerate(entries))
    whole = whole and all(e.rows == chunk for e in entries[:-1])
    if not whole or found != (found if rows is None else rows):
        raise RuntimeError(f"chunks are missing: expected {rows} rows, found {found}")
    return found
