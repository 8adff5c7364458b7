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


class Turns:
    """A block of one call after another, for calls that use the same memory of a device.

    Threads wait for each other at the block's beginning. On a GPU, a block on another stream than
    the last one's lets its stream wait for the end of that one, so that streams may alternate.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock, self._device = threading.Lock(), device
        self._done = torch.cuda.Event() if has_graphs(device) else None
        self._stream: torch.cuda.Stream | None = None  # of the last block

    def __enter__(self) -> torch.cuda.Stream | None:
        """The stream, where it is not the last block's."""
        self._lock.acquire()
        if self._done is None:
            return None
        try:
            stream = torch.cuda.current_stream(self._device)
            if stream == self._stream:
                return None
            self._done.wait(stream)  # there is nothing to wait for before the first block
            self._stream = stream
            return stream
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._done is not None:
                self._done.record(self._stream)
        finally:
            self._lock.release()


class Graph:
    """``call(x, context)`` as one CUDA graph for ``batch`` rows, called with any number of them.

    What the call reads beside its arguments has to stay where it lies, and alive, as long as the
    graph. A batch shorter than ``batch`` is followed by older rows, whose results are dropped.
    Threads and streams may take turns: see :class:`Turns`.
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor | None], Outputs],
        batch: int,
        rows: Tensor,
        context: Tensor | None,
    ) -> None:
        self._size = batch
        self._x = rows.new_zeros(batch, rows.shape[1])
        self._c = None if context is None else context.new_zeros(batch, context.shape[1])
        self._replay, self._outputs = warm_capture(lambda: call(self._x, self._c), rows.device)
        self._turns = Turns(rows.device)

    def __call__(self, rows: Tensor, context: Tensor | None) -> Outputs:
        """The call's results for rows (N, D) and their context (N, K), N >= 1."""
        size, count = self._size, rows.shape[0]
        with self._turns as other_stream:
            if other_stream is not None:  # the memory is nobody else's before that one is done
                for t in (self._x, self._c):
                    if t is not None:
                        t.record_stream(other_stream)
            if count == size:
                self._x.copy_(rows)
                if context is not None and self._c is not None:
                    self._c.copy_(context)
                self._replay()
                return tuple(map(Tensor.clone, self._outputs))
            pieces = []
            for start in range(0, count, size):
                n = min(size, count - start)
                self._x[:n].copy_(rows[start : start + n])
                if context is not None and self._c is not None:
                    self._c[:n].copy_(context[start : start + n])
                self._replay()
                pieces.append(tuple([t[:n].clone() for t in self._outputs]))
        if len(pieces) == 1:
            return pieces[0]
        return tuple(torch.cat(own) for own in zip(*pieces, strict=True))


def has_graphs(device: torch.device) -> bool:
    """Whether calls there can be captured at all.

    >>> has_graphs(torch.device("cpu"))
    False
    """
    return device.type == "cuda"


def can_capture(device: torch.device) -> bool:
    """Whether a call there can be captured now.

    >>> can_capture(torch.device("cpu"))
    False
    """
    return has_graphs(device) and not is_capturing(device)


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
