"""Reading, copying, computing and writing at the same time, in a fixed amount of memory.

    reader thread -> staged pieces -> the caller's thread computes -> results -> writer thread

Pieces are staged in a few buffers that are used again and again (pinned, for a GPU), so that the
reader waits for them. What goes wrong in a thread stops the others, and is raised in the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .channels import Channel, Stopped
from .outputs import Batch, Scorer
from .sinks import Piece
from .staging import Lane, Release, fill

SLOTS = 3  # one is read into, one waits, one is computed; on a GPU one more is on its way
RESULTS = 2  # that wait for the writer
# the last: of CUBLAS_STATUS_ALLOC_FAILED, and of CUDA's other libraries
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed"
)  # fmt: skip


class Source(Protocol):
    """What the engine asks of a table; see :class:`nicefast.scoring.tables.Table`."""

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> int: ...

    @property
    def dtype(self) -> Any: ...

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterable[Any]: ...

    def check_unchanged(self) -> None: ...


class Sink(Protocol):
    """What the engine asks of a sink."""

    def add(self, piece: Piece) -> None: ...

    def flush(self) -> None: ...

    def commit(self) -> None: ...


class Staged(NamedTuple):
    """Rows of a block in a buffer."""

    start: int
    rows: int
    size: int  # bytes that were read
    buffer: Tensor
    keys: dict[str, Any]


class Launched(NamedTuple):
    """Results that a device may still be computing."""

    staged: Staged
    batch: Batch
    rows_together: int
    done: Any  # event of a GPU


class Engine:
    """Scores spans of a table.

    Args:
        table: the rows.
        scorer: what to compute of them.
        device: where.
        piece: rows that are read, copied and, memory permitting, computed together.
        batch: rows that are computed together at first; halved where memory does not do, down to
            one row.
        strict: a bad row is an error.
    """

    def __init__(
        self,
        table: Source,
        scorer: Scorer,
        device: torch.device,
        piece: int,
        batch: int | None = None,
        strict: bool = False,
    ) -> None:
        self.table, self.scorer, self.device = table, scorer, device
        self.piece, self.batch = piece, min(batch or piece, piece)
        self.strict = strict
        self.dtype = scorer.staging(table.dtype)
        self._lane = Lane(device, piece, table.features, self.dtype)

    def run(
        self,
        spans: Iterable[tuple[int, int | None]],
        sink: Sink,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Score rows ``start`` up to ``stop`` (None: the last) of each span; how many they were.

        ``progress`` is told the number of rows and of bytes read, after each piece. Whatever
        happens, the sink's finished chunks are committed and no thread is left.

        Raises ValueError for a bad row if ``strict``, and what table, model or sink raise.
        """
        free: Channel[Tensor] = Channel(SLOTS + 1)
        for buffer in self._lane.buffers(SLOTS):
            free.put(buffer)
        staged: Channel[Staged] = Channel(SLOTS + 1)
        results: Channel[Piece] = Channel(RESULTS)
        channels = (free, staged, results)
        errors: list[BaseException] = []

        def guarded(work: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                try:
                    work()
                except Stopped:
                    pass
                except BaseException as error:
                    errors.append(error)
                    for channel in channels:
                        channel.stop()

            return run

        def read() -> None:
            self._read(spans, free, staged)

        def write() -> None:
            try:
                for piece in results:
                    sink.add(piece)
                sink.flush()
            except BaseException:
                with suppress(OSError):  # what went wrong first is what is raised
                    sink.commit()
                raise
            sink.commit()

        threads = [
            threading.Thread(target=guarded(work), name=f"nicefast-{name}", daemon=True)
            for name, work in (("reader", read), ("writer", write))
        ]
        for thread in threads:
            thread.start()
        rows = 0
        try:
            rows = self._compute(staged, free, results, progress)
            results.end()
            threads[1].join()
        except Stopped:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            for channel in channels:
                channel.stop()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return rows

    def _read(
        self,
        spans: Iterable[tuple[int, int | None]],
        free: Channel[Tensor],
        staged: Channel[Staged],
    ) -> None:
        buffers = iter(free)
        release = Release()
        for start, stop in spans:
            at = start
            for block in self.table.blocks(self.piece, start, stop):
                whole = (at - start) % self.piece == 0  # only the last block may be shorter
                if block.start != at or not whole or len(block.values) > self.piece:
                    raise RuntimeError(
                        f"{self.table.name}: expected {self.piece} rows from row {at}, found "
                        f"{len(block.values)} from {block.start}"
                    )
                buffer = next(buffers)
                values, rows = block.values, len(block.values)
                fill(buffer[:rows], values)
                size = values.nbytes
                release(values, size)
                at += rows
                staged.put(Staged(block.start, rows, size, buffer, block.keys))
            if stop is not None and at != stop:
                self.table.check_unchanged()
                raise ValueError(f"{self.table.name}: expected rows up to {stop}, found {at}")
        staged.end()

    def _compute(
        self,
        staged: Channel[Staged],
        free: Channel[Tensor],
        results: Channel[Piece],
        progress: Callable[[int, int], None] | None,
    ) -> int:
        rows = size = 0
        before: Launched | None = None

        def complete(launched: Launched) -> None:
            nonlocal rows, size
            piece = self._collect(launched)
            free.put(launched.staged.buffer)
            results.put(piece)
            rows, size = rows + piece.rows, size + launched.staged.size
            if progress is not None:
                progress(rows, size)

        for one in staged:
            x, used = self._lane.upload(one.buffer[: one.rows])
            batch = self._score(x, one.start)
            used()
            launched = Launched(one, *self._lane.download(batch, self.batch))
            if not self._lane.overlaps:
                complete(launched)
                continue
            if before is not None:
                complete(before)
            before = launched
        if before is not None:
            complete(before)
        return rows

    def _score(self, x: Tensor, row: int) -> Batch:
        """In batches, and smaller ones where memory does not do."""
        parts: list[Batch] = []
        at = 0
        while at < len(x):
            rows = min(self.batch, len(x) - at)
            try:
                parts.append(self.scorer(x[at : at + rows], row + at))
            except (MemoryError, RuntimeError) as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
                rows = 0
            if not rows:  # out of the handler, which keeps the tensors of what has failed
                self.batch = max(1, min(self.batch, len(x) - at) // 2)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            at += rows
        if len(parts) == 1:
            return parts[0]
        values = {n: torch.cat([p.values[n] for p in parts]) for n in parts[0].values}
        return Batch(values, torch.cat([p.good for p in parts]))

    def _collect(self, launched: Launched) -> Piece:
        if launched.done is not None:
            launched.done.synchronize()
        one, batch = launched.staged, launched.batch
        bad = [one.start + int(i) for i in np.flatnonzero(~batch.good.numpy())]
        if bad and self.strict:
            raise ValueError(
                f"{self.table.name}: row {bad[0]} holds values that are not finite, or has no "
                f"finite log_prob"
            )
        values = self.scorer.finish({n: v.numpy() for n, v in batch.values.items()})
        return Piece(one.start, one.rows, values, one.keys, bad, launched.rows_together)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows might do."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(text in str(error).lower() for text in _OUT_OF_MEMORY)
