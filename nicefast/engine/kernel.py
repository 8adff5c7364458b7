"""The kernel engine: a narrow flow in one launch of :mod:`nicefast.kernels.flow`.

Parameters are packed as the kernel reads them in each call; a frozen flow packs them once. The
gradient is the row engine's.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..runtime import backend
from ..runtime.captures import is_capturing
from ..runtime.threads import without_autograd
from .rows import Residuals, RowEngine
from .stack import CouplingStack


class KernelEngine(RowEngine):
    """Couplings, scaling and prior in one launch, where a tile of the kernel holds the flow.

    ``shape`` and ``tile`` are a FlowShape and a FlowTile of :mod:`nicefast.kernels`.
    """

    name = "kernel"

    def __init__(
        self,
        stack: CouplingStack,
        log_scale: Tensor,
        prior: str,
        shape: Any,
        tile: Any,
        recompute: bool = False,
    ) -> None:
        super().__init__(stack, log_scale, prior, recompute)
        self.shape, self.tile = shape, tile

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, save: list[Residuals] | None = None
    ) -> Tensor:
        if save is not None:
            return super().log_prob(x, context, save)
        log_scale = self.checked_log_scale()
        run = backend.kernels().flow_fwd
        return run(x, context, self.packed, log_scale, self.shape, self.tile, False, True)[1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._forward(x, context, self.checked_log_scale())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._inverse(z, context, self.checked_log_scale())

    def couple(
        self,
        x: Tensor,
        context: Tensor | None = None,
        inverse: bool = False,
        save: list[Residuals] | None = None,
    ) -> Tensor:
        if save is not None:
            return super().couple(x, context, inverse, save)
        zero = x.new_zeros(x.shape[1])  # exp(0) x is x, to the last bit
        return self._inverse(x, context, zero) if inverse else self._forward(x, context, zero)

    def sample(self, n: int, row_offset: int, seed: int, context: Tensor | None) -> Tensor:
        """Rows ``row_offset`` to ``row_offset + n`` of the sample of this seed: noise, inverse
        scaling and couplings in one launch."""
        log_scale, run = self.checked_log_scale(), backend.kernels().flow_sample
        return run(n, row_offset, seed, context, self.packed, log_scale, self.shape, self.tile)

    def trial(self) -> str | None:
        """The reason why this tile's kernels cannot be compiled and run on this device; None where
        they have been, on one row, in the first call that asks."""
        key = self.shape, self.tile, self.stack.device
        if key not in _trials:
            _trials[key] = self._trial()
        return _trials[key]

    def _trial(self) -> str | None:
        device = self.stack.device
        x = torch.zeros(1, self.stack.features, device=device)
        c = torch.zeros(1, self.stack.context, device=device) if self.stack.context else None
        try:
            with without_autograd(device):
                self.couple(x, c)
                self.couple(x, c, inverse=True)
            if device.type == "cuda" and not is_capturing(device):
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            raise  # it says nothing of the kernel
        except Exception as error:  # whatever a compiler may raise
            said = (str(error).strip().splitlines() or ["without a message"])[0]
            return f"a trial failed ({type(error).__name__}: {said})"
        return None

    def describe(self, rows: int) -> str:
        tile = self.tile
        return (
            f"{rows} rows in one launch, tiles of {tile.rows} rows and {tile.warps} warps, "
            f"{tile.widths}, hidden layers padded to {tile.hidden}, products by {tile.products}"
        )

    @cached_property
    def packed(self) -> tuple[Tensor, ...]:
        """The parameters as the kernel reads them, as they are when this is first asked for."""
        layout = _layout(self.stack, self.shape, self.tile)
        return backend.kernels().pack(layout, self.stack.parameters)

    def _forward(self, x: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        run = backend.kernels().flow_fwd
        return run(x, context, self.packed, log_scale, self.shape, self.tile, True, False)[0]

    def _inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        run = backend.kernels().flow_inv
        return run(z, context, self.packed, log_scale, self.shape, self.tile)


#: Results of :meth:`KernelEngine.trial`, for each shape, tile and device.
_trials: dict[tuple[Any, ...], str | None] = {}
#: Where each packed number comes from, for each architecture and device: tables of constants, which
#: cannot be out of date. They stay for good, since a CUDA graph of somebody else's may read them.
_layouts: dict[tuple[Any, ...], Any] = {}


def _layout(stack: CouplingStack, shape: Any, tile: Any) -> Any:
    """The table for this stack, made in its first call."""
    device = stack.device
    key = shape, tile, stack.partition, stack.conditioning, device
    found = _layouts.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):  # later calls may record gradients
        every = torch.arange(stack.features, device=device)
        halves = [every[half.columns] for half in stack.halves]
        conditioning = [halves[i] for i in stack.conditioning]
        transformed = [halves[1 - i] for i in stack.conditioning]
        found = backend.kernels().lay_out(shape, conditioning, transformed, tile)
    if not is_capturing(device):  # what a capture computes is there in its replays alone
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it is read on any stream from now on
        _layouts[key] = found
    return found
