"""How far one warm call travels through nicefast's own Python: `python -m bench trace`.

A table of calls on the CPU, each with how often a Python function of nicefast is called, how many
different functions and files these are, and how often control moves from one file to another.
`--list CALL` names the functions that one of them passes through, in the order of first use.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import nicefast as nf

HOME = Path(nf.__file__).parent
WARM_UP = 2  # calls before the one that is looked at


class Trace(NamedTuple):
    """What one call passes through.

    Attributes:
        calls: of functions of nicefast.
        functions: the different ones, as ``file: function``, in the order of first use.
        files: theirs, relative to the package.
        moves: from one file to another.
    """

    calls: int
    functions: list[str]
    files: list[str]
    moves: int


def trace(call: Callable[[], object]) -> Trace:
    """Of one call, after two others.

    >>> import torch, nicefast as nf
    >>> from bench.trace import trace
    >>> trace(lambda: nf.Partition.half(4)).files
    ['partition.py']
    """
    for _ in range(WARM_UP):
        call()
    passed: list[tuple[str, str]] = []
    home = f"{HOME}/"

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(home):
            passed.append((code.co_filename.removeprefix(home), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    files = [file for file, _ in passed]
    moves = sum(a != b for a, b in itertools.pairwise(files))
    functions = [f"{file}: {function}" for file, function in dict.fromkeys(passed)]
    return Trace(len(passed), functions, list(dict.fromkeys(files)), moves)


def calls() -> dict[str, Callable[[], object]]:
    """What is traced: a small and a wide flow, few rows and many."""
    small = nf.NICE(8, hidden=(64, 64), couplings=4)
    wide = nf.NICE(64, hidden=(256, 256, 256), couplings=4)

    def infer(flow: Any, rows: int) -> Callable[[], object]:
        x = torch.randn(rows, flow.features)

        def call() -> object:
            with torch.no_grad():
                return flow.log_prob(x)

        return call

    def learn(flow: nf.NICE, rows: int) -> Callable[[], object]:
        x = torch.randn(rows, flow.features)
        return lambda: flow.log_prob(x).mean().backward()

    return {
        "log_prob, D=8, 16 rows": infer(small, 16),
        "log_prob, D=64, 256 rows": infer(wide, 256),
        "log_prob, D=8, 65,536 rows": infer(small, 65_536),
        "gradient, D=8, 4,096 rows": learn(small, 4096),
        "sample, D=8, 256 rows": lambda: small.sample(256),
        "frozen log_prob, D=8, 16 rows": infer(small.frozen(), 16),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench trace", description=__doc__)
    parser.add_argument("--list", metavar="CALL", help="of the first call whose name begins so")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # autograd's backward pass runs in the thread that asks for it
    known = calls()
    if options.list is not None:
        name = next((n for n in known if n.startswith(options.list)), None)
        if name is None:
            said = f"--list must begin one of: {'; '.join(known)}; got {options.list!r}"
            print(f"python -m bench trace: {said}", file=sys.stderr)
            return 2
        print("\n".join(trace(known[name]).functions))
        return 0
    print("| call | calls | functions | files | moves |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, call in known.items():
        t = trace(call)
        print(f"| {name} | {t.calls} | {len(t.functions)} | {len(t.files)} | {t.moves} |")
    return 0
