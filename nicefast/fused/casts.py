"""Parameters in bfloat16, cast once: within a block of autocast or, on a GPU, until they change.

Within one ``torch.autocast`` block PyTorch casts a parameter once, and takes what came of it until
the block ends. So does nicefast, and lets go of it in the first call after the block. A parameter
that has changed within the block, which autocast would not see, is cast again; only what is written
through ``p.data`` stays unseen until the block ends, as it does in PyTorch itself.

On a GPU a cast for each parameter would take more launches than the products: there casts are kept
with the chain, as what a whole flow's kernel reads is (see :mod:`.whole`).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..captures import is_capturing, stream_of
from .chain import Chain, Layers
from .versions import Version, versions


class _Cast(NamedTuple):
    versions: list[Version]
    stream: int  # whose order keeps readers from what is being cast
    couplings: tuple[Layers, ...]


def _cast(chain: Chain, casts: WeakKeyDictionary[Chain, _Cast]) -> Chain:
    """The chain with its parameters as they are in ``casts``, or will be."""
    now, found, stream = versions(chain), casts.get(chain), stream_of(chain.device)
    if found is None or found.versions != now or found.stream != stream:
        couplings = tuple(
            tuple((w.to(torch.bfloat16), b.to(torch.bfloat16)) for w, b in layers)
            for layers in chain.couplings
        )
        found = casts[chain] = _Cast(now, stream, couplings)
    return replace(chain, couplings=found.couplings)


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
        return _cast(chain, self.casts)


_block = _Block()
_kept: WeakKeyDictionary[Chain, _Cast] = WeakKeyDictionary()


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


def with_kept_casts(chain: Chain) -> Chain:
    """The chain with its parameters in bfloat16, if so they are to be, cast again only where they
    have changed; as it is where that can't be known."""
    if not chain.bfloat16 or is_capturing(chain.device):
        return chain
    if any(p.is_inference() for p in chain.parameters):  # these count no versions
        return chain
    with torch.inference_mode(False), torch.no_grad():  # kept for calls in whatever mode
        return _cast(chain, _kept)


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
