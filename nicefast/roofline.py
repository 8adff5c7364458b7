"""What a device can do at most, measured: the least time in which a flow can be computed on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


class Ceilings(NamedTuple):
    """Floating-point operations a second of products, bytes a second of a copy (read + written)."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The larger of the two times: no implementation is faster."""
        return max(flops / self.flops, moved / self.bytes)


@cache
def ceilings(device: torch.device, bfloat16: bool, matmul_precision: str) -> Ceilings:
    """Measured once (a tenth of a second) for each device and precision of products.

    ``matmul_precision`` is that in force, ``torch.get_float32_matmul_precision()``.

    >>> import torch
    >>> from nicefast.roofline import ceilings
    >>> ceilings(torch.device("cpu"), False, "highest").flops > 1e9
    True
    """
    size = 1024 if device.type == "cpu" else 4096
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        a = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
        b, out = a.t().contiguous(), torch.empty_like(a)
        flops = 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device)
        numbers = 1 << (24 if device.type == "cpu" else 26)
        source = torch.randn(numbers, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), device)
    return Ceilings(flops, moved)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])
