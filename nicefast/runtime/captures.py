"""CUDA graphs: calls that are captured, each on a stream of its own device, and replayed.

PyTorch by itself captures on one stream, of whichever device was current when it first did: on
another device nothing would be captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Outputs = tuple[Tensor, ...]
_capturing = threading.Lock()
WARM_UP = 3  # calls before a capture: kernels are compiled, workspaces allocated


class Graph:
    """``call(x, context)`` as one CUDA graph for ``batch`` rows, called with any number of them.

    What the call reads beside its arguments has to stay where it lies, and alive, as long as the
    graph. A batch shorter than ``batch`` is followed by older rows, whose results are dropped.
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor | None], Outputs],
        batch: int,
        rows: Tensor,
        context: Tensor | None,
    ) -> None:
        self._x = rows.new_zeros(batch, rows.shape[1])
        self._c = None if context is None else context.new_zeros(batch, context.shape[1])
        self._replay, self._outputs = warm_capture(lambda: call(self._x, self._c), rows.device)
        # of the last call, which may have been on another stream; there are none but on a GPU
        self._done = torch.cuda.Event() if rows.is_cuda else None

    def __call__(self, rows: Tensor, context: Tensor | None) -> Outputs:
        """The call's results for rows (N, D) and their context (N, K), N >= 1."""
        size = len(self._x)
        pieces = []
        if self._done is not None:
            self._done.wait(torch.cuda.current_stream(self._x.device))
        for start in range(0, len(rows), size):
            piece = rows[start : start + size]
            n = len(piece)
            self._x[:n].copy_(piece)
            if self._c is not None and context is not None:
                self._c[:n].copy_(context[start : start + size])
            self._replay()
            pieces.append(tuple(t[:n].clone() for t in self._outputs))
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._x.device))
        if len(pieces) == 1:
            return pieces[0]
        return tuple(torch.cat(own) for own in zip(*pieces, strict=True))


def can_capture(device: torch.device) -> bool:
    """Whether a call there can be captured now.

    >>> can_capture(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and not is_capturing(device)


def warm_capture(
    call: Callable[[], Outputs], device: torch.device
) -> tuple[Callable[[], None], Outputs]:
    """:func:`capture` after calls that compile kernels and allocate workspaces; one thread at a
    time, since all captures of a device are on one stream."""
    with _capturing:
        with on_capture_stream(device):
            for _ in range(WARM_UP):
                call()
        return capture(call, device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run the block on the device's capture stream. That stream first waits for the current one,
    which afterwards waits for it. Calls before a capture compile kernels and allocate workspaces.
    """
    stream = _stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


def capture(call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """A function that replays ``call()``, and the result, which every replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream(device)):
        result = call()
    return graph.replay, result


def is_capturing(device: torch.device) -> bool:
    """Whether what is called there now is captured, by anybody, and cannot be waited for.

    >>> is_capturing(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
