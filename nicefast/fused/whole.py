"""A whole flow as one kernel launch (nicefast.kernels.flow), its parameters packed as they change.

What is packed is kept with the chain, which another takes the place of as soon as a parameter is
another tensor. It is filled in again, at the same addresses (a captured CUDA graph reads them
there), when one lies elsewhere or counts another version, and after every optimizer step: fused
optimizers count no versions. Only what is written through ``p.data`` stays unseen, as it does in
autograd. Within a graph that somebody else captures, every replay packs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import backend
from ..captures import is_capturing, keep, stream_of
from ..ops import check_log_scale
from .chain import Chain
from .flow import FusedFlow
from .versions import Version, versions


@dataclass(frozen=True)
class WholeFlow(FusedFlow):
    """Couplings, scaling and prior, and the tile of the kernel that computes them. No gradients."""

    chain: Chain
    shape: Any  # nicefast.kernels.FlowShape
    tile: Any  # nicefast.kernels.FlowTile
    device: torch.device

    def pieces(self, rows: int) -> str:
        tile = self.tile
        return (
            f"{rows} rows in one launch, tiles of {tile.rows} rows and {tile.warps} warps, "
            f"features padded to {tile.features}, hidden layers to {tile.hidden}, products by "
            f"{tile.products}"
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            check_log_scale(log_scale)
            run = backend.kernels().flow_fwd
            packed = self.packed()
            return run(x, context, packed, log_scale, self.shape, self.tile, want_z, want_log_prob)

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        with torch.no_grad():
            check_log_scale(log_scale)
            run = backend.kernels().flow_inv
            return run(z, context, self.packed(), log_scale, self.shape, self.tile)

    def sample(
        self, n: int, row_offset: int, seed: int, context: Tensor | None, log_scale: Tensor
    ) -> Tensor:
        """Rows ``row_offset`` to ``row_offset + n`` of the sample that has this seed."""
        with torch.no_grad():
            check_log_scale(log_scale)
            run = backend.kernels().flow_sample
            packed = self.packed()
            return run(n, row_offset, seed, context, packed, log_scale, self.shape, self.tile)

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        """Through the couplings alone: log_scale = 0, and exp(0) x is x to the last bit."""
        zero = x.new_zeros(x.shape[1])
        if inverse:
            return self.inverse(x, context, zero)
        return self.forward(x, context, zero, want_z=True)[0]

    def packed(self) -> tuple[Tensor, ...]:
        """The parameters as the kernel reads them, as they are now."""
        if any(p.is_inference() for p in self.chain.parameters):
            return self._pack()  # these count no versions
        found, place = _packed.get(self.chain), (self.shape, self.tile, stream_of(self.device))
        if _here.beforehand and found is not None:
            return found.tensors
        if is_capturing(self.device):
            return self._pack()  # in every replay
        now = versions(self.chain)
        if found is None or found.place != place:
            found = _packed[self.chain] = _Packed(place, now, self._pack())
        elif found.versions != now:
            for old, new in zip(found.tensors, self._pack(), strict=True):
                old.copy_(new)
            found.versions = now
        return found.tensors

    def _pack(self) -> tuple[Tensor, ...]:
        # filled in again by later calls, in whatever mode
        with torch.inference_mode(False), torch.no_grad():
            return backend.kernels().pack(self._layout(), self.chain.parameters)

    def _layout(self) -> Any:
        """Where what is packed comes from: the same as long as the chain is."""
        captures, stream = is_capturing(self.device), stream_of(self.device)
        known = _layouts.get(self.chain)
        if known is not None and known.of == (self.shape, self.tile):
            if captures:  # which begins when all else has ended
                keep(known)
            if captures or known.stream == stream:
                return known.layout
        every = torch.arange(self.shape.features, device=self.device)
        sides = [every[f.columns] for f in self.chain.sides]
        order = self.chain.conditions
        layout = backend.kernels().lay_out(
            self.shape, [sides[i] for i in order], [sides[1 - i] for i in order], self.tile
        )
        if not captures:  # what is captured is there in its replays alone
            _layouts[self.chain] = _Layout((self.shape, self.tile), stream, layout)
        return layout


@dataclass
class _Packed:
    place: tuple[Any, ...]  # shape, tile, and the stream whose order keeps readers from writers
    versions: list[Version]
    tensors: tuple[Tensor, ...]


@dataclass
class _Layout:
    of: tuple[Any, Any]  # shape and tile
    stream: int  # whose order keeps readers from its making
    layout: Any


_packed: WeakKeyDictionary[Chain, _Packed] = WeakKeyDictionary()
_layouts: WeakKeyDictionary[Chain, _Layout] = WeakKeyDictionary()


class _Here(threading.local):
    beforehand = False


_here = _Here()


@contextmanager
def packed_beforehand() -> Iterator[None]:
    """In this block, as it captures a graph, parameters are those that were packed before it."""
    _here.beforehand = True
    try:
        yield
    finally:
        _here.beforehand = False
