"""Noise of few rows on the CPU by NumPy, whose calls cost less: the reference's, bit for bit.

Whole numbers, their conversion, sums, products and quotients have the same bits in every library.
Logarithms and the like have not: they are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .philox import FEW_QUADS, philox_of_few

Array = Any  # of NumPy


def serves(log_scale: Tensor, n: int) -> bool:
    """Whether NumPy is the faster way to so many rows, and one."""
    few = n * -(-log_scale.shape[0] // 4) < FEW_QUADS
    return few and log_scale.is_cpu and log_scale.dtype == torch.float32


def sample_prior(log_scale: Tensor, n: int, seed: int, prior: str, row_offset: int) -> Tensor:
    """:func:`nicefast.reference.sample_prior` (n, D), in log_scale's dtype, the faster way."""
    if not serves(log_scale, n):
        return reference.sample_prior(log_scale, n, seed, prior, row_offset)
    d = log_scale.shape[0]
    rows = np.arange(n) + row_offset
    bits = philox_of_few(rows, np.arange(-(-d // 4)), 0, seed)
    z = _logistic(bits) if prior == "logistic" else _normal(bits)
    return z[:, :d] * torch.exp(-log_scale)


def _logistic(bits: Array) -> Tensor:
    w = _unit(bits & 0x7FFFFFFF, 2.0**-31)
    t = 2 - w
    t /= w
    z = torch.from_numpy(t).log_()
    sign = t.view(np.int32)  # t is not negative
    sign |= bits & -(1 << 31)
    return z


def _normal(bits: Array) -> Tensor:
    return reference.box_muller(torch.from_numpy(_unit(bits.view(np.uint32), 2.0**-32)))


def _unit(bits: Array, scale: float) -> Array:
    found = bits.astype(np.float32)
    found += np.float32(0.5)
    found *= np.float32(scale)
    return found
