"""Blocks of rows on their way to the device, and results on their way back."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .outputs import Batch

RELEASE = 1 << 23  # bytes of a mapped file after which its pages are given back


class Lane:
    """To the device and back; on a GPU, each way by a stream of its own, so that neither copy waits
    for the other, nor for the piece that is computed meanwhile."""

    def __init__(self, device: torch.device, rows: int, features: int, dtype: torch.dtype) -> None:
        self.device, self.shape, self.dtype = device, (rows, features), dtype
        self.overlaps = device.type == "cuda"
        self._turn = 0
        if self.overlaps:
            self._stream, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._onto = [torch.empty(self.shape, dtype=dtype, device=device) for _ in range(2)]
            # their memory may be in use by what the current stream was asked before, and after
            # an error by a copy
            self._stream.wait_stream(torch.cuda.current_stream(device))
            for onto in self._onto:
                onto.record_stream(self._stream)
            self._used = [torch.cuda.Event() for _ in self._onto]  # not recorded: nobody waits

    def buffers(self, count: int) -> list[Tensor]:
        """On the host, to be filled: pinned where that makes copies overlap."""
        return [
            torch.empty(self.shape, dtype=self.dtype, device="cpu", pin_memory=self.overlaps)
            for _ in range(count + self.overlaps)
        ]

    def upload(self, rows: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Rows on the device, and what to call when all that uses them was launched."""
        if not self.overlaps:
            return rows.to(self.device), lambda: None
        i, self._turn = self._turn, 1 - self._turn
        onto, used = self._onto[i][: len(rows)], self._used[i]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(used)
            onto.copy_(rows, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        return onto, lambda: used.record(current)

    def download(self, batch: Batch, rows_together: int) -> tuple[Batch, int, Any]:
        """Results on the host as soon as the event, where there is one, has happened."""
        if not self.overlaps:
            values = {name: value.cpu() for name, value in batch.values.items()}
            return Batch(values, batch.good.cpu()), rows_together, None
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._back):
            values = {name: self._pinned(value) for name, value in batch.values.items()}
            good = self._pinned(batch.good)
            done = torch.cuda.Event()
            done.record(self._back)
        return Batch(values, good), rows_together, done

    def _pinned(self, value: Tensor) -> Tensor:
        """A copy on the host that is complete when the stream back is; made of cached memory."""
        if value.device.type != "cuda":
            return value
        value.record_stream(self._back)  # its memory is not another's before it is copied
        onto = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
        return onto.copy_(value, non_blocking=True)


class Release:
    """Gives back the pages of mapped files that were read: they would count as memory in use."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, values: Any, size: int) -> None:
        self.size += size
        if self.size < RELEASE:
            return
        self.size = 0
        mapped = values
        while mapped is not None and not hasattr(mapped, "madvise"):
            mapped = getattr(mapped, "base", None)
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        with memoryview(mapped) as view:
            shared = view.readonly  # pages of a private copy hold what is nowhere else
        if shared:
            mapped.madvise(mmap.MADV_DONTNEED)


def fill(buffer: Tensor, values: Any) -> None:
    """Copy a block, converting; by one thread, the others compute."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        values = values.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is a bad row
        np.copyto(buffer.numpy(), values, casting="unsafe")
