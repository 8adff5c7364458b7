"""Whether the parameters of a chain are what they were, as far as PyTorch can tell.

Which tensors they are, the chain itself knows: nothing is kept that refers to them, not even
weakly, since PyTorch would then refuse to swap them. A parameter that shares its memory, as a slice
of one flat vector does, is written to under another name: it never is what it was. What is written
through ``p.data`` stays unseen, as it does in autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .chain import Chain

_steps = 0  # of any optimizer
_replayed: set[int] = set()  # addresses that steps captured as CUDA graphs write to, unseen
_counts_replays = False


class Version(NamedTuple):
    """Equal as long as the tensor lies where and as it lay, and was not written to."""

    address: int
    strides: tuple[int, ...]
    writes: int
    steps: Any  # fused optimizers count no writes


def versions(chain: Chain) -> list[Version]:
    """Of parameters that count their writes, as those of inference mode do not."""
    _watch_optimizers()
    # a replayed step is not seen at all: such parameters never are what they were
    seen = _replayed.isdisjoint(p.data_ptr() for p in chain.parameters)
    steps = _steps if seen and not any(map(_shares_memory, chain.parameters)) else object()
    return [Version(p.data_ptr(), p.stride(), p._version, steps) for p in chain.parameters]


def count_step() -> None:
    """An optimizer has taken one step more."""
    global _steps
    _steps += 1


@contextmanager
def counting_replays() -> Iterator[None]:
    """Whoever captures an optimizer's step in this block calls :func:`count_step` with each
    replay."""
    global _counts_replays
    _counts_replays = True
    try:
        yield
    finally:
        _counts_replays = False


def _shares_memory(p: Tensor) -> bool:
    return p.untyped_storage().nbytes() != p.nbytes


@functools.cache
def _watch_optimizers() -> None:
    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        count_step()
        if _counts_replays or not torch.cuda.is_initialized():
            return
        if torch.cuda.is_current_stream_capturing():
            _replayed.update(p.data_ptr() for g in optimizer.param_groups for p in g["params"])

    register_optimizer_step_post_hook(count)
