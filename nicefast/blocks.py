"""Rows in blocks: on the CPU several are in flight at once, one to a thread.

A block is small enough to stay in the cache from the first operation to the last, and each thread
computes its own from beginning to end, so that threads never wait for each other between products.
Blocks are dealt to threads in a fixed order: sums over blocks have the same bits every time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import TypeVar

import torch

from . import watchers

S = TypeVar("S")
T = TypeVar("T")
MOST_THREADS = 8  # Python hands out the work: more threads would wait for its lock

_lock = threading.Lock()
_here = threading.local()


class Blocks:
    """``rows`` rows on ``device`` in blocks of nearly one size, at most ``most`` rows each.

    On the CPU their number is a multiple of the threads', unless there are fewer than ``least``
    rows: those are not worth the hand-over to threads.
    """

    def __init__(self, rows: int, most: int, least: int, device: torch.device) -> None:
        self.threads = 1
        if device.type == "cpu" and rows > least:
            self.threads = _threads()
        count = max(1, -(-rows // most))
        count = -(-count // self.threads) * self.threads
        self.size = max(1, -(-rows // count))
        self.rows, self.device = rows, device

    def describe(self) -> str:
        """For people."""
        return (
            f"{self.rows} rows in {len(self)} blocks of at most {self.size}, "
            f"{self.threads} in flight"
        )

    def __len__(self) -> int:
        return (self.rows + self.size - 1) // self.size

    def __getitem__(self, i: int) -> slice:
        return slice(i * self.size, min((i + 1) * self.size, self.rows))

    def hand_out(self, work: Callable[[Iterable[int]], None]) -> None:
        """``work(blocks)`` in each thread, which takes one block after the other as it is ready
        for it: a core that others slow down gets fewer. See :meth:`deal`."""
        waiting = deque(range(len(self)))

        def blocks() -> Iterator[int]:
            with suppress(IndexError):  # none is left
                while True:
                    yield waiting.popleft()

        self._run(work, [blocks() for _ in range(self._parties)])

    def deal(self, work: Callable[[range], T]) -> list[T]:
        """``work(share)`` for each thread's share of the blocks, always the same; results in the
        order of shares.

        Without gradients or autocast. A single share runs in the caller's thread, where operations
        use all of PyTorch's threads.
        """
        parties = self._parties
        return self._run(work, [range(i, len(self), parties) for i in range(parties)])

    @property
    def _parties(self) -> int:
        return max(1, min(self.threads, len(self)))

    def _run(self, work: Callable[[S], T], shares: list[S]) -> list[T]:
        if len(shares) == 1:
            with alone(self.device):
                return [work(shares[0])]
        _settle_allocator()
        inference = torch.is_inference_mode_enabled()

        def run(share: S) -> T:
            # no word of autocast, which is off in these threads: leaving a block of it here would
            # throw away what the caller's has cast
            with torch.inference_mode(inference), torch.no_grad():  # in this order
                return work(share)

        pool = _pool(os.getpid(), torch.get_num_threads())
        futures = [pool.submit(run, share) for share in shares]
        errors = [e for e in (future.exception() for future in futures) if e]  # waits for them all
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def alone(device: torch.device) -> AbstractContextManager[None]:
    """What a single share runs in: the caller's thread, without gradients or autocast."""
    _settle_allocator()
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return _undisturbed(device)
    return nullcontext()  # small batches feel the difference


def _threads() -> int:
    """How many blocks are in flight: as many as PyTorch has threads, where they can be split."""
    if getattr(_here, "is_worker", False) or not _openmp():
        return 1
    if watchers.has_modes():  # a mode sees the operations of its own thread alone
        return 1
    return min(torch.get_num_threads(), MOST_THREADS)


@cache
def _settle_allocator() -> None:
    """Free one large, untouched tensor: glibc then keeps blocks of up to that size for reuse.

    It learns from the largest it has seen freed (up to 32 MiB). Otherwise every block would go
    back to the system and come again as zeroed pages, at the price of its arithmetic.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")


@cache
def _openmp() -> bool:
    """Whether the number of threads is each thread's own, as it is with OpenMP."""
    return "OpenMP" in torch.__config__.parallel_info()


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """A pool for this process (threads don't survive a fork) and this number of threads."""
    workers = min(count, MOST_THREADS)
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        _here.is_worker = True
        torch.get_num_threads()  # a thread's first question sets its number to everybody's
        torch.set_num_threads(max(1, count // workers))  # this thread's own, with OpenMP
        ready.wait()

    with _lock:
        pool = ThreadPoolExecutor(workers, "nicefast", start)
        for _ in range(workers):
            pool.submit(lambda: None)
        ready.wait()
        torch.set_num_threads(count)  # what threads that start later begin with
    return pool
