"""One table: providers pass the gate, are timed in turn, and leave one record each."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nicefast.roofline import Ceilings, Work

from . import elementwise, timing
from .gate import Gate
from .providers import OWN, PRECISIONS, PROVIDERS, Mode, Shape, make_call
from .timing import Call
from .work import elementwise_work, flow_work
from .workloads import Task

Record = dict[str, Any]
COPY_BYTES = 1 << 26
MEMORY_SHARE = 0.7  # of what is free: a case that may need more is left out
LEAST_SECONDS = 5e-3  # of a turn: shorter calls are repeated
#: operators that compute nothing
FREE = ("empty", "detach", "view", "slice", "t", "transpose", "select", "alias", "expand")
FREE += ("unsqueeze", "split")


def flow_records(
    task: Task, gate: Gate, inputs: Sequence[torch.Tensor], rounds: int, seconds: float
) -> list[Record]:
    """A record for each provider; those not timed say why."""
    shape, device = task.shape, inputs[0].device
    records: dict[str, Record] = {}
    calls: dict[str, dict[Mode, Call]] = {}
    for name in task.providers:
        records[name], calls[name] = admit(name, gate, task.precision, task.direction)
        records[name] = task.describe() | {"provider": name} | records[name]
    # what autocast has cast stays cast between calls, as in a loop over batches; not in training,
    # where each step changes the weights
    keep_casts = (
        contextlib.nullcontext()
        if task.direction == "training"
        else torch.autocast(device.type, enabled=False)
    )
    with keep_casts:
        chosen = _fastest_modes(calls, records, inputs, device, rounds)
        ceiling_calls, units = _ceilings(task.precision, device, small=rounds <= 2)
        timings = timing.interleave(
            chosen | ceiling_calls, inputs, device, rounds, seconds, least=LEAST_SECONDS
        )
        for name, call in chosen.items():
            records[name] |= {
                "launches": launches(call, inputs[0], name, device),
                "peak_bytes": peak_bytes(call, inputs[0], device),
            }
            if device.type == "cuda" and task.direction != "training":
                records[name] |= bare(call, inputs[0], device)
    ceilings = _rates(timings, units)
    work = flow_work(shape.rows, shape.features, shape.hidden, shape.couplings, task.direction)
    for name in chosen:
        _add_timing(records[name], timings[name], work, ceilings)
    finish(list(records.values()))
    return list(records.values())


def bare(call: Call, given: torch.Tensor, device: torch.device) -> Record:
    """Seconds of what a call launches, without the host, or why they can't be had: not every call
    can be captured."""
    call.prepare()
    try:
        return {"bare": timing.bare(lambda: call.run(given), device)}
    except Exception as error:  # whatever a provider raises, the whole call is timed
        return {"not_bare": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def admit(name: str, gate: Gate, precision: str, direction: str) -> tuple[Record, dict[Mode, Call]]:
    """Build a provider, and the calls in those modes that pass the gate."""
    try:
        model = PROVIDERS[name](gate.shape, gate.weights).to(gate.x.device)
    except ImportError as error:
        return {"status": f"not installed: {error}"}, {}
    except Exception as error:  # whatever a provider raises, it is out and the others go on
        return {"status": f"failed: {type(error).__name__}: {error}"}, {}
    if direction == "training" and not model.trains:
        return {"status": "skipped: it computes without gradients alone"}, {}
    record: Record = {"status": "timed", "errors": {}}
    calls, failures = {}, []
    for mode in PRECISIONS[precision]:
        try:
            errors, failure = gate.check(model, precision, mode, direction)
        except Exception as error:
            errors, failure = None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if failure or errors is None:
            failures.append(f"{mode.name}: {failure}")
            continue
        calls[mode] = Call(make_call(model, mode, direction), mode.prepare)
        record["errors"][mode.name] = errors.value
    if failures:
        record["failures"] = failures
        if not calls:
            record["status"] = "failed: " + "; ".join(failures)
    return record, calls


def _fastest_modes(
    calls: Mapping[str, dict[Mode, Call]],
    records: dict[str, Record],
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    rounds: int,
) -> dict[str, Call]:
    """Of each provider the call in its fastest mode, by a short trial."""
    several = {
        f"{name} {mode.name}": call
        for name, ways in calls.items()
        if len(ways) > 1
        for mode, call in ways.items()
    }
    trial = timing.interleave(several, inputs, device, max(1, min(3, rounds - 1)), warmup=1)
    chosen = {}
    for name, ways in calls.items():
        if not ways:
            continue
        medians = {
            mode: trial[f"{name} {mode.name}"].median if len(ways) > 1 else 0.0 for mode in ways
        }
        best = min(ways, key=lambda mode, medians=medians: medians[mode])
        chosen[name] = ways[best]
        records[name]["mode"] = best.name
        records[name]["error"] = records[name].pop("errors")[best.name]
    return chosen


def _ceilings(
    precision: str, device: torch.device, small: bool
) -> tuple[dict[str, Call], dict[str, float]]:
    """What the device can do at most, timed among the rest; operations or bytes of one call."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = (1024 if small else 2048) if device.type == "cpu" else 8192
    calls, operations = timing.product_calls(dtype, size, device, tf32=precision == "tf32")
    numbers = COPY_BYTES // 4 * (1 if device.type == "cpu" else 16)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    units: dict[str, float] = dict.fromkeys(calls, float(operations))
    calls["copy"] = Call(lambda _: target.copy_(source))
    units["copy"] = 8.0 * numbers
    return calls, units


def _rates(timings: Mapping[str, timing.Timing], units: Mapping[str, float]) -> Ceilings:
    rates = {name: unit / timings[name].median for name, unit in units.items()}
    moved = rates.pop("copy")
    return Ceilings(max(rates.values()), moved)


def _add_timing(record: Record, t: timing.Timing, work: Work, ceilings: Ceilings) -> None:
    least = ceilings.seconds(work.flops, work.bytes)
    products = work.flops / ceilings.flops > work.bytes / ceilings.bytes
    record |= asdict(t) | {
        "operations": work.flops,
        "bytes": work.bytes,
        "ceilings": ceilings._asdict(),
        "rows_per_s": record["rows"] / t.median,
        "flops_per_s": work.flops / t.median,
        "bytes_per_s": work.bytes / t.median,
        "bound": "products" if products else "bytes",
        "share": least / t.median,
    }


def finish(records: Sequence[Record]) -> None:
    """Add each one's ratio to the fastest other."""
    timed = [r for r in records if "median" in r]
    for record in timed:
        own = OWN if record["provider"] in OWN else (record["provider"],)
        others = [r for r in timed if r["provider"] not in own and not r.get("yardstick")]
        if others:
            best = min(others, key=lambda r: r["median"])
            record["best_other"] = best["provider"]
            record["to_best_other"] = best["median"] / record["median"]


def elementwise_records(
    rows: int, features: int, device: torch.device, rounds: int, seconds: float
) -> Iterator[list[Record]]:
    """The coupling (forward, inverse, backward), scaling + prior (forward, backward), sampling."""
    for operation in elementwise.operations(rows, features, device):
        records: dict[str, Record] = {}
        calls: dict[str, Call] = {}
        for name, way in operation.ways.items():
            record: Record = {
                "case": operation.case,
                "title": f"{operation.case} {operation.direction}, {rows:,} rows of {features}",
                "direction": operation.direction,
                "precision": "float32",
                "provider": name,
                "rows": rows,
                "features": features,
                "hidden": [],
                "couplings": 0,
                "mode": "float32",
                "yardstick": name in operation.yardsticks,
            }
            records[name] = record
            if name == elementwise.COMPILED and not elementwise.has_compiler(device):
                record["status"] = "skipped: no C++ compiler"
                continue
            try:
                error, failure = operation.check(name)
            except Exception as raised:
                error, failure = None, f"{type(raised).__name__}: {str(raised).splitlines()[0]}"
            if failure:
                record["status"] = f"failed: {failure}"
                continue
            record |= {"status": "timed", "error": error}
            calls[name] = Call(way)
        ceiling_calls, units = _ceilings("float32", device, small=True)
        inputs = operation.inputs
        timings = timing.interleave(calls | ceiling_calls, inputs, device, rounds, seconds)
        ceilings = _rates(timings, units)
        work = elementwise_work(rows, features, operation.work)
        for name, call in calls.items():
            records[name]["launches"] = launches(call, inputs[0], name, device)
            records[name]["peak_bytes"] = peak_bytes(call, inputs[0], device)
            _add_timing(records[name], timings[name], work, ceilings)
        finish(list(records.values()))
        yield list(records.values())


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (name in FREE or "split" in name)
        return func(*args, **(kwargs or {}))


def launches(call: Call, given: Any, name: str, device: torch.device) -> int | None:
    """Kernels that one call launches on a GPU; on a CPU, operators that it asks PyTorch for.

    None where that can't be seen: what is compiled for a CPU asks for none.
    """
    call.prepare()
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call.run(given)
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())
    if "compile" in name:
        return None
    with _Operators() as seen:
        call.run(given)
    return seen.count


def peak_bytes(call: Call, given: Any, device: torch.device) -> int | None:
    """Memory that one call needs beyond what is there before it: on a CPU, by the kernel's count of
    resident pages, after the C library has given back what it keeps. None where that can't be had.
    """
    call.prepare()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run(given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status("VmRSS")
        call.run(given)
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[key].split()[0]) * 1024


def needed_bytes(shape: Shape, direction: str, providers: int) -> int:
    """A generous guess at what a table needs: weights of everybody (gradients and Adam's two
    moments in training), activations of one, and inputs."""
    weights = 4 * sum(a * b for a, b in zip(shape.widths, shape.widths[1:], strict=False))
    weights *= shape.couplings * providers * (4 if direction == "training" else 1)
    depth = shape.couplings * len(shape.widths) if direction == "training" else 3
    return weights + 8 * shape.rows * (max(shape.widths) * depth + 4 * shape.features)


def free_bytes(device: torch.device) -> int:
    """Of memory, on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def too_large(task: Task, device: torch.device) -> str | None:
    """Why a table is left out for want of memory, if it is."""
    needed = needed_bytes(task.shape, task.direction, len(task.providers))
    free = free_bytes(device)
    if needed <= MEMORY_SHARE * free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
