"""Densities of data of any size: read, scored and written in a fixed amount of memory.

score     everything: from a source to arrays or a file
tables    sources: files, arrays, tensors, iterables, as blocks of rows
models    the density: loading, identity, default batches
outputs   what is computed of each batch
job       a job whose result is a file: identity, chunks left, ranks
engine    reading, copying, computing and writing at the same time; channels, staging
sinks     finished chunks; formats: .npy, .csv and .parquet files
journal   what an interrupted job goes on from
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checks import check_count, check_path, check_type
from ..data.header import Header
from ..evaluation import Density
from ..preprocessing import Preprocessing
from ..runtime.devices import device_of, usable_device
from ..runtime.precision import matmul_precision
from ..runtime.ranks import Ranks
from .engine import Engine, Sink
from .formats import SINKS
from .job import Job, Span, count_rows, versions
from .models import default_batch, digest, evaluating, event_shape, resolve, where
from .outputs import OUTPUTS, Scorer
from .sinks import ArraySink

__all__ = ["OUTPUTS", "Scores", "score"]

Progress = Callable[[int, int | None, int], None]


class Scores(NamedTuple):
    """What :func:`score` did.

    Attributes:
        rows: how many were scored, in all processes and before an interruption.
        bad: how many of them are NaN.
        bad_rows: the numbers of the first 20 of these.
        seconds: how long it took this time.
        values: arrays by the names of outputs and keys, where no file was asked for.
        path: the file.
    """

    rows: int
    bad: int
    bad_rows: tuple[int, ...]
    seconds: float
    values: Mapping[str, np.ndarray]
    path: Path | None


def score(
    model: Density | str | os.PathLike[str],
    source: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    preprocessing: Preprocessing | str | os.PathLike[str] | None = None,
    outputs: Sequence[str] = ("log_prob",),
    columns: Any = None,
    keys: Sequence[Any] = (),
    header: Header = "auto",
    batch_rows: int | None = None,
    chunk_rows: int = 65536,
    device: torch.device | str | None = None,
    seed: int = 0,
    draws: int = 1,
    reference: Any = None,
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Scores:
    """Log-density (and more) of every row of a source, in nats, into arrays or a file.

    Memory does not grow with the number of rows, except for arrays that are returned. Reading,
    computing and writing overlap. Results of ``out`` are kept in ``OUT.unfinished`` beside it until
    they are complete: whatever interrupts the job, ``resume`` goes on with it, and the file is byte
    for byte that of an unbroken run. (The last bits of a result depend on processor, threads and
    batch, which is why these belong to a job's identity. Where a batch is halved for want of
    memory, that is by chance.) In a process group every rank scores its share of the chunks and
    rank 0 assembles them; all ranks see the same file system.

    Integers are dequantised ``draws`` times by the preprocessing's first step, row i in draw d with
    the noise of row ``d 2^40 + i`` of the seed's stream; log_prob is on the raw scale, the mean of
    ``log p`` over draws, as in :func:`nicefast.evaluation.evaluate`. Without preprocessing, rows
    are what the model sees, converted to its dtype. A row with a value that is not finite, or
    whose results are not, is NaN throughout and counted; the others are not touched by it.

    Args:
        model: a :class:`nicefast.NICE` or anything with ``log_prob`` of (N, \\*event_shape); a run
            folder of ``nicefast fit``, or a file of :func:`nicefast.save`.
        source: see :func:`nicefast.scoring.tables.open_table`.
        out: ``.npy``: (N,), or (N, C) with the outputs side by side; ``.csv``; ``.parquet``.
        preprocessing: from raw rows to what the model sees, or the file of one; a run folder's own
            unless given.
        outputs: names, see :class:`nicefast.scoring.outputs.Scorer`.
        columns, keys: the columns that are features, and those to carry over.
        header: whether the first line of ``.csv`` files is one: True, False or "auto".
        batch_rows: rows that are computed together, halved where memory does not do; unless given,
            see :func:`nicefast.scoring.models.default_batch`.
        chunk_rows: rows that are finished together, rounded down to whole batches.
        device: where to compute: where the model is, unless given.
        seed, draws: of the noise.
        reference: for "percentile": log_prob of a reference set, an array or a ``.npy`` file.
        strict: a bad row is an error. What was finished before it is kept.
        resume: go on with what was interrupted.
        overwrite: replace ``out``, and what is left of an interrupted job.
        progress: called with rows done, rows in all (None: unknown) and bytes read.
        ranks: the processes that share the job: those of the process group unless given.

    Raises:
        ValueError: arguments that do not go together; an ``out`` or an unfinished job that is
            there already, none to be resumed, or one of another model, source or options, naming
            what differs; rows that cannot be read or scored, naming file, row or column; a source
            that is changed meanwhile (chunks that were finished before are kept).
        TypeError: a model without ``log_prob``; arguments of a wrong kind.
        OSError: a full disk and the like.
        ImportError: a format whose package is not installed.

    >>> import nicefast as nf
    >>> flow = nf.NICE(2, hidden=(8,))
    >>> found = score(flow, np.array([[0.0, 1.0], [np.nan, 0.0]], np.float32))
    >>> found.values["log_prob"].shape, found.bad, found.bad_rows
    ((2,), 1, (1,))
    """
    began = time.perf_counter()
    ranks = Ranks.here() if ranks is None else ranks
    check_type("ranks", ranks, Ranks, "a Ranks")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function, got {type(progress).__name__}")
    if out is not None:
        check_path("out", out)
    path = None if out is None else Path(out).absolute()
    _check(path, keys, batch_rows, chunk_rows, resume, ranks)
    density, steps = resolve(model, preprocessing, device)
    place = device_of(density) if device is None else usable_device(device)
    table = _table(source, columns, keys, header, event_shape(density))
    scorer = Scorer(density, steps, outputs, table.features, seed, draws, reference)
    rows, layout = count_rows(table, ranks), scorer.layout(table.keys)
    batch = batch_rows or default_batch(density, table.features, "gradient" in scorer.outputs)

    def run(spans: Sequence[Span], sink: Sink, piece: int, batch: int, before: int | None) -> None:
        def told(done: int, size: int) -> None:
            if progress is not None and before is not None:
                progress(before + done, rows, size)

        with evaluating(density):
            Engine(table, scorer, place, piece, batch, strict).run(spans, sink, told)

    if path is None:
        arrays = ArraySink(layout)
        run([(0, rows)], arrays, batch if rows is None else max(1, min(batch, rows)), batch, 0)
        _check_unchanged(table)
        seconds = time.perf_counter() - began
        bad_rows = tuple(arrays.bad_rows)
        return Scores(arrays.rows, arrays.bad, bad_rows, seconds, arrays.values, None)
    identity = {
        "source": table.fingerprint,
        "features": table.features,
        "model": digest(density),
        "preprocessing": digest(steps),
        "columns": _plain(columns),
        "keys": table.keys,
        "outputs": scorer.outputs,
        "reference": digest(scorer.reference),
        "seed": seed,
        "draws": scorer.draws,
        "out": path.suffix,
        "chunk_rows": chunk_rows,
        "device": where(place),
        "precision": matmul_precision(place),
        "versions": versions(path.suffix),
    }
    if batch_rows is not None:
        identity["batch_rows"] = batch_rows
    job = Job(path, identity, layout, rows, chunk_rows, strict, ranks, place)
    total = job.carry_out(
        lambda work: run(work.spans, work.sink, work.piece, work.batch, work.done),
        resume,
        overwrite,
        batch,
        lambda: _check_unchanged(table),
    )
    return Scores(*total, time.perf_counter() - began, {}, path)


def _check(
    path: Path | None,
    keys: Any,
    batch_rows: int | None,
    chunk_rows: int,
    resume: bool,
    ranks: Ranks,
) -> None:
    if batch_rows is not None:
        check_count("batch_rows", batch_rows, 1)
    chunk_rows = check_count("chunk_rows", chunk_rows, 1)
    if path is None:
        if resume:
            raise ValueError("resume is for a file: out must be given")
        if ranks.world > 1:
            raise ValueError(f"out must be given where {ranks.world} ranks share the rows")
    elif path.suffix not in SINKS:
        raise ValueError(f"out must end in one of {', '.join(SINKS)}, got {path.name!r}")
    elif path.suffix == ".npy" and _plain(keys):
        raise ValueError("keys are for .parquet and .csv: a .npy file holds numbers alone")


def _table(
    source: Any, columns: Any, keys: Any, header: Header, shape: tuple[int, ...] | None
) -> Any:
    if hasattr(source, "blocks") and hasattr(source, "fingerprint"):  # a table already
        wanted = source.features if shape is None else math.prod(shape)
        if source.features != wanted:
            raise ValueError(
                f"{source.name}: expected rows of {wanted} values, found {source.features}"
            )
        return source
    from .tables import open_table

    return open_table(source, columns, keys, shape, header)


def _check_unchanged(table: Any) -> None:
    """ValueError where the source is not what it was when the job began."""
    if hasattr(table, "check_unchanged"):
        table.check_unchanged()


def _plain(columns: Any) -> list[str | int] | None:
    """Names and positions as JSON holds them."""
    if columns is None:
        return None
    several = [columns] if isinstance(columns, str | int) else columns
    return [c if isinstance(c, str) else int(c) for c in several]
