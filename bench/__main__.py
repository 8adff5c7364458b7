"""The benchmark: `python -m bench [run | report | compare A B | ablation | trace | host | dropin |
exact | compression | generative]`.

`run` (what is done when nothing is said) times nicefast beside plain half-split PyTorch, the same
under torch.compile, and the couplings of nflows, normflows, FrEIA and zuko: the same weights, in
turn in one process, everybody behind a gate against float64. Each measurement is a JSON line in
bench/results/DEVICE/, written as soon as it is made: an interrupted run keeps what it measured.
`report` makes tables and pictures of them; `compare` two runs; `ablation` measures our own ways
against each other, `trace` how far a call travels through our Python, `host` what it spends there
before a launch on a GPU (none is needed); `dropin` times what `nf.accelerate` gains, `exact` what
an exact inverse costs, `compression` how many bits images take, `generative` sets NICE beside other
models. See `python -m bench run --help`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from . import (
    ablation,
    compare,
    compression,
    dropin,
    exactness,
    host,
    measure,
    records,
    report,
    timing,
    trace,
)
from .gate import Gate
from .providers import PEERS, PRECISIONS, PROVIDERS, make_weights
from .timing import ALLOCATORS
from .workloads import (
    CASES,
    DIRECTIONS,
    ELEMENTWISE,
    ELEMENTWISE_SIZES,
    Task,
    is_headline,
    tasks,
)

LEVELS = {"quick": (2, 0.3), "default": (5, 0.8), "full": (9, 3.0)}  # rounds, seconds of a table
SEED = 0
CHOICES: dict[str, tuple[str, ...]] = {
    "case": tuple(CASES),
    "provider": tuple(PROVIDERS),
    "dtype": tuple(PRECISIONS),
    "direction": tuple(DIRECTIONS),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "run": run,
        "report": report.main,
        "compare": compare.main,
        "ablation": ablation.main,
        "trace": trace.main,
        "host": host.main,
        "dropin": dropin.main,
        "generative": _generative,
        "exact": exactness.main,
        "compression": compression.main,
    }
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        known = ", ".join(commands)
        print(f"python -m bench: must be one of {known}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    return run(arguments)


def _generative(arguments: Sequence[str]) -> int:
    from .generative import command  # needs scikit-learn, which the others do not

    return command.main(arguments)


def run(arguments: Sequence[str]) -> int:
    skipped: list[str] = []
    options = _parse(arguments, skipped)
    if not options.child:
        for line in skipped:
            print(f"python -m bench: {line}", file=sys.stderr)
    level = "full" if options.full else "quick" if options.quick else "default"
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench: device cuda was asked for, torch finds no GPU", file=sys.stderr)
        return 2
    if options.child:
        return _measure(options, level)
    device = options.device
    name = timing.device_name(device)
    out = options.out or report.RESULTS / records.slug(name) / f"{level}.jsonl"
    part = out.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    states = _states(options.allocator, level, device)
    code = 0
    try:
        for state in states:
            child = [*arguments, "--child", state, "--out", str(part)]
            code = code or timing.rerun("bench", ["run", *child], state)
    except KeyboardInterrupt:
        code = 130
    if not part.exists():
        print("python -m bench: nothing was measured", file=sys.stderr)
        return code or 1
    part.replace(out)
    print(report.report(records.read([out]), out.parent).read_text())
    print(f"{out}, report and pictures beside it")
    return code


def _states(asked: str | None, level: str, device: str) -> list[str]:
    if device != "cpu":
        return ["default"]  # the C library's allocator has no part in it
    if asked == "both" or (asked is None and level != "quick"):
        return list(ALLOCATORS)
    return [asked or "no-faults"]


def _precisions(device: str) -> list[str]:
    return [p for p in PRECISIONS if device != "cpu" or p != "tf32"]  # a GPU's


class _Parser(argparse.ArgumentParser):
    """One line for a mistake; the whole usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"python -m bench: {message}\n")


def _parse(arguments: Sequence[str], skipped: list[str]) -> argparse.Namespace:
    """The options of `run`. ``skipped`` gets a line for each choice that is left out because nobody
    knows it."""
    parser = _parser()
    options = parser.parse_args(list(arguments))
    for name, known in CHOICES.items():
        asked = getattr(options, name)
        if asked is None:
            setattr(options, name, None if name == "dtype" else list(known))  # see _precisions
            continue
        chosen = [c for c in known if c in asked]
        if unknown := [c for c in asked if c not in known]:
            said = f"must be some of {','.join(known)}, got {','.join(unknown)}"
            if not chosen:
                parser.error(f"argument --{name}: {said}")
            # what is known goes on; the processes that measure say nothing twice
            skipped.append(f"--{name} {said}: left out")
        setattr(options, name, chosen)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, known in CHOICES.items():
        parser.add_argument(
            f"--{name}",
            type=lambda text: text.split(","),
            action="extend",
            help=f"some of {','.join(known)}; again for more",
        )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="two minutes, as a first look")
    level.add_argument("--full", action="store_true", help="everything, in hours")
    parser.add_argument(
        "--allocator",
        choices=("both", *ALLOCATORS),
        help="of the C library: where page faults end with the warm-up, as it is by default, or "
        "both in turn (without --full, unless asked for here, the latter for whole flows alone)",
    )
    parser.add_argument("--rounds", type=int, help="at least so many for each table")
    parser.add_argument("--seconds", type=float, help="at least so long for each table")
    parser.add_argument("--out", type=Path, help="file of JSON lines; default: by device and level")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _measure(options: argparse.Namespace, level: str) -> int:
    """Everything that is asked for, in this process."""
    torch.manual_seed(SEED)
    rounds, seconds = LEVELS[level]
    rounds = options.rounds or rounds
    seconds = seconds if options.seconds is None else options.seconds
    device = torch.device(options.device)
    about = {
        "device": timing.device_name(options.device),
        "device_type": device.type,
        "allocator": options.child if device.type == "cpu" else None,
        "run": timing.machine(device, ("numpy", "nicefast", "triton", *PEERS))
        | {"seed": SEED, "level": level},
    }
    precisions = options.dtype or _precisions(device.type)
    todo = list(
        tasks(level, device.type, options.case, options.direction, precisions, options.provider)
    )
    sizes = ELEMENTWISE_SIZES if ELEMENTWISE in options.case else ()
    second = device.type == "cpu" and options.child == "default"  # a GPU has this state alone
    if second and options.allocator is None and level == "default":
        todo, sizes = [task for task in todo if is_headline(task)], ()
    sizes = sizes[:1] if level == "quick" else sizes
    with _progress(len(todo) + len(sizes)) as progress:
        held: tuple[Any, Gate, list[torch.Tensor]] | None = None
        for task in todo:
            progress.say(f"{task.case}: {task.shape.title}: {task.direction}, {task.precision}")
            if why := measure.too_large(task, device):
                left_out = task.describe() | about | {"status": f"skipped: {why}"}
                for name in task.providers:
                    records.append(options.out, left_out | {"provider": name})
                progress.step()
                continue
            if held is None or held[0] != task.shape:
                held = None  # frees the last before the next is made
                held = (task.shape, *_prepare(task, device))
            _, gate, inputs = held
            for record in measure.flow_records(task, gate, inputs, rounds, seconds):
                records.append(options.out, record | about)
            progress.step()
        held = None
        for most, features in sizes:
            rows = most // 4 if level == "quick" else most
            progress.say(f"element-wise operations, {rows:,} rows of {features} features")
            for found in measure.elementwise_records(rows, features, device, rounds, seconds):
                for record in found:
                    records.append(options.out, record | about)
            progress.step()
    return 0


def _prepare(task: Task, device: torch.device) -> tuple[Gate, list[torch.Tensor]]:
    shape = task.shape
    weights = make_weights(shape, SEED)
    sets = timing.input_sets(4 * shape.rows * shape.features, device)
    inputs = [torch.randn(shape.rows, shape.features, device=device) for _ in range(sets)]
    return Gate(shape, weights, inputs[0]), inputs


class Progress(Protocol):
    def say(self, what: str) -> None: ...

    def step(self) -> None: ...


class _Lines:
    """Progress where there is no terminal, or no rich."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def say(self, what: str) -> None:
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {self.done + 1}/{self.total} {what}", file=sys.stderr, flush=True)

    def step(self) -> None:
        self.done += 1


class _Bar:
    def __init__(self, bar: Any, total: int) -> None:
        self.bar, self.task = bar, bar.add_task("", total=total)

    def say(self, what: str) -> None:
        self.bar.update(self.task, description=what)

    def step(self) -> None:
        self.bar.advance(self.task)


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield _Lines(total)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.MofNCompleteColumn(),
        rich.BarColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, total)


if __name__ == "__main__":
    sys.exit(main())
