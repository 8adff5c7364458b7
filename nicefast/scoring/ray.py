"""Densities on a cluster, by Ray Data: actors hold the flow, ``map_batches`` brings the rows.

Imported only where it is asked for; needs ``ray[data]``: ``pip install 'nicefast[ray]'``.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..checks import as_integer
from ..flow import NICE
from ..io.checkpoint import load, save
from ..preprocessing import Preprocessing
from .models import evaluating, resolve
from .outputs import Scorer

Rows = dict[str, np.ndarray[Any, Any]]


def score_dataset(
    model: Any,
    dataset: Any,
    *,
    columns: Sequence[str] | None = None,
    row: str | None = None,
    outputs: Sequence[str] = ("log_prob",),
    preprocessing: Preprocessing | str | Path | None = None,
    batch_rows: int = 8192,
    workers: int | tuple[int, int] = 2,
    gpus: float = 0,
    seed: int = 0,
    draws: int = 1,
    reference: Any = None,
) -> Any:
    """A Ray dataset's rows, all of their columns, with the densities beside them.

    Lazy, as everything in Ray Data: rows are scored when the result is written or iterated over.
    A worker that dies is replaced, and its rows are scored again. The flow travels as safetensors:
    workers unpickle nothing of the user's.

    Args:
        model: a :class:`nicefast.NICE`, or a path as :func:`nicefast.scoring.score` takes it.
        dataset: ``ray.data.Dataset``.
        columns: the feature columns, in order; by default all columns but ``row``. A column that is
            alone may hold vectors of D values: lists, lists of a fixed size, tensors. A vector that
            is missing is a bad row, one of another length an error.
        row: column that numbers the rows, from which integers get their noise: without it, rows of
            integers are refused, for their densities would change with the cluster.
        outputs, seed, draws, reference: as :class:`nicefast.scoring.outputs.Scorer`.
        preprocessing: from raw rows to what the flow sees; a run folder brings its own.
        batch_rows: rows that a worker computes together.
        workers: actors, or least and most.
        gpus: of each worker; above 0 the flow is on its GPU.

    Raises:
        ImportError: ray is not installed.
        TypeError: a model that is no NICE.
        ValueError: as :class:`Scorer`, before any row is scored; a preprocessing of integers
            without ``row``.

    >>> from nicefast.scoring.ray import score_dataset  # doctest: +SKIP
    >>> scored = score_dataset(flow, ray.data.read_parquet("rows"), row="id")  # doctest: +SKIP
    >>> scored.write_parquet("scores")  # doctest: +SKIP
    """
    try:
        from ray.data import ActorPoolStrategy
    except ImportError:
        raise ImportError("score_dataset needs ray: pip install 'nicefast[ray]'") from None
    flow, steps = resolve(model, preprocessing, "cpu")
    if not isinstance(flow, NICE):
        raise TypeError(f"model must be a nicefast.NICE or a path, got {type(flow).__name__}")
    options = {"outputs": tuple(outputs), "seed": seed, "draws": draws, "reference": reference}
    Scorer(flow, steps, features=flow.features, **options)  # what is wrong is said here, not there
    if steps is not None and steps.noisy and row is None:
        raise ValueError("row must name the column that numbers the rows: integers get noise by it")
    count = as_integer(workers)
    least, most = (count, count) if count is not None else cast("tuple[int, int]", workers)
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs={
            "files": _files(flow, steps),
            "columns": None if columns is None else list(columns),
            "row": row,
            "gpu": gpus > 0,
            **options,
        },
        batch_size=batch_rows,
        batch_format="numpy",
        num_gpus=gpus or None,
        compute=ActorPoolStrategy(min_size=least, max_size=most),
    )


class Worker:
    """An actor: the flow, in its process."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        columns: list[str] | None,
        row: str | None,
        gpu: bool,
        **options: Any,
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self.device = torch.device("cuda" if gpu else "cpu")
            self.flow = load(Path(folder, "model"), self.device)
            steps = Preprocessing.load(Path(folder, "steps")) if "steps" in files else None
        self.columns, self.row = columns, row
        self.scorer = Scorer(self.flow, steps, features=self.flow.features, **options)

    def __call__(self, batch: Rows) -> Rows:
        values = self._values(batch)
        numbers = np.zeros(0, np.int64) if self.row is None else batch[self.row]
        found: dict[str, list[torch.Tensor]] = {}
        with evaluating(self.flow):
            for start, stop in _runs(numbers, len(values)):
                first = int(numbers[start]) if self.row is not None else 0
                raw = torch.from_numpy(values[start:stop])
                raw = raw.to(self.device, self.scorer.staging(values.dtype))
                for name, value in self.scorer(raw, first).values.items():
                    found.setdefault(name, []).append(value)
        results = {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}
        return batch | self.scorer.finish(results)

    def _values(self, batch: Rows) -> np.ndarray[Any, Any]:
        """The features as (n, D)."""
        names = self.columns or [name for name in batch if name != self.row]
        if missing := [name for name in names if name not in batch]:
            raise ValueError(f"column {missing[0]!r} is missing; there are {', '.join(batch)}")
        if len(names) == 1:
            values = _vectors(batch[names[0]], names[0], self.flow.features)
        else:
            values = np.stack([batch[name] for name in names], axis=1)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"columns {', '.join(names)} must be numbers, got {values.dtype}")
        if values.shape[1] != self.flow.features:
            raise ValueError(
                f"rows must have {self.flow.features} features, as the model does, got "
                f"{values.shape[1]}: {', '.join(names)}"
            )
        return np.ascontiguousarray(values)


def _vectors(values: np.ndarray[Any, Any], name: str, features: int) -> np.ndarray[Any, Any]:
    """A column's (n, D) values; lists come as objects, and those that are missing as None."""
    if values.dtype != object:
        return values.reshape(len(values), -1)
    rows = [None if one is None else _numbers(one) for one in values]
    for row in rows:
        if row is not None and (row.size != features or row.dtype.kind not in "fiub"):
            raise ValueError(
                f"column {name!r}: expected a vector of {features} numbers in every row, found "
                f"{row.dtype} of shape {row.shape}"
            )
    missing = np.full(features, np.nan)
    flat = [missing if row is None else row.reshape(-1) for row in rows]
    return np.stack(flat) if flat else np.empty((0, features))


def _numbers(vector: Any) -> np.ndarray[Any, Any]:
    """As an array, float64 where values of it are missing."""
    found = np.asarray(vector)
    if found.dtype == object:
        with suppress(TypeError, ValueError):
            return found.astype(np.float64)
    return found


def _runs(numbers: np.ndarray[Any, Any], count: int) -> Iterator[tuple[int, int]]:
    """From where to where row numbers follow on one another; all rows, where none are given."""
    if not len(numbers):
        yield from [(0, count)] if count else []
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    ends = [0, *breaks.tolist(), count]
    yield from itertools.pairwise(ends)


def _files(flow: NICE, steps: Preprocessing | None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save(flow, Path(folder, "model"))
        if steps is not None:
            steps.save(Path(folder, "steps"))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
