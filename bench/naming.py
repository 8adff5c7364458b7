"""What measurements are called in tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import records
from .records import Record

MINE = "nicefast"
STATES = ("no-faults", "null", "default")  # where one of an allocator's states is to be drawn
SIZES: dict[str, Callable[[Any], str]] = {
    "rows": lambda n: f"{n:,} rows",
    "features": lambda n: f"D={n}",
    "hidden": lambda h: f"hidden {records.widths(h)}" if h else "no hidden layer",
    "couplings": lambda n: f"{n} couplings",
}
Names = dict[str, str]  # a measurement's case as text -> what it is called in tables and pictures


def distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, texts)))


def ordered(states: Iterable[str]) -> list[str]:
    """States of the allocator, each once, those in `STATES` first."""
    known = {state: i for i, state in enumerate(STATES)}
    return sorted(dict.fromkeys(states), key=lambda s: known.get(s, len(known)))


def is_flow(record: Record) -> bool:
    """Whether it computes matrix products; the element-wise cases have no layers."""
    return bool(record.get("hidden"))


def title(record: Record) -> str:
    return ": ".join(distinct([record["case"], record.get("title") or ""]))


def names_of(newest: Iterable[Record]) -> Names:
    """Each case in short: with those of its sizes that differ within the case."""
    by_case: dict[str, list[Record]] = {}
    for record in newest:
        by_case.setdefault(record["case"], []).append(record)
    names = {}
    for case, found in by_case.items():
        varying = [f for f in SIZES if len({str(r.get(f)) for r in found}) > 1]
        for r in found:
            sizes = [SIZES[f](r[f]) for f in varying if r.get(f) is not None]
            names[_identity(r)] = ", ".join([case, *sizes])
    return names


def _identity(record: Record) -> str:
    return str([record["case"], *(record.get(f) for f in SIZES)])


def name_of(record: Record, names: Names) -> str:
    return names[_identity(record)]


def one_state(timed: Iterable[Record]) -> list[Record]:
    """Of what was measured in several states of the allocator, the first by `STATES`."""
    chosen: dict[str, tuple[int, Record]] = {}
    for r in timed:
        state = r.get("allocator")
        rank = STATES.index(state) if state in STATES else len(STATES)
        same = str([r["provider"], *(r.get(f) for f in records.KEY if f != "allocator")])
        if same not in chosen or rank < chosen[same][0]:
            chosen[same] = rank, r
    return [r for _, r in chosen.values()]
