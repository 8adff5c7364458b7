"""Whether a parameter is what it was, as far as PyTorch can tell.

What is written through ``p.data`` stays unseen, as it does in PyTorch itself.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdRef

_steps = 0  # of any optimizer


class Version(NamedTuple):
    """Equal as long as the tensor is the same one, lies where it lay, and was not written to."""

    tensor: WeakIdRef
    address: int
    writes: int
    steps: int  # fused optimizers count no writes


def version(p: Tensor) -> Version:
    """Of a tensor that counts its writes, as those of inference mode do not."""
    _watch_optimizers()
    return Version(WeakIdRef(p), p.data_ptr(), p._version, _steps)


@functools.cache
def _watch_optimizers() -> None:
    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)
