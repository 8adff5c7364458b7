"""Measurements as JSON lines: one line each, so that an interrupted run keeps what it has."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[Any, ...]

# what was timed in turn has all of these in common
KEY = (
    "device",
    "case",
    "direction",
    "precision",
    "rows",
    "features",
    "hidden",
    "couplings",
    "allocator",
)
REQUIRED = ("device", "case", "provider", "status")


def read(paths: Iterable[str | Path]) -> list[Record]:
    """All measurements in the files, and in the folders' files `*.jsonl` at any depth.

    A broken line, as an interrupted run leaves one, is skipped with a warning.

    Raises:
        ValueError: a path does not exist, a folder has no such file, a file has no good line.
    """
    return [record for path in files(paths) for record in _read(path)]


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files themselves and the folders' `*.jsonl`, each once."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.rglob("*.jsonl"))
            if not inside:
                raise ValueError(f"no *.jsonl in {path}")
            found |= dict.fromkeys(inside)
        elif path.exists():
            found[path] = None
        else:
            raise ValueError(f"no such file or folder: {path}")
    return list(found)


def append(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one line, which is on its way to the disk when this returns; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # or a line that was cut off would spoil this one too
                line = b"\n" + line
        file.write(line)
        file.flush()


def groups(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Measurements by what they have in common (`KEY`), in the order of first appearance.

    Of a provider measured several times, the newest run counts, also if it failed there.
    """
    found: dict[Key, dict[str, Record]] = {}
    for record in records:
        group = found.setdefault(key(record), {})
        provider = record["provider"]
        if provider not in group or date(record) >= date(group[provider]):
            group[provider] = record
    return {k: list(group.values()) for k, group in found.items()}


def key(record: Mapping[str, Any]) -> Key:
    """The values of `KEY`, hashable."""
    return tuple(
        tuple(v) if isinstance(v := record.get(field), list) else v  # hidden
        for field in KEY
    )


def date(record: Mapping[str, Any]) -> str:
    """When the run began: ISO 8601 in UTC, which sorts as text."""
    return str((record.get("run") or {}).get("date") or "")


def number(record: Mapping[str, Any], field: str) -> float | None:
    """A finite number, or None where it is absent."""
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def ceilings(newest: Iterable[Record]) -> dict[str, list[dict[str, float]]]:
    """Those measured, by precision: each run's."""
    found: dict[str, list[dict[str, float]]] = {}
    for record in newest:
        given = record.get("ceilings") or {}
        rates = {k: number(given, k) for k in ("flops", "bytes")}
        known = {k: v for k, v in rates.items() if v}
        mine = found.setdefault(str(record.get("precision")), [])
        if len(known) == len(rates) and known not in mine:
            mine.append(known)
    return {precision: rates for precision, rates in found.items() if rates}


def is_timed(record: Mapping[str, Any]) -> bool:
    """Whether there is a time to speak of."""
    return record.get("status") == "timed" and (number(record, "median") or 0) > 0


def slug(device: str) -> str:
    """The device's name as a folder's.

    >>> slug("AMD EPYC, 2 threads")
    'amd-epyc-2-threads'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def widths(hidden: Sequence[int]) -> str:
    """Hidden layers in short.

    >>> widths((256, 256, 128))
    '256 x 2, 128 x 1'
    """
    return ", ".join(f"{w} x {len(list(same))}" for w, same in itertools.groupby(hidden))


def _read(path: Path) -> list[Record]:
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    good = list(_parsed(lines))
    if not good:
        raise ValueError(f"no measurement in {path}: {len(lines)} lines, none of them whole")
    if broken := len(lines) - len(good):
        warnings.warn(f"{path}: skipped {broken} broken of {len(lines)} lines", stacklevel=3)
    return good


def _parsed(lines: Iterable[bytes]) -> Iterator[Record]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or cut within a character
            continue
        if isinstance(record, dict) and all(isinstance(record.get(f), str) for f in REQUIRED):
            yield record
