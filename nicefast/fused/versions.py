"""Whether the parameters of a chain are what they were, as far as PyTorch can tell.

Which tensors they are, the chain itself knows: nothing is kept that refers to them, not even
weakly, since PyTorch would then refuse to swap them. What is written through ``p.data`` stays
unseen, as it does in PyTorch itself.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .chain import Chain

_steps = 0  # of any optimizer


class Version(NamedTuple):
    """Equal as long as the tensor lies where it lay, and was not written to."""

    address: int
    writes: int
    steps: int  # fused optimizers count no writes


def versions(chain: Chain) -> list[Version]:
    """Of parameters that count their writes, as those of inference mode do not."""
    _watch_optimizers()
    return [Version(p.data_ptr(), p._version, _steps) for p in chain.parameters]


@functools.cache
def _watch_optimizers() -> None:
    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)
