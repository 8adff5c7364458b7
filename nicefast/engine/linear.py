"""Matrix products: the only place that knows which library multiplies.

On the CPU, PyTorch's float32 products are MKL's. On AMD's processors MKL leaves AVX-512 unused and
computes at less than half of the rate that oneDNN reaches there, so oneDNN takes the products that
are large enough for its calls to pay. Elsewhere, and for every other dtype, PyTorch chooses; so it
does on AMD's processors without AVX-512, where both are equally fast forwards and MKL is twice as
fast at weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.devices import is_amd
from ..runtime.watchers import has_modes
from .thresholds import ONEDNN_FLOPS

InPlace = Callable[[Tensor], Tensor]
_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build
_has_onednn = _pointwise is not None and is_amd() and torch.cpu._is_avx512_supported()


def linear(h: Tensor, weight: Tensor, bias: Tensor, activation: InPlace | None = None) -> Tensor:
    """``activation(h W^T + b)`` of h (N, in), W (out, in) and b (out,), as a new tensor (N, out).

    The activation works in place, after the product: oneDNN's fused relu makes 0 of NaN, and within
    the cache a pass over a block costs next to nothing (0 to 3 % of the whole, measured on Zen 5).
    """
    if _has_onednn and _takes(h, weight.shape[0]):
        y = _onednn(h, weight, bias)
    else:
        y = torch.nn.functional.linear(h, weight, bias)
    return y if activation is None else activation(y)


def prepared_linear(
    h: Tensor, weight: Tensor, bias: Tensor, activation: InPlace | None = None
) -> Tensor:
    """:func:`linear` of a weight (in, out), which is the shortest way through PyTorch: a frozen
    flow on the CPU has its weights so."""
    if _has_onednn and _takes(h, weight.shape[1]):
        y = _onednn(h, weight.t(), bias)
    elif activation is torch.relu_ and not has_modes():  # counters of operations do not know it
        return torch._addmm_activation(bias, h, weight)
    else:
        y = torch.addmm(bias, h, weight)
    return y if activation is None else activation(y)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of a (M, K) and b (K, N), as a new tensor (M, N)."""
    if _has_onednn and _takes(a, b.shape[1]):
        return _onednn(a, b.t(), None)
    return torch.mm(a, b)


def weight_gradient(d: Tensor, h: Tensor) -> Tensor:
    """``d^T h`` (out, in) of d (N, out) and h (N, in): the gradient of a layer's weight.

    The narrower matrix comes first: oneDNN copies that one's transpose, and MKL is slow at a
    product of many rows and few columns (11 instead of 53 GFLOP/s at 64 x 4).
    """
    if h.shape[1] < d.shape[1]:
        return product(h.t(), d).t()
    return product(d.t(), h)


def input_major(weight: Tensor) -> Tensor:
    """The weight (out, in) with its outputs next to each other in memory: oneDNN wants it so, and
    would otherwise copy it in each product."""
    if not (_has_onednn and weight.is_cpu and weight.dtype == torch.float32):
        return weight
    return weight.t().contiguous().t()


def _onednn(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h W^T + b`` by oneDNN, which reads a bias as if it were contiguous."""
    bias = None if bias is None else bias.contiguous()
    return _pointwise(_rows(h), _dense(weight), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, without a gap: with any other as its second operand, oneDNN
    takes hundreds of times as long (14 and 6,480 ms for 4,096 x 256 x 256)."""
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def _rows(matrix: Tensor) -> Tensor:
    """The first operand may have gaps between its rows, or its columns, but nothing twice."""
    return matrix if 1 in matrix.stride() and 0 not in matrix.stride() else matrix.contiguous()


def _takes(a: Tensor, columns: int) -> bool:
    """Whether oneDNN, where it is used, computes the product of ``a`` (M, K) with a matrix of so
    many columns."""
    return 2 * a.numel() * columns >= ONEDNN_FLOPS and a.is_cpu and a.dtype == torch.float32
