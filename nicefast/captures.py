"""CUDA's streams: calls captured as graphs, each on a stream of its own device.

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

T = TypeVar("T")
_forever: dict[int, object] = {}  # by id


class _Here(threading.local):
    kept: list[object] | None = None


_here = _Here()


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On the stream that captures: after all that was asked for, before all that will be.

    What is called here, before it is captured, leaves kernels compiled and workspaces allocated.
    """
    stream = _stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


def capture(call: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """What computes ``call()`` again, and its result, which every replay writes over."""
    graph, before = torch.cuda.CUDAGraph(), _here.kept
    kept: list[object] = []
    _here.kept = kept
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream(device)):
            result = call()
    finally:
        _here.kept = before

    def replay(_: object = kept) -> None:  # which it holds
        graph.replay()

    return replay, result


def keep(what: object) -> None:
    """For what is captured now, which reads it: as long as that may be replayed."""
    if _here.kept is None:  # somebody else's graph: nobody knows how long
        _forever[id(what)] = what
    else:
        _here.kept.append(what)


def is_capturing(device: torch.device) -> bool:
    """Whether what is called there now is captured, by anybody, and can't be waited for.

    >>> is_capturing(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The stream that calls on the device are in now: what is computed there is ready there.

    >>> stream_of(torch.device("cpu"))
    0
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
