"""A file scored, killed half-way, resumed and compared: `python -m bench.scoring RUN [--rows N]`.

Makes a file of N rows, samples of the run's own flow, then scores it with `nicefast score` once
without a break and once with `kill -9` in the middle and `--resume`; the two results must be equal
byte for byte. Prints rates: of the flow alone on rows in memory, and from file to file.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import nicefast as nf
from nicefast.preprocessing import Preprocessing

SAMPLES = 50_000  # drawn; the file repeats them
PART = 65_536


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of nicefast fit")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args(argv)
    if not (options.run / "result.json").is_file() or options.rows < 1:
        print("python -m bench.scoring: RUN must be a finished run, --rows >= 1", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        return demonstrate(options.run, options.rows, Path(folder))


def demonstrate(run: Path, rows: int, folder: Path) -> int:
    """What the command does, in ``folder``; 1 where the two results differ."""
    source, whole, broken = (folder / name for name in ("rows.npy", "whole.npy", "broken.npy"))
    model = nf.load(run / "model.safetensors")
    steps = Preprocessing.load(run / "preprocessing.safetensors")
    size = make_file(model, steps, rows, source)
    rate = rate_in_memory(model, rows)
    print(f"{rows:,} rows of {model.features} features, {size / 1e6:,.0f} MB")
    print(f"log_prob of rows in memory, preprocessed   {rate:>12,.0f} rows/s")

    began = time.perf_counter()
    nf.score(run, source, whole)
    taken = time.perf_counter() - began
    print(f"scored from file to file                   {rows / taken:>12,.0f} rows/s")

    command = [sys.executable, "-m", "nicefast", "score", str(run), str(source)]
    command += ["--out", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal = broken.with_name(f"{broken.name}.unfinished") / "journal.jsonl"
    while process.poll() is None and _lines(journal) < 1 + rows // PART // 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(0, _lines(journal) - 1)
    print(f"killed (kill -9) with {done} chunks finished, nothing under the final name: ", end="")
    print("yes" if not broken.exists() else "NO")
    if not broken.exists():
        subprocess.run([*command, "--resume"], check=True)
    same = whole.read_bytes() == broken.read_bytes()
    print(f"the resumed file is byte for byte the unbroken one: {'yes' if same else 'NO'}")
    shutil.rmtree(journal.parent, ignore_errors=True)
    return 0 if same else 1


def make_file(model: nf.NICE, steps: Preprocessing, rows: int, path: Path) -> int:
    """Write samples of the model as raw rows, over and over; gives the file's bytes."""
    drawn = model.sample(min(SAMPLES, rows), generator=torch.Generator().manual_seed(0)).detach()
    raw = (steps.levels(drawn) if steps.discrete else steps.inverse(drawn)).flatten(1).numpy()
    file = np.lib.format.open_memmap(path, mode="w+", dtype=raw.dtype, shape=(rows, *raw.shape[1:]))
    for start in range(0, rows, len(raw)):
        part = file[start : start + len(raw)]
        part[:] = raw[: len(part)]
    file.flush()
    return path.stat().st_size


@torch.no_grad()
def rate_in_memory(model: nf.NICE, rows: int) -> float:
    """Rows a second of ``log_prob`` alone: the median of five calls."""
    x = torch.rand(min(rows, PART), *model.event_shape)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        model.log_prob(x)
        times.append(time.perf_counter() - began)
    return len(x) / sorted(times[1:])[2]


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
