"""What a call spends on the host before its launch: `python -m bench host`.

No GPU is needed, and none is used. Rows lie on the CPU, and a stand-in for Triton's driver says
that the GPU is an sm_90: kernels are compiled for it, and a launch does nothing. A captured graph
is a stand-in, too: its replay does nothing.

In a figure: nicefast's Python; Triton's, up to its launcher; and the few operators of PyTorch that
a call makes besides (allocations, the concatenation of parameters, copies into and out of a
graph's memory). On a GPU those are launches; here they compute, on a few rows.

Not in a figure: Triton's launcher and CUDA itself, with the choice of the current device, streams
and events; the look at log_scale, which the CPU alone takes; and whatever a GPU computes.

Each figure is the median over rounds, of the thread's processor time without the garbage
collector's: microseconds, and multiples of one `torch.add` of two tensors of one element, timed in
turn with the call in the same process. The goals are such multiples.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

import nicefast as nf
from nicefast.engine import frozen, rows
from nicefast.runtime import backend, captures

from .timing import device_name, quantile

GOALS = {"ordinary": 50, "frozen": 15, "frozen, replayed": 6}  # additions of one element
METHODS = ("log_prob", "forward", "inverse")
FEATURES, HIDDEN, COUPLINGS, ROWS = 8, (64, 64), 4, 16
CALLS, ADDITIONS = 20, 100  # of one turn


class Driver:
    """Stands in for the driver of an sm_90: nothing is loaded, and nothing launched."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),  # a module, a function, what it needs
            unload_module=nothing,
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return nothing

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def nothing(*_: Any) -> None:
    """What a launch, a replay or an event is replaced by."""


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Calls on the CPU go the way of a GPU's within the block, up to a launch.

    RuntimeError in a process whose kernels are interpreted.
    """
    import triton

    if backend.kernels().INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: an interpreted kernel has no launch")

    def uses_kernels(device: torch.device) -> bool:
        return backend.get_backend() == "auto"  # which is asked, as on a GPU

    def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        return nothing, call()

    def yes(device: torch.device) -> bool:
        return True

    stream, event = object(), SimpleNamespace(wait=nothing, record=nothing)
    driver = triton.runtime.driver
    before = driver._active
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache))
        stack.enter_context(nf.set_backend("auto"))
        for owner, name, value in (
            (backend, "_choice", None),  # so that the environment is asked, as in most processes
            (backend, "uses_kernels", uses_kernels),
            (rows, "check_log_scale", nothing),
            (frozen, "has_graphs", yes),
            (frozen, "can_capture", yes),
            (captures, "has_graphs", yes),
            (captures, "can_capture", yes),
            (captures, "warm_capture", capture),
            (torch.cuda, "Event", lambda: event),
            (torch.cuda, "current_stream", lambda device: stream),
            (torch.Tensor, "record_stream", nothing),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        driver.set_active(Driver())
        try:
            yield
        finally:
            driver._active = before


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, each under ``"KIND: METHOD"``; to be made and called within
    :func:`stand_in`."""
    torch.manual_seed(0)
    flow, x = nf.NICE(FEATURES, hidden=HIDDEN, couplings=COUPLINGS), torch.randn(ROWS, FEATURES)
    fixed, replayed = flow.frozen(), flow.frozen(batch=ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        graphed = {method: flow.graphed(ROWS, method) for method in METHODS}
    kinds: dict[str, Callable[[str], Callable[..., object]]] = {
        "ordinary": lambda method: getattr(flow, method),
        "frozen": lambda method: getattr(fixed, method),
        "frozen, replayed": lambda method: getattr(replayed, method),
        "graphed (deprecated)": lambda method: graphed[method],
    }

    def of(call: Callable[..., object]) -> Callable[[], object]:
        return lambda: call(x)

    return {f"{kind}: {m}": of(get(m)) for kind, get in kinds.items() for m in METHODS}


class Cost(NamedTuple):
    """Of one call: microseconds, and multiples of an addition."""

    microseconds: float
    additions: float


def costs(named: dict[str, Callable[[], object]], rounds: int) -> tuple[float, dict[str, Cost]]:
    """Microseconds of an addition of one element, and the cost of each call, without gradients.

    A turn of additions and one of the call follow each other at once: what else the machine does
    slows both.
    """
    one = torch.ones(1)

    def seconds(call: Callable[[], object], count: int) -> float:
        start = time.thread_time()  # not while another process has the core
        for _ in range(count):
            call()
        return (time.thread_time() - start) / count

    additions, found = [], {}
    with torch.no_grad():
        for name, call in named.items():
            seconds(call, 3)  # kernels are compiled, graphs captured
            gc.collect()
            gc.disable()  # its time depends on what else the process holds
            try:
                turns = [
                    (seconds(lambda: torch.add(one, one), ADDITIONS), seconds(call, CALLS))
                    for _ in range(rounds)
                ]
            finally:
                gc.enable()
            additions += [a for a, _ in turns]
            found[name] = Cost(
                1e6 * quantile([b for _, b in turns], 0.5), quantile([b / a for a, b in turns], 0.5)
            )
    return 1e6 * quantile(additions, 0.5), found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=100, help="turns of each call (default 100)")
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    options = parser.parse_args(argv)
    import triton

    torch.set_num_threads(1)
    try:
        with stand_in():
            one, found = costs(calls(), options.rounds)
    except RuntimeError as error:
        print(f"python -m bench host: {error}", file=sys.stderr)
        return 2
    what = (__doc__ or "").partition("\n\n")[2]
    hidden = " x ".join(map(str, HIDDEN))
    lines = [
        "# Time on the host before a launch\n",
        f"Written by `python -m bench host`: {ROWS} rows of {FEATURES} features, {COUPLINGS} "
        f"couplings, hidden {hidden}, without gradients. {device_name('cpu')}, torch "
        f"{torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}.\n",
        what,
        f"One `torch.add` of two tensors of one element: {one:.2f} us.\n",
        "| call | us | additions | goal |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, cost in found.items():
        goal = GOALS.get(name.partition(":")[0])
        lines.append(
            f"| {name} | {cost.microseconds:.1f} | {cost.additions:.1f} | "
            f"{'' if goal is None else f'at most {goal}'} |"
        )
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
