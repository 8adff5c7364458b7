"""Parameters in bfloat16, cast once within a block of autocast.

Within one ``torch.autocast`` block PyTorch casts a parameter once, and takes what came of it until
the block ends. So does nicefast, and lets go of it in the first call after the block. A parameter
that has changed within the block, which autocast would not see, is cast again; only what is written
through ``p.data`` stays unseen until the block ends, as it does in PyTorch itself.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .chain import Chain, Layers
from .versions import Version, versions


class _Cast(NamedTuple):
    versions: list[Version]
    couplings: tuple[Layers, ...]


class _Block(threading.local):
    """What was cast in the block that autocast is in; each thread has its own. A block is told by
    its cast of a tensor that nobody else has: as long as that is held here, no other block's can
    lie at the same place."""

    def __init__(self) -> None:
        self.own = torch.nn.Parameter(torch.zeros(1, 1, device="cpu", dtype=torch.float32))
        self.mark: Tensor | None = None
        self.casts: WeakKeyDictionary[Chain, _Cast] = WeakKeyDictionary()

    def enter(self, mark: Tensor | None) -> None:
        """Forget what another block has left; no mark, no block."""
        if mark is None or self.mark is None or mark.data_ptr() != self.mark.data_ptr():
            self.casts.clear()
            self.mark = mark

    def cast(self, chain: Chain) -> Chain:
        now, found = versions(chain), self.casts.get(chain)
        if found is None or found.versions != now:
            couplings = tuple(
                tuple((w.to(torch.bfloat16), b.to(torch.bfloat16)) for w, b in layers)
                for layers in chain.couplings
            )
            found = self.casts[chain] = _Cast(now, couplings)
        return replace(chain, couplings=found.couplings)


_block = _Block()


def with_casts(chain: Chain) -> Chain:
    """The chain with its parameters in bfloat16 where autocast is to cast them once for many calls,
    as it does with those that get gradients; the chain itself where it is not."""
    if not (
        chain.bfloat16
        and torch.is_autocast_enabled("cpu")
        and torch.is_autocast_cache_enabled()
        and not torch.is_inference_mode_enabled()
        and all(p.requires_grad and p.is_leaf and not p.is_inference() for p in chain.parameters)
    ):
        return chain
    with torch.no_grad():
        _block.enter(_cast_of(_block.own))
        return chain if _block.mark is None else _block.cast(chain)


def forget_casts() -> None:
    """Outside any block of autocast, let go of what was cast in this thread's last one."""
    if _block.mark is not None and not _within_a_block():
        _block.enter(None)


def _within_a_block() -> bool:
    """Whether there is an autocast block, maybe one around one that switches autocast off."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting() > 0


def _cast_of(weight: Tensor) -> Tensor | None:
    """Autocast's own cast of a weight: what a product saves for the gradient of its rows."""
    with torch.enable_grad():
        none = weight.new_empty(0, weight.shape[1]).requires_grad_()
        return getattr(torch.nn.functional.linear(none, weight).grad_fn, "_saved_mat2", None)
