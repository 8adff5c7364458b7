"""Whole-flow and element-wise kernels on a device, without the host: `python -m bench.gpu_kernels`.

One JSON line for each measurement is written as soon as it is made, in this order: what the device
can do at most; every tile that ships, in each direction, against float64, five times over; bare
launches and whole calls for flows of 1M and 4M rows; element-wise kernels. `--warm` compiles
whole-flow kernels in many processes, and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import nicefast as nf
from nicefast.runtime import backend

from . import elementwise, measure, records, timing
from .providers import AUTOCAST, FLOAT32, TF32, Mode
from .work import elementwise_work, flow_work
from .workloads import ELEMENTWISE_SIZES

MODES = {"fp32": FLOAT32, "tf32": TF32, "bf16": AUTOCAST}
TIMED = ((8, 64), (64, 64), (64, 128), (64, 256))  # features, units of two hidden layers
SIZES = (1 << 20, 1 << 22)  # rows
COUPLINGS, REPEATS = 4, 5
FACTOR = 4.0  # the largest error may be so many times PyTorch's own at the same precision

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--rows", type=int, help="of every measurement; default: 1M and 4M")
    parser.add_argument("--quick", action="store_true", help="one of each kind")
    parser.add_argument("--flow", action="store_true", help="one small flow alone, for a profiler")
    parser.add_argument("--warm", type=int, metavar="PROCESSES", help="compile, run nothing")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu_kernels: device cuda was asked for, torch finds no GPU", file=sys.stderr)
        return 2
    if options.warm:
        return warm(backend.architecture(device), options.warm, options.quick)
    torch.manual_seed(0)
    with nf.set_backend("triton"):
        if options.flow:
            found = attempt(checked, "fp32", 8, 64, options.rows or 1000, device, 1)
        else:
            found = everything(device, options.rows, options.quick)
        bad = 0
        for record in found:
            records.append(options.out, record)
            print(line(record), flush=True)
            bad += record["status"].startswith("failed")
    print(f"{bad} failed")
    return 1 if bad else 0


def everything(device: torch.device, rows: int | None, quick: bool) -> Iterator[Record]:
    """All measurements, what is worth most first."""
    most, repeats = (1, 1) if quick else (None, REPEATS)
    for name in list(MODES)[:most]:
        yield from attempt(ceilings, name, device)
    tiles = shipped(device)
    tiles = [tile for tile in tiles if tile[0] == "fp32"][:1] if quick else tiles
    for tile in tiles:
        yield from attempt(checked, *tile, rows or 1000, device, repeats)
    for features, hidden in TIMED[:most]:
        for precision in list(MODES)[:most]:
            for n in [rows] if rows else SIZES:
                yield from attempt(timed, precision, features, hidden, n, device, repeats)
    for n, features in ELEMENTWISE_SIZES[:most]:
        yield from attempt(elementwise_kernels, rows or 4 * n, features, device, repeats)


def attempt(measured: Callable[..., Record | Iterator[Record]], *what: Any) -> Iterator[Record]:
    """What is measured; a record of the failure where that fails, and the others go on."""
    try:
        found = measured(*what)
        yield from [found] if isinstance(found, dict) else found
    except Exception as error:
        said = str(error).partition("\n")[0]
        named = " ".join(str(w) for w in what)
        status = f"failed: {named}: {type(error).__name__}: {said}"
        yield {"kind": measured.__name__, "status": status}


def shipped(device: torch.device) -> list[tuple[str, int, int, int]]:
    """Precision, features, hidden units and couplings for every whole-flow tile of this
    architecture; a flow of one coupling more has no weights that stay on the chip."""
    from .flow_cases import flow_tiles, resident_tiles

    arch = backend.architecture(device)
    deep = [(p, tile.features, tile.hidden, COUPLINGS + 1) for p, tile in flow_tiles(arch)]
    resident = [
        (p, 2 * tile.half, tile.hidden, COUPLINGS)
        for p, tile in resident_tiles(arch)
        if not tile.context
    ]
    return deep + resident


def ceilings(name: str, device: torch.device) -> Record:
    """What products and a copy reach here."""
    kind = "bf16" if name == "bf16" else "tf32" if name == "tf32" else "float32"
    calls, units = measure._ceilings(kind, device, small=device.type == "cpu")
    found = timing.interleave(calls, [None], device, rounds=5)
    best = measure._rates(found, units)
    return {"kind": "ceiling", "precision": name, "status": "timed"} | best._asdict()


def flow_of(
    features: int, hidden: int, device: torch.device, couplings: int = COUPLINGS
) -> nf.NICE:
    """A random flow of two hidden layers, half split."""
    flow = nf.NICE(features, (hidden, hidden), couplings, partition="half")
    with torch.no_grad():
        flow.scaling.log_scale.normal_(0, 0.3)
        for coupling in flow.couplings:
            coupling.conditioner.linears[-1].reset_parameters()  # away from the identity
    return flow.to(device)


def checked(
    precision: str, features: int, hidden: int, couplings: int, rows: int, device: torch.device,
    repeats: int,
) -> Record:  # fmt: skip
    """One tile in every direction: its error, PyTorch's, their ratio, and equal bits in repeats.

    PyTorch's errors are at the same precision of products: on Hopper, whose tensor cores truncate
    as they add, both are larger than float32's usual ones.
    """
    record: Record = {
        "kind": "tile", "precision": precision, "features": features, "hidden": hidden,
        "couplings": couplings, "rows": rows, "status": "checked", "ratios": {},
    }  # fmt: skip
    mode, flow = MODES[precision], flow_of(features, hidden, device, couplings)
    exact, x = copy.deepcopy(flow).double(), torch.randn(rows, features, device=device)
    with torch.no_grad(), in_mode(mode, device):
        plan = flow.plan(x)
        if plan.name != "kernel":
            return record | {"status": f"skipped: {plan.reason}"}
        if precision == "tf32" and device.type == "cpu":
            return record | {"status": "skipped: PyTorch has no tf32 here to compare with"}
        record["tile"] = str(plan.engine.tile)
        for direction, (call, define) in directions(plan.engine, rows).items():
            results = [call(x) for _ in range(repeats)]
            with nf.set_backend("reference"):
                plain = define(flow, x).float()
                with torch.autocast(device.type, enabled=False):
                    true = define(exact, x.double())
            errors = [(t.double() - true).abs().max().item() for t in (results[0], plain)]
            ratio = errors[0] / max(errors[1], 1e-300)
            record["ratios"][direction] = ratio
            record[direction] = {"error": errors[0], "pytorch": errors[1]}
            if not all(torch.equal(results[0], other) for other in results[1:]):
                record["status"] = f"failed: {direction}: {repeats} repeats differ"
            tiny = 8 * torch.finfo(torch.float32).eps * true.abs().max().item()
            if not errors[0] <= FACTOR * errors[1] + tiny:  # nor NaN
                record["status"] = f"failed: {direction}: error ratio {ratio:.3g}"
    return record


def directions(engine: Any, rows: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Of each direction the bare launch of an engine, and the definition by a flow."""

    def sample(flow: nf.NICE, x: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        noise = nf.reference.sample_prior(zero, rows, 5, flow.prior_name)
        return flow.inverse(noise)[0]

    return {
        "log_prob": (engine.log_prob, lambda flow, x: flow.log_prob(x)),
        "forward": (engine.forward, lambda flow, x: flow(x)[0]),
        "inverse": (engine.inverse, lambda flow, x: flow.inverse(x)[0]),
        "sample": (lambda x: engine.sample(len(x), 0, 5, None), sample),
    }


def timed(
    precision: str, features: int, hidden: int, rows: int, device: torch.device, repeats: int
) -> Iterator[Record]:
    """Bare launches and whole calls of one flow, log_prob, inverse and sample."""
    mode, flow = MODES[precision], flow_of(features, hidden, device)
    x = torch.randn(rows, features, device=device)
    whole: dict[str, Callable[[], Any]] = {
        "log_prob": lambda: flow.log_prob(x),
        "inverse": lambda: flow.inverse(x),
        "sample": lambda: flow.sample(rows),
    }
    with torch.no_grad(), in_mode(mode, device):
        plan = flow.plan(x)
        for direction, call in itertools.islice(whole.items(), 1 if repeats == 1 else None):
            record: Record = {
                "kind": "time", "direction": direction, "precision": precision,
                "features": features, "hidden": hidden, "rows": rows, "status": "timed",
            }  # fmt: skip
            if plan.name != "kernel":
                yield record | {"status": f"skipped: {plan.reason}"}
                continue
            launch = directions(plan.engine, rows)[direction][0]
            seconds = timing.bare(
                lambda launch=launch: launch(x), device, repeats if repeats == 1 else 4 * repeats
            )
            work = flow_work(rows, features, (hidden, hidden), COUPLINGS, direction)
            yield record | rates(seconds, work) | {
                "call_seconds": call_seconds(call, device, repeats), "rows_per_s": rows / seconds,
            }  # fmt: skip


def elementwise_kernels(
    rows: int, features: int, device: torch.device, repeats: int
) -> Iterator[Record]:
    """Our element-wise operations alone, in float32: bytes a second."""
    found = elementwise.operations(rows, features, device)
    for operation in itertools.islice(found, 1 if repeats == 1 else None):
        way, given = operation.ways["nicefast"], operation.inputs[0]
        way(given)
        record: Record = {
            "kind": "elementwise", "precision": "fp32", "rows": rows, "features": features,
            "direction": f"{operation.case} {operation.direction}", "status": "timed",
        }  # fmt: skip
        capturable = operation.direction != "backward"  # autograd's own stream is no capture's
        call = lambda way=way, given=given: way(given)  # noqa: E731
        seconds = (
            timing.bare(call, device, repeats if repeats == 1 else 4 * repeats)
            if capturable
            else call_seconds(call, device, repeats)
        )
        yield record | rates(seconds, elementwise_work(rows, features, operation.work))


def rates(seconds: float, work: Any) -> Record:
    moved = work.bytes / seconds
    return {"seconds": seconds, "flops_per_s": work.flops / seconds, "bytes_per_s": moved}


def call_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of a whole call, until its result is there: the host's time is in it."""
    found = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


@contextlib.contextmanager
def in_mode(mode: Mode, device: torch.device) -> Iterator[None]:
    """Products at this precision, and afterwards at the one before."""
    before = torch.get_float32_matmul_precision()
    mode.prepare()
    try:
        with mode.products(device.type):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def warm(arch: str, processes: int, quick: bool) -> int:
    """Compile the whole-flow kernels into Triton's cache, those of the widest tiles first."""
    from .flow_cases import MASKED, VARIANTS, flow_case, flow_tiles, resident_case, resident_tiles
    from .resources import compile_all

    usual = {"activation": "relu", "prior": "logistic", "context": 0, "width": "full"}
    usual |= {"layout": "dense", "rows": 1000}
    cases = []
    for precision, tile in flow_tiles(arch):
        for kernel in MASKED:
            for outputs in VARIANTS[kernel].get("outputs", (None,))[:2]:
                variant = usual | ({"outputs": outputs} if outputs else {})
                cases.append(flow_case(kernel, arch, precision, tile, variant))
    cases.sort(key=lambda case: -case.flow.hidden * case.tile.columns)
    for precision, resident in resident_tiles(arch):
        for call in VARIANTS["resident_kernel"]["call"]:
            variant = usual | {"call": call, "sides": "half"}
            cases.insert(0, resident_case("resident_kernel", arch, precision, resident, variant))
    cases = cases[-1:] if quick else cases
    failed = [r.error for _, r in compile_all(cases, processes) if r.error]
    print(*failed, f"{len(cases)} kernels, {len(failed)} failed to compile", sep="\n")
    return 1 if failed else 0


def line(record: Record) -> str:
    """A record for people."""
    names = ("kind", "direction", "precision", "features", "hidden", "rows", "status")
    said = " ".join(str(record[name]) for name in names if name in record)
    if "ratios" in record:
        said += " error ratios " + ", ".join(f"{k} {v:.2f}" for k, v in record["ratios"].items())
    if "seconds" in record:
        said += f" {record['seconds'] * 1e3:.4g} ms, {record['bytes_per_s'] / 1e9:.4g} GB/s"
        said += f", {record['flops_per_s'] / 1e12:.4g} TFLOP/s"
    if "call_seconds" in record:
        said += f", whole call {record['call_seconds'] * 1e3:.4g} ms"
    if record["kind"] == "ceiling":
        said += f" {record['flops'] / 1e12:.4g} TFLOP/s, copy {record['bytes'] / 1e9:.4g} GB/s"
    return said


if __name__ == "__main__":
    sys.exit(main())
