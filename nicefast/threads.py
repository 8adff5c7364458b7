"""The threads that compute the shares of a batch on the CPU, one share each.

Where PyTorch's own operations run in OpenMP's threads, so do these: after an operation such a
thread looks for the next one for some milliseconds before it sleeps, and threads of our own would
have to wake up and then share the cores with it. Where that can't be (another system, a process
that was forked off, more threads than :data:`MOST`), there is a pool.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import watchers

S = TypeVar("S")
T = TypeVar("T")
MOST = 8  # Python hands out the work: more threads would wait for its lock

_lock = threading.Lock()
_here = threading.local()
_process = os.getpid()
_cpu = torch.device("cpu")
_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def count() -> int:
    """How many shares are computed at once: as many as PyTorch has threads, where each can have a
    number of threads of its own."""
    if getattr(_here, "is_worker", False) or not _openmp():
        return 1
    if watchers.has_modes():  # a mode sees the operations of its own thread alone
        return 1
    return min(torch.get_num_threads(), MOST)


def share_out(work: Callable[[S], T], shares: Sequence[S]) -> list[T]:
    """``work(share)`` for each share, without gradients or autocast, each in one thread; results in
    the order of shares. What goes wrong is raised when all have ended, the first share's first."""
    _settle_allocator()
    waiting = deque(enumerate(shares))
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    caller, inference = threading.get_ident(), torch.is_inference_mode_enabled()

    def take_part() -> None:
        i, is_caller = -1, threading.get_ident() == caller
        _here.is_worker = True
        try:
            with alone(_cpu) if is_caller else _as_caller(inference):
                while waiting:
                    try:
                        i, share = waiting.popleft()
                    except IndexError:  # another thread was faster
                        break
                    results[i] = work(share)
        except BaseException as error:  # to be raised by the caller
            errors[i] = error
        finally:
            _here.is_worker = False

    threads = torch.get_num_threads()
    parallel = _parallel() if threads <= MOST and os.getpid() == _process else None
    if parallel is not None:  # in all of PyTorch's threads: a smaller team would end the others
        parallel(_Task(lambda _: take_part()), None, 0, 0)
    else:
        pool = _pool(os.getpid(), threads)
        for future in [pool.submit(take_part) for _ in shares]:
            future.result()
    if errors:
        raise errors[min(errors)]
    return [results[i] for i in range(len(shares))]


def alone(device: torch.device) -> AbstractContextManager[None]:
    """What the caller's own thread works in: without gradients or autocast."""
    _settle_allocator()
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return _undisturbed(device.type)
    return nullcontext()  # small batches feel the difference


@contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


@contextmanager
def _as_caller(inference: bool) -> Iterator[None]:
    # no word of autocast, which is off in a worker: leaving a block of it here would throw away
    # what the caller's has cast
    with torch.inference_mode(inference), torch.no_grad():  # in this order
        yield


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
def _library() -> Any:
    """The OpenMP that PyTorch has loaded, found as the linker found it for PyTorch's own library:
    among what everybody sees, then among what that library brings along. None without one that goes
    by the names compilers use."""
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        with suppress(OSError, TypeError):  # no such file; Windows has no None
            library = ctypes.CDLL(name)
            if hasattr(library, "GOMP_parallel"):
                return library
    return None


@cache
def _parallel() -> Any:
    """What has every thread of OpenMP's team call a function."""
    if _library() is None:
        return None
    parallel = _library().GOMP_parallel
    # a task, its argument, how many threads, and flags
    parallel.argtypes = [_Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """A pool for this process (threads don't survive a fork) and this number of threads."""
    workers = min(count, MOST)
    ready = threading.Barrier(workers + 1)

    def start() -> None:
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
