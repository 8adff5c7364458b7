"""Whole flows and element-wise operations on the CPU: `python -m bench.cpu`.

nicefast beside plain half-split PyTorch and the couplings of nflows, normflows, FrEIA and zuko:
the same weights, interleaved in one process, in both states of the C library's allocator. Whoever
fails the gate against float64 is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import elementwise, timing
from .gate import Gate
from .providers import (
    PEERS,
    PRECISIONS,
    PROVIDERS,
    Mode,
    Provider,
    Shape,
    log_prob_call,
    make_weights,
    modes,
    training_call,
)
from .timing import ALLOCATORS, Call

SHAPES = {
    "D8": Shape(8, (64, 64), 65_536),
    "D64": Shape(64, (256, 256, 256), 16_384),
    "D784": Shape(784, (1000,) * 5, 512),
    "small": Shape(64, (128, 128), 128, couplings=8),
}
ELEMENTWISE = "elementwise"
ELEMENTWISE_ROWS, ELEMENTWISE_FEATURES = 65_536, 784
DIRECTIONS = ("log_prob", "training")
Entry = dict[str, Any]
Group = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.child:
        result = {"allocator": options.child, "groups": list(_groups(options))}
        Path(options.json).write_text(json.dumps(result))
        return 0
    states = list(ALLOCATORS)
    if options.allocator != "both" and (options.allocator or options.quick):
        states = [options.allocator or states[0]]
    groups: list[Group] = []
    with tempfile.TemporaryDirectory() as folder:
        for state in states:
            part = str(Path(folder) / "part.json")
            child = [*arguments, "--child", state, "--json", part]
            if code := timing.rerun("bench.cpu", child, state):
                return code
            groups += [
                g | {"allocator": state} for g in json.loads(Path(part).read_text())["groups"]
            ]
    for group in groups:
        compare(group)
    packages = ("numpy", "nicefast", *PEERS)
    result = {
        "machine": timing.machine(packages),
        "allocators": {state: ALLOCATORS[state] for state in states},
        "groups": groups,
    }
    print(report(result))
    if options.json:
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)

    def choices(name: str, known: Sequence[str]) -> None:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := [c for c in chosen if c not in known]:
                raise argparse.ArgumentTypeError(
                    f"must be some of {','.join(known)}, got {','.join(unknown)}"
                )
            return [c for c in known if c in chosen]

        parser.add_argument(
            f"--{name}", type=parse, default=list(known), help=f"some of {','.join(known)}"
        )

    choices("case", (*SHAPES, ELEMENTWISE))
    choices("provider", tuple(PROVIDERS))
    choices("precision", tuple(PRECISIONS))
    choices("direction", DIRECTIONS)
    parser.add_argument("--allocator", choices=("both", *ALLOCATORS), help="default: both")
    parser.add_argument("--rounds", type=int, default=9, help="at least so many")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="at least so long for each table"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a quarter of the rows, 2 rounds, one allocator state: in a minute, as a first look",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _groups(options: argparse.Namespace) -> Iterator[Group]:
    """Everything that is asked for, measured in this process."""
    torch.manual_seed(0)
    share = 1
    if options.quick:
        options.rounds, options.seconds, share = 2, 0.0, 4
    for case in options.case:
        if case == ELEMENTWISE:
            rows = ELEMENTWISE_ROWS // share
            yield from elementwise_groups(
                rows, ELEMENTWISE_FEATURES, options.rounds, options.seconds
            )
            continue
        shape = SHAPES[case]
        shape = replace(shape, rows=shape.rows // share)
        weights = make_weights(shape)
        each = 4 * shape.rows * shape.features
        inputs = [torch.randn(shape.rows, shape.features) for _ in range(timing.input_sets(each))]
        gate = Gate(shape, weights, inputs[0])
        for precision in options.precision:
            for direction in options.direction:
                _say(f"{shape.title}: {direction}, {precision}")
                group = flow_group(
                    gate,
                    inputs,
                    options.provider,
                    precision,
                    direction,
                    options.rounds,
                    options.seconds,
                )
                yield {"case": case, "title": shape.title} | group


def flow_group(
    gate: Gate,
    inputs: Sequence[torch.Tensor],
    providers: Sequence[str],
    precision: str,
    direction: str,
    rounds: int,
    seconds: float,
) -> Group:
    """One table: gate the providers, choose each one's mode, time them in turn."""
    shape, training = gate.shape, direction == "training"
    entries: dict[str, Entry] = {}
    calls: dict[str, dict[Mode, Call]] = {}
    for name in providers:
        entries[name], calls[name] = _admit(name, gate, precision, training)
    products, operations = timing.product_calls(
        torch.float32 if precision == "float32" else torch.bfloat16,
        2048 if rounds > 2 else 1024,
    )
    # what autocast has cast stays cast between calls, as in a loop over batches; not in training,
    # where each step changes the weights
    keep_casts = contextlib.nullcontext() if training else torch.autocast("cpu", enabled=False)
    with keep_casts:
        chosen: dict[str, Call] = {}
        trial = timing.interleave(
            {
                f"{name} {mode.name}": call
                for name, ways in calls.items()
                if len(ways) > 1
                for mode, call in ways.items()
            },
            inputs,
            rounds=min(3, rounds - 1),
            warmup=1,
        )
        for name, ways in calls.items():
            if ways:
                best = min(
                    ways, key=lambda m, n=name: getattr(trial.get(f"{n} {m.name}"), "median", 0)
                )
                chosen[name] = ways[best]
                entries[name]["mode"] = best.name
                entries[name]["modes"] = {
                    m.name: trial[f"{name} {m.name}"].median for m in ways if len(ways) > 1
                }
        timings = timing.interleave(chosen | products, inputs, rounds, seconds)
    rates = {name: operations / timings[name].median for name in products}
    for name in chosen:
        entries[name] |= asdict(timings[name])
    return {
        "direction": direction,
        "precision": precision,
        "rows": shape.rows,
        "operations": shape.operations(training),
        "products": rates,
        "inputs": len(inputs),
        "entries": entries,
    }


def _admit(name: str, gate: Gate, precision: str, training: bool) -> tuple[Entry, dict[Mode, Call]]:
    """Build a provider, and the calls in those modes that pass the gate."""
    try:
        model = PROVIDERS[name](gate.shape, gate.weights)
    except ImportError as error:
        return {"status": f"not installed: {error}"}, {}
    except Exception as error:
        return {"status": f"failed: {type(error).__name__}: {error}"}, {}
    entry: Entry = {"status": "timed"}
    calls, failures = {}, []
    for mode in modes(name, precision):
        errors, failure = _checked(gate, model, precision, mode, training)
        if failure:
            failures.append(f"{mode.name}: {failure}")
            continue
        make = training_call if training else log_prob_call
        calls[mode] = Call(make(model, mode), mode.prepare)
        entry.setdefault("errors", {})[mode.name] = errors._asdict()
    if failures:
        entry["failures"] = failures
        if not calls:
            entry["status"] = "failed: " + "; ".join(failures)
    return entry, calls


def _checked(
    gate: Gate, model: Provider, precision: str, mode: Mode, training: bool
) -> tuple[Any, str | None]:
    try:
        return gate.check(model, precision, mode, training)
    except Exception as error:  # whatever a provider raises, it is out and the others go on
        return None, f"{type(error).__name__}: {error}"


def elementwise_groups(rows: int, features: int, rounds: int, seconds: float) -> Iterator[Group]:
    """The coupling, and scaling + prior, alone."""
    operations = {
        "coupling": elementwise.coupling(rows, features),
        "scaling + logistic prior + sum": elementwise.log_prob(features),
    }
    for what, operation in operations.items():
        title = f"{what}, {rows:,} rows of {features} features"
        _say(title)
        x = torch.randn(rows, features)
        x2 = torch.randn(rows, features // 2)
        few = x[:4096]
        other = operation.other
        entries: dict[str, Entry] = {name: {"status": "timed"} for name in operation.touch}
        calls = {name: _bind(way, x2, other) for name, way in operation.touch.items()}
        for name, way in operation.ways.items():
            if name == elementwise.COMPILED and not elementwise.has_compiler():
                entries[name] = {"status": "skipped: no C++ compiler"}
                continue
            part = other[: len(few)] if other.ndim == 2 else other
            failure = elementwise.wrong(way, operation.ways[operation.exact], few, part)
            if failure:
                entries[name] = {"status": f"failed: {failure}"}
                continue
            entries[name] = {"status": "timed"}
            calls[name] = _bind(way, x, other)
        timings = timing.interleave(calls, [None], rounds, seconds)
        for name in calls:
            entries[name] |= asdict(timings[name])
        yield {
            "case": ELEMENTWISE,
            "title": title,
            "precision": "float32",
            "rows": rows,
            "yardsticks": operation.yardsticks,
            "entries": entries,
        }


def _bind(way: elementwise.Function, x: torch.Tensor, other: torch.Tensor) -> Call:
    return Call(torch.no_grad()(lambda _: way(x, other)))


def compare(group: Group) -> None:
    """Add rates and ratios to the entries of a group."""
    timed = {n: e for n, e in group["entries"].items() if "median" in e}
    peers = [e["median"] for n, e in timed.items() if n in PEERS]
    for entry in timed.values():
        median = entry["median"]
        entry["rows_per_s"] = group["rows"] / median
        if "yardsticks" in group:
            entry["times"] = {
                y: median / timed[y]["median"] for y in group["yardsticks"] if y in timed
            }
            continue
        entry["flops"] = group["operations"] / median
        entry["share"] = entry["flops"] / max(group["products"].values())
        if peers:
            entry["to_best_peer"] = min(peers) / median
        if "plain" in timed:
            entry["to_plain"] = timed["plain"]["median"] / median


def report(result: dict[str, Any]) -> str:
    """The result as text: where, a table for each group, and nicefast's ratios together."""
    m = result["machine"]
    lines = [
        f"{m['cpu']}, {m['isa']}, {m['cores']} cores, {m['threads']} threads; torch {m['torch']}, "
        + ", ".join(f"{k} {v}" for k, v in m["packages"].items()),
        f"{m['libc']}, transparent huge pages {m['huge_pages']}; commit {m['commit']}"
        + (" with uncommitted changes" if m["uncommitted_changes"] else ""),
        "Allocator states: "
        + "; ".join(
            f"{k} ({' '.join(f'{a}={b}' for a, b in v.items()) or 'nothing set'})"
            for k, v in result["allocators"].items()
        ),
        "Medians; x peer, x plain: how many times faster than the best peer, than plain PyTorch. "
        "Training: zero_grad, -log_prob.mean(), backward, a step of Adam with torch's defaults.",
    ]
    for group in result["groups"]:
        lines += ["", *_table(group)]
    lines += ["", *_summary(result["groups"])]
    return "\n".join(lines)


def _table(group: Group) -> Iterator[str]:
    kind = f"{group['direction']}, " if "direction" in group else ""
    yield f"== {group['title']}; {kind}{group['precision']}; {group['allocator']}"
    yardsticks = group.get("yardsticks")
    header = f"{'':22}{'ms':>9}{'20-80 %':>17}{'faults':>8}{'Mrows/s':>9}"
    if yardsticks is None:
        rates = ", ".join(f"{name} {r / 1e12:.3f}" for name, r in group["products"].items())
        yield f"   large products, TFLOP/s: {rates}; {group['inputs']} inputs in turn"
        header += f"{'TFLOP/s':>9}{'of peak':>8}{'x peer':>8}{'x plain':>8}{'error':>9}  mode"
    else:
        header += "".join(f"  / {y}" for y in yardsticks)
    yield header
    for name, e in group["entries"].items():
        if "median" not in e:
            yield f"{name:22}  {e['status']}"
            continue
        spread = f"{e['low'] * 1e3:.2f}-{e['high'] * 1e3:.2f}"
        line = (
            f"{name:22}{e['median'] * 1e3:>9.2f}{spread:>17}{e['faults']:>8.0f}"
            f"{e['rows_per_s'] / 1e6:>9.3f}"
        )
        if yardsticks is None:
            line += (
                f"{e['flops'] / 1e12:>9.3f}{e['share']:>8.0%}"
                f"{_ratio(e.get('to_best_peer'), 8)}{_ratio(e.get('to_plain'), 8)}"
                f"{e['errors'][e['mode']]['log_prob']:>9.0e}  {e['mode']}"
            )
        else:
            line += "".join(_ratio(e["times"].get(y), len(y) + 4) for y in yardsticks)
        yield line
        for failure in e.get("failures", ()):
            yield f"{'':22}  not timed, {failure}"


def _ratio(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>{width}}"


def _summary(groups: Sequence[Group]) -> Iterator[str]:
    """nicefast against the best peer in every group; above 1, nicefast is faster."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for g in groups:
        mine = g["entries"].get("nicefast", {})
        if "to_best_peer" not in mine:  # not timed, no peer, or element-wise
            continue
        peers = {n: e["median"] for n, e in g["entries"].items() if n in PEERS and "median" in e}
        best = min(peers, key=lambda n: peers[n])
        key = (g["case"], g["direction"], g["precision"])
        rows.setdefault(key, {})[g["allocator"]] = f"{mine['to_best_peer']:.2f} ({best})"
    if rows:
        states = list(dict.fromkeys(g["allocator"] for g in groups))
        yield f"{'nicefast, times faster than the best peer':44}" + "".join(
            f"{s:>24}" for s in states
        )
        for (case, direction, precision), cells in rows.items():
            yield f"{case:8}{direction:12}{precision:24}" + "".join(
                f"{cells.get(s, '-'):>24}" for s in states
            )


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
