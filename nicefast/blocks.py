"""Rows in blocks: on the CPU several are in flight at once, one to a thread.

A block is small enough to stay in the cache from the first operation to the last, and each thread
computes its own from beginning to end, so that threads never wait for each other between products.
Blocks are dealt to threads in a fixed order: sums over blocks have the same bits every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import torch

from . import threads

S = TypeVar("S")
T = TypeVar("T")


class Blocks:
    """``rows`` rows on ``device`` in blocks of nearly one size, at most ``most`` rows each.

    On the CPU their number is a multiple of the threads', unless there are fewer than ``least``
    rows: those are not worth the hand-over to threads.
    """

    def __init__(self, rows: int, most: int, least: int, device: torch.device) -> None:
        self.threads = 1
        if device.type == "cpu" and rows > least:
            self.threads = threads.count()
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
            with threads.alone(self.device):
                return [work(shares[0])]
        return threads.share_out(work, shares)
