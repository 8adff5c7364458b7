"""Which products oneDNN takes on the CPU, with what follows them; the others are MKL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import devices, watchers
from .chain import Chain

linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build
FLOPS = 1 << 22  # below this, its set-up costs more than its product saves,
ROWS = 1 << 10  # and with fewer rows, so does arranging the weights,
FLOPS_OF_FEW = 1 << 24  # up to this,
WEIGHT_OF_FEW = 1 << 18  # and always of weights with fewer numbers;
ROWS_OF_NARROW = 1 << 12  # of narrow flows always;
FLOPS_OF_TRAINING = 1 << 30  # more so where activations are kept of few rows, and back;
TURNED_ROWS_PER_WIDTH = 2  # with fewer rows, arranging weights that lie the other way costs more
# on processors that MKL is not made for, of few rows any with a large weight, others from here on,
AMD_FLOPS_OF_FEW = 1 << 25
AMD_FLOPS_OF_TRAINING = 1 << 24  # and in training


class OneDNN:
    """What it takes of a chain's products; ``training``: activations are kept."""

    def __init__(self, chain: Chain, device: torch.device, training: bool) -> None:
        self.training, self.narrow, self.bfloat16 = training, chain.narrow, chain.bfloat16
        self.there = device.type == "cpu" and linear_pointwise is not None
        self.amd = self.there and devices.is_amd()
        sooner = self.amd and not self.bfloat16  # products in bfloat16 are oneDNN's anyhow
        self.least_of_training = AMD_FLOPS_OF_TRAINING if sooner else FLOPS_OF_TRAINING
        self.counted = watchers.has_modes()

    def takes(self, weight: Tensor, rows: int) -> bool:
        """A product of so many rows, with bias and activation or sum."""
        if self.training:
            few = ROWS // 2 if self.bfloat16 else ROWS
            least = FLOPS if rows >= few else self.least_of_training
        elif self.narrow and rows < ROWS_OF_NARROW:
            return False
        elif rows >= ROWS:
            least = FLOPS
        elif weight.numel() >= WEIGHT_OF_FEW:
            least = 0 if self.amd else FLOPS_OF_FEW
        elif self.amd:
            least = AMD_FLOPS_OF_FEW
        else:
            return False
        return self.there and 2 * weight.numel() * rows >= least

    def takes_sum(self, weight: Tensor) -> bool:
        """A last product all the same, with the sum: with few rows that is slower unless weights
        are large, but who counts operators is to see products alone."""
        if not self.there or self.narrow or self.training:
            return False
        return self.counted or weight.numel() >= WEIGHT_OF_FEW

    def takes_back(self, weight: Tensor, rows: int) -> bool:
        """The product that leads back through a layer."""
        if not self.there or self.bfloat16:
            return False
        if not self.amd and rows < TURNED_ROWS_PER_WIDTH * max(weight.shape):
            return False
        return 2 * weight.numel() * rows >= self.least_of_training
