"""Several processes that do one job: which rows are whose, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import usable_device


class Ranks(NamedTuple):
    """This process among those of ``torch.distributed``: rank ``rank`` of ``world``.

    >>> Ranks(rank=1, world=3).share(10)
    slice(4, 7, None)
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Of the process group that is initialised; rank 0 of 1 without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` rows: contiguous, of equal size to within one row."""
        each, more = divmod(count, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


def own_device(name: str | torch.device) -> torch.device:
    """The device of that name for this process: of several GPUs, the one that torchrun's local rank
    says, which becomes the current one. ValueError where it cannot be used.

    >>> own_device("cpu")
    device(type='cpu')
    """
    local = os.environ.get("LOCAL_RANK")
    if str(name) == "cuda" and local is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if 1 < count <= int(local):
            raise ValueError(
                f"device 'cuda' has {count} GPUs here, and this is process {local}, from 0: "
                f"torchrun's --nproc-per-node must be at most {count}"
            )
        if int(local) < count:  # otherwise every process sees one GPU, its own
            torch.cuda.set_device(int(local))
    return usable_device(name)


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that torchrun has announced, if it has, for as long as the block."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield Ranks.here()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks.here()
    finally:
        dist.destroy_process_group()
