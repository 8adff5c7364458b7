"""How fast files are scored, beside rows in memory: `python -m bench.throughput [--rows N]`.

A fresh NICE of 64 features, 4 couplings of 256 x 3 hidden units, float32. `model.log_prob` of an
array in memory, and `nf.score` from a file to a file of the same kind, take turns; every file's
densities must be those of the array. Prints a table of medians, and the median over rounds of each
rate as a share of that in memory; `--out FILE` writes it too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

import nicefast as nf

from .timing import device_name

FEATURES, HIDDEN, COUPLINGS = 64, (256, 256, 256), 4
KINDS = ("npy", "parquet", "csv")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the table")
    options = parser.parse_args(argv)
    if options.rows < 1 or options.rounds < 1:
        print("python -m bench.throughput: --rows and --rounds must be >= 1", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rows, options.rounds, Path(folder))
    text = table(found, options.rows, options.rounds)
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


def measure(rows: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of every round, by what was done; RuntimeError where densities are not the same."""
    torch.manual_seed(0)
    model = nf.NICE(FEATURES, hidden=HIDDEN, couplings=COUPLINGS)
    for coupling in model.couplings:
        coupling.conditioner.linears[-1].reset_parameters()  # away from the identity
    x = np.random.default_rng(0).standard_normal((rows, FEATURES), np.float32)
    with torch.no_grad():
        expected = model.log_prob(torch.from_numpy(x)).numpy()
    calls: dict[str, Callable[[], None]] = {"memory": _in_memory(model, torch.from_numpy(x))}
    for kind in KINDS:
        source, out = folder / f"rows.{kind}", folder / f"scores.{kind}"
        _write(source, x)
        calls[kind] = _from_file(model, source, out)
        calls[kind]()  # a warm-up, and what is checked
        if not np.allclose(_read(out), expected, rtol=1e-5, atol=1e-3):
            raise RuntimeError(f"the densities in {out.name} are not those of the rows in memory")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _in_memory(model: nf.NICE, x: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        model.log_prob(x)

    return call


def _from_file(model: nf.NICE, source: Path, out: Path) -> Callable[[], None]:
    def call() -> None:
        nf.score(model, source, out, overwrite=True)

    return call


def _write(path: Path, x: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, x)
        return
    columns = pa.table({f"f{d}": x[:, d] for d in range(x.shape[1])})
    if path.suffix == ".csv":
        pa.csv.write_csv(columns, path)
    else:
        pq.write_table(columns, path)


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    read = pa.csv.read_csv if path.suffix == ".csv" else pq.read_table
    return read(path)["log_prob"].to_numpy()


def table(seconds: dict[str, list[float]], rows: int, rounds: int) -> str:
    """Markdown."""
    names = {"memory": "`model.log_prob` of an array in memory"}
    names |= {kind: f"`nf.score`, .{kind} to .{kind}" for kind in KINDS}
    lines = [
        "# Scoring from file to file\n",
        f"Written by `python -m bench.throughput --rows {rows} --rounds {rounds}`: D={FEATURES}, "
        f"hidden {HIDDEN[0]} x {len(HIDDEN)}, {COUPLINGS} couplings, float32, {rows:,} rows, "
        f"medians of {rounds} rounds in turn, files in the page cache. {device_name('cpu')}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.\n",
        "| | rows/s | MB/s of float32 rows | of the rate in memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, taken in seconds.items():
        rate = rows / statistics.median(taken)
        ratios = [m / t for m, t in zip(seconds["memory"], taken, strict=True)]
        lines.append(
            f"| {names[name]} | {rate:,.0f} | {rate * 4 * FEATURES / 1e6:,.0f} | "
            f"{statistics.median(ratios):.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
