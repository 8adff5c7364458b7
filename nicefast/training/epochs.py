"""What a fit records of each epoch, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Epoch(NamedTuple):
    """One epoch: mean log-likelihoods in nats per row, and the seconds spent since the beginning.

    ``train`` is the mean over the minibatches as they went by, under the weights of the moment
    (with units dropped, where they are); ``validation`` is that of the averaged weights. ``rate``
    is training rows a second.
    """

    epoch: int
    train: float
    validation: float
    seconds: float
    rate: float


class Progress(NamedTuple):
    """How far a fit has come, from a snapshot's plain values."""

    taken: int
    records: list[Epoch]
    best: Epoch | None
    seconds: float

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Progress:
        """ValueError or TypeError where a value is none of its kind."""
        for name, kinds in (("taken", int), ("records", list), ("seconds", (int, float))):
            value = about.get(name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"{name!r} is {value!r}")
        records = [_epoch(record) for record in about["records"]]
        if [record.epoch for record in records] != list(range(1, len(records) + 1)):
            raise ValueError("its epochs are not numbered from 1")
        best = None if about.get("best") is None else _epoch(about["best"])
        if best is not None and best not in records:
            raise ValueError("its best epoch is none of its epochs")
        if about["taken"] < 0 or about["seconds"] < 0 or not math.isfinite(about["seconds"]):
            raise ValueError(f"{about['taken']} steps in {about['seconds']} seconds")
        return cls(about["taken"], records, best, about["seconds"])


def _epoch(record: Any) -> Epoch:
    if not isinstance(record, list) or len(record) != len(Epoch._fields):
        raise TypeError(f"an epoch is {record!r}")
    if (
        any(isinstance(v, bool) or not isinstance(v, int | float) for v in record)
        or not isinstance(record[0], int)
        or not all(map(math.isfinite, record))
    ):
        raise TypeError(f"an epoch is {record!r}")
    return Epoch(*record)
