"""What a call needs of the process that it runs in: autograd and autocast off, and the allocator.

Threads are PyTorch's own: each of its operations shares its work out among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch


def without_autograd(device: torch.device) -> AbstractContextManager[None]:
    """A block without gradients and without autocast on the device."""
    settle_allocator()
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return _without_autograd(device.type)
    return nullcontext()  # the difference shows in small batches


@contextmanager
def _without_autograd(device: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


@cache
def settle_allocator() -> None:
    """Free one large tensor that was never touched, once for each process.

    glibc maps large blocks anew, page by page, and gives them back when they are freed, unless a
    larger block has been freed before: it learns from the largest one, up to 32 MiB. In a fresh
    process, with this line and without (AMD Zen 5): log_prob of 65,536 rows of 64 x 2 takes 9 and
    26 ms (12,900 page faults a call); a gradient of 16,384 rows of 256 x 3 takes 165 and 252 ms.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")
