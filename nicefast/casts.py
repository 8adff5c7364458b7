"""The weights that autocast has cast already.

Within one ``torch.autocast`` block PyTorch casts a parameter once, and takes what came of it until
the block ends. So does nicefast, from a block's fourth call on, where weights are large: it asks
for PyTorch's own cast, by a product that has no rows, and looks whether it is right. A parameter
that has changed since, which autocast would not see, is cast again; only what is written through
``p.data`` within the block stays unseen, as it does in PyTorch itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .chain import Chain
from .versions import Version, version

LEAST_ELEMENTS = 1 << 18  # of a weight: casting a smaller one costs less than asking
LEAST_CALLS = 3  # after which a block is likely to have more: to look costs as much as two of them


class _Known(NamedTuple):
    version: Version
    calls: int = 1  # in which this version was cast by ourselves
    is_right: bool | None = None  # whether autocast's cast is that of this version, once looked at


class _Block:
    """What is known of the block that autocast is in, which is told by its cast of a tensor nobody
    else has: as long as it is held here, no other block's can lie at the same place."""

    def __init__(self) -> None:
        self.own = torch.nn.Parameter(torch.zeros(1, 1, device="cpu", dtype=torch.float32))
        self.mark: Tensor | None = None
        self.known: Any = WeakIdKeyDictionary()

    def enter(self) -> None:
        """Forget what was, if this is another block."""
        mark = _cast_of(self.own)
        if mark is None or self.mark is None or mark.data_ptr() != self.mark.data_ptr():
            self.known.clear()
            self.mark = mark

    def cast(self, weight: Tensor) -> Tensor:
        """The weight as autocast has it, or itself."""
        now, known = version(weight), self.known.get(weight)
        if known is None or known.version != now:
            self.known[weight] = _Known(now)
            return weight
        if known.calls < LEAST_CALLS:
            self.known[weight] = known._replace(calls=known.calls + 1)
            return weight
        cast = None if known.is_right is False else _cast_of(weight)
        if cast is None:
            return weight
        if known.is_right is None:
            known = known._replace(is_right=torch.equal(cast, weight.to(torch.bfloat16)))
            self.known[weight] = known
        return cast if known.is_right else weight


_block = _Block()


def with_casts(chain: Chain) -> Chain:
    """The chain, its large weights those in bfloat16 that autocast keeps for the current block."""
    if not (
        chain.bfloat16
        and torch.is_autocast_enabled("cpu")
        and torch.is_autocast_cache_enabled()
        and not torch.is_inference_mode_enabled()
        and any(_is_kept(w) for layers in chain.couplings for w, _ in layers)
    ):
        return chain
    with torch.no_grad():
        _block.enter()
        cast = tuple(
            tuple((_block.cast(w) if _is_kept(w) else w, b) for w, b in layers)
            for layers in chain.couplings
        )
    return replace(chain, couplings=cast)


def _is_kept(weight: Tensor) -> bool:
    """Whether autocast keeps its cast, and it is worth asking for."""
    return weight.numel() >= LEAST_ELEMENTS and weight.requires_grad and weight.is_leaf


def _cast_of(weight: Tensor) -> Tensor | None:
    """Autocast's own cast of a weight: what a product saves for the gradient of its rows."""
    with torch.enable_grad():
        none = weight.new_empty(0, weight.shape[1]).requires_grad_()
        saved = getattr(torch.nn.functional.linear(none, weight).grad_fn, "_saved_mat2", None)
    if saved is None or saved.dtype != torch.bfloat16:
        return None
    return saved.detach().t()
