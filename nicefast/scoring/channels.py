"""How threads hand things to each other, and stop each other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818  (no error: the error is another thread's)
    """The pipeline is being taken down."""


class Channel(Generic[T]):
    """Between two threads: at most ``size`` things wait."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: deque[T] = deque()
        self._ended = self._stopped = False
        self._changed = threading.Condition()

    def put(self, thing: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self.size)
            if self._stopped:
                raise Stopped
            self._waiting.append(thing)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """What is put, until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._ended or self._waiting)
                if self._stopped:
                    raise Stopped
                if not self._waiting:
                    return
                thing = self._waiting.popleft()
                self._changed.notify_all()
            yield thing

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Everyone who puts or waits gets :class:`Stopped`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
