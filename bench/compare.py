"""Two runs beside each other: `python -m bench compare A B` says what got slower.

Measurements are matched by everything but the device, so that A and B may be two commits on one
machine or one commit on two. The ratio is B's median time over A's: above 1, B takes longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import records
from .records import Key, Record

CONFIDENCE = 0.98  # that nothing is called different by noise within the runs
# two runs of the same code differ by more than the rounds within one of them show: frequency,
# neighbours and where memory came to lie are the same for all rounds of a run
FLOOR = 0.05
FEW = 5  # fewer samples than this say too little about their own spread to be resampled
RESAMPLES = 20_000


class Ratio(NamedTuple):
    """B's median over A's, and between what limits noise alone could move it."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "same"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if anything is slower beyond the noise, 2 if nothing compares."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="file or folder of JSON lines: before")
    parser.add_argument("b", metavar="B", help="file or folder of JSON lines: after")
    parser.add_argument("--provider", default="nicefast", help="whose times, default: nicefast")
    options = parser.parse_args(argv)
    try:
        a, b = (_measurements(path, options.provider) for path in (options.a, options.b))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    common = [k for k in a if k in b and records.is_timed(a[k]) and records.is_timed(b[k])]
    if not common:
        print(
            f"nothing to compare: no measurement of {options.provider} is timed in both "
            f"{options.a} and {options.b}",
            file=sys.stderr,
        )
        return 2
    # so that the chance of a false alarm does not grow with the number of measurements
    confidence = 1 - (1 - CONFIDENCE) / len(common)
    ratios = {k: ratio(a[k], b[k], confidence) for k in common}
    print("\n".join(_table(ratios, a, b)))
    verdicts = [r.verdict for r in ratios.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("faster", "slower", "same"))
    print(f"\n{options.provider}: {len(common)} compared: {counts}")
    for where, mine, other in (("A", a, b), ("B", b, a)):
        lone = [k for k in mine if records.is_timed(mine[k]) and k not in common]
        if lone:
            print(f"{len(lone)} timed in {where} only:")
            print("\n".join(f"  {_name(k)}{_reason(other.get(k))}" for k in lone))
    return int("slower" in verdicts)


def ratio(a: Record, b: Record, confidence: float = CONFIDENCE) -> Ratio:
    """B's median time over A's with its noise band, which is never narrower than `FLOOR`.

    The band is a percentile bootstrap of the ratio of medians, each side's samples resampled
    independently with a fixed seed. Without samples it is what the 20 % and 80 % quantiles of the
    two allow: for nine normal rounds about three standard deviations of the ratio, for more rounds
    more. Of fewer than `FEW` samples, twice the distance to the extremes.
    """
    value = _quotient(b["median"], a["median"])
    samples = [_samples(r) for r in (a, b)]
    if min(map(len, samples)) >= FEW:
        generator = np.random.default_rng(0)
        of_a, of_b = (resampled_medians(np.asarray(s), generator) for s in samples)
        tail = (1 - confidence) / 2
        low, high = np.quantile(of_b / of_a, (tail, 1 - tail))
    else:
        (low_a, high_a), (low_b, high_b) = _limits(a), _limits(b)
        low, high = _quotient(low_b, high_a), _quotient(high_b, low_a)
    floor = 1 + FLOOR
    return Ratio(value, min(float(low), value / floor), max(float(high), value * floor))


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("inf")


def resampled_medians(samples: Any, generator: Any, count: int = RESAMPLES) -> Any:
    """Medians of ``count`` resamples with replacement, without drawing the resamples.

    A resample takes the samples at n uniform positions, so its median is the sample at the middle
    one of these, and order statistics of uniforms are beta distributed. The cost does not grow
    with n, of which short calls have many.
    """
    ordered, n = np.sort(samples), len(samples)
    lower = (n + 1) // 2
    position = generator.beta(lower, n + 1 - lower, count)
    medians = ordered[np.minimum((position * n).astype(int), n - 1)]
    if n % 2 == 0:  # the next position is the least of those n - lower that lie above
        position = position + (1 - position) * generator.beta(1, n - lower, count)
        medians = (medians + ordered[np.minimum((position * n).astype(int), n - 1)]) / 2
    return medians


def _samples(record: Record) -> list[float]:
    return [s for s in record.get("samples") or () if isinstance(s, int | float) and s > 0]


def _limits(record: Record) -> tuple[float, float]:
    median, samples = record["median"], _samples(record)
    if 0 < len(samples) < FEW:
        return max(0.0, 2 * min(samples) - median), 2 * max(samples) - median
    low, high = records.number(record, "low"), records.number(record, "high")
    return median if low is None else low, median if high is None else high


def _measurements(path: str, provider: str) -> dict[Key, Record]:
    """By key without the device, which is the key's first field."""
    found = records.groups(records.read([path]))
    devices = {k[0] for k in found}
    if len(devices) > 1:
        names = "; ".join(sorted(devices))
        raise ValueError(f"{path} holds several devices, name the folder of one: {names}")
    return {k[1:]: r for k, group in found.items() for r in group if r["provider"] == provider}


def _table(ratios: dict[Key, Ratio], a: dict[Key, Record], b: dict[Key, Record]) -> list[str]:
    width = max(len(_name(k)) for k in ratios)
    lines = [f"{'':{width}}{'ms A':>12}{'ms B':>12}{'B / A':>8}{'noise band':>14}  verdict"]
    for k, r in ratios.items():
        band = f"{r.low:.2f}-{r.high:.2f}"
        lines.append(
            f"{_name(k):{width}}{a[k]['median'] * 1e3:>12.4g}{b[k]['median'] * 1e3:>12.4g}"
            f"{r.value:>8.2f}{band:>14}  {r.verdict}"
        )
    return lines


def _name(key: Key) -> str:
    """All that the measurement differs in from another.

    >>> _name(("tabular", "log_prob", "float32", 16384, 64, (256, 256), 4, "default"))
    'tabular log_prob float32, 16,384 rows, D=64, hidden 256 x 2, 4 couplings, default'
    """
    case, direction, precision, rows, features, hidden, couplings, allocator = key
    parts = [" ".join(str(p) for p in (case, direction, precision) if p)]
    parts += [f"{rows:,} rows"] if rows else []
    parts += [f"D={features}"] if features else []
    parts += [f"hidden {records.widths(hidden)}"] if hidden else []
    parts += [f"{couplings} couplings"] if hidden and couplings else []
    parts += [allocator] if allocator else []
    return ", ".join(parts)


def _reason(record: Record | None) -> str:
    return "" if record is None else f" ({' '.join(record['status'].split())})"
