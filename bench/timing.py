"""Timings that can be compared on a machine shared with others: in turn, medians, page faults."""

from __future__ import annotations

import gc
import itertools
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nicefast import roofline

# glibc either keeps the memory that is freed to it, so that page faults end with the warm-up, or
# does as it does by default; each state is a process of its own
ALLOCATORS: dict[str, dict[str, str]] = {
    "no-faults": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
    "default": {},
}
# glibc as it starts, and kept so: setting a threshold ends its learning from what is freed
FRESH = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
MOST_REPEATS = 100  # calls in one turn


@dataclass(frozen=True)
class Call:
    """Something to time: ``run(input)``, after ``prepare()``, which is not timed."""

    run: Callable[[Any], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds and minor page faults of one call: median, 20 % and 80 % quantiles, every round."""

    median: float
    low: float
    high: float
    faults: float
    rounds: int
    timer: str
    samples: list[float]


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between the two nearest values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who goes when in round ``turn``: rotated by one each round, every other cycle backwards."""
    start = turn % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if turn // len(names) % 2 else turned


def interleave(
    calls: Mapping[str, Call],
    inputs: Sequence[Any],
    device: torch.device,
    rounds: int = 9,
    seconds: float = 0.0,
    warmup: int = 2,
    least: float = 0.0,
) -> dict[str, Timing]:
    """Time the calls in turn, for at least ``rounds`` rounds and ``seconds`` seconds.

    Every call gets the next of ``inputs``, which are on ``device``. What a call returns is freed
    before its time is taken. The turn of one that takes less than ``least`` seconds is as many
    calls as fill them: nobody computes one tiny batch after having been away, and long calls
    beside short ones are not repeated.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[float]] = {name: [] for name in calls}
    stream = itertools.cycle(inputs)
    names = list(calls)
    shortest = dict.fromkeys(names, least)
    for _, name in itertools.product(range(warmup), names):
        shortest[name] = min(shortest[name], _timed(calls[name], stream, device)[0])
    repeats = {
        name: min(MOST_REPEATS, math.ceil(least / max(taken, 1e-9))) if least else 1
        for name, taken in shortest.items()
    }
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds
        for turn in itertools.count():
            if not names or (turn >= rounds and time.perf_counter() >= stop):
                break
            for name in order(names, turn):
                elapsed, faulted = _timed(calls[name], stream, device, repeats[name])
                times[name].append(elapsed)
                faults[name].append(faulted)
    finally:
        gc.enable()
    return {
        name: Timing(
            quantile(t, 0.5),
            quantile(t, 0.2),
            quantile(t, 0.8),
            quantile(faults[name], 0.5),
            len(t),
            "cuda events" if device.type == "cuda" else "perf_counter",
            t,
        )
        for name, t in times.items()
    }


def _timed(
    call: Call, inputs: Iterator[Any], device: torch.device, repeats: int = 1
) -> tuple[float, float]:
    """Seconds and page faults of one call, the mean of ``repeats``."""
    given = list(itertools.islice(inputs, repeats))
    call.prepare()
    before = _page_faults()
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for x in given:
            call.run(x)
        last.record()
        last.synchronize()
        elapsed = first.elapsed_time(last) / 1e3
    else:
        start = time.perf_counter()
        for x in given:
            call.run(x)
        elapsed = time.perf_counter() - start
    return elapsed / repeats, (_page_faults() - before) / repeats


def bare(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Seconds of what ``run`` launches, without the host: the median of replays of a CUDA graph.

    Nothing clears the cache between replays. A CPU has no such graph; there it is the median of
    whole calls.
    """
    clock: Iterator[Any] = itertools.repeat(None)
    if device.type != "cuda":
        whole = Call(lambda _: run())
        return quantile([_timed(whole, clock, device)[0] for _ in range(repeats)], 0.5)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is compiled or made in a first call is no part of it
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay = Call(lambda _: graph.replay())
    return quantile([_timed(replay, clock, device)[0] for _ in range(2 + repeats)][2:], 0.5)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def product_calls(
    dtype: torch.dtype, size: int, device: torch.device, tf32: bool = False
) -> tuple[dict[str, Call], int]:
    """Large matrix products by each library there is, and the operations of one."""
    products, operations = roofline.product_calls(dtype, size, device)
    prepare = _high if tf32 else _highest
    calls = {
        name: Call(lambda _, product=product: product(), prepare)
        for name, product in products.items()
    }
    return calls, operations


def _highest() -> None:
    torch.set_float32_matmul_precision("highest")


def _high() -> None:
    torch.set_float32_matmul_precision("high")


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many inputs are together twice the size of the last-level cache."""
    return max(2, -(-2 * cache_bytes(device) // bytes_each))


def cache_bytes(device: torch.device) -> int:
    """Size of the device's largest cache, 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    unit = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        int(text[:-1]) * unit[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in unit
    ]
    return max(sizes, default=32 << 20)


def device_name(device: str) -> str:
    """What the figures are of, for people."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = " ".join(_cpu_name().replace("(R)", "").replace("(TM)", "").split())
    return f"{cpu}, {torch.get_num_threads()} threads"


def machine(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What figures of the device depend on: processor, threads, versions, commit."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "capability": list(torch.cuda.get_device_capability(device)) if gpu else None,
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "huge_pages": huge.read_text().strip() if huge.exists() else None,
        "libc": " ".join(platform.libc_ver()),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | dict(_versions(packages)),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def allocator_environment(name: str) -> dict[str, str]:
    """This process's environment with the C library's allocator in the named state: one of
    ``ALLOCATORS``, or fresh."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("MALLOC_") and k not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }
    return kept | (FRESH if name == "fresh" else ALLOCATORS[name])


def rerun(module: str, arguments: Sequence[str], allocator: str) -> int:
    """Run a module of this project in a fresh process with the named allocator state."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=allocator_environment(allocator), check=False).returncode


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
